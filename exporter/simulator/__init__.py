"""A simulated BlueKing platform for tests, demos and benchmarks.

    world.py            JOB: executions, steps and hosts over (virtual) time
    ledger.py           the truth about JOB: what a correct exporter must have counted
    api.py              the API of JOB: v4, v3, ESB
    nodeman_world.py    the same for NodeMan
    nodeman_ledger.py
    nodeman_api.py
    nodemgr_world.py    the same for NodeMan V3, with its truth
    nodemgr_api.py
    gateway.py          the API gateway and the ESB: authentication, rate limits, error envelopes
    faults.py           faults between the platform and the client
    answer.py           the answer of a handler
    platform.py         one platform: worlds, settings, faults, the log of calls
    server.py           HTTP
    control.py          paths of the simulator itself: the truth, the log of calls, events
    traffic.py          random traffic in JOB

It shares no code with the exporter's decoders: both are built from the vendor's behaviour.
"""
