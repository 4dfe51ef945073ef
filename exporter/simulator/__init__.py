"""A simulated BlueKing platform for tests, demos and benchmarks.

    world.py            what happens in JOB: executions, steps, hosts, over (virtual) time
    ledger.py           the truth about it: what a correct exporter must have counted
    api.py              how JOB tells it: v4, v3, ESB
    nodeman_world.py    the same for NodeMan
    nodeman_ledger.py
    nodeman_api.py
    nodemgr_world.py    the same for NodeMan V3, with its truth
    nodemgr_api.py
    gateway.py          what the API gateway and the ESB put around every answer: credentials, limits, envelopes
    faults.py           everything that goes wrong between them and the client
    answer.py           what they hand to each other
    platform.py         one platform: worlds, settings, faults, the log of calls
    server.py           HTTP
    control.py          paths of the simulator itself: the truth, the log of calls, letting things happen
    traffic.py          who starts what in a populated world

It knows nothing of the exporter's decoding: both follow the vendor's behaviour, not each other.
"""
