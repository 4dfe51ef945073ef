"""blueking-exporter: BlueKing JOB executions and NodeMan installs as Prometheus metrics, counted exactly once.

Where things are, from the outside in:

    cli          sub-commands, flags, exit codes
    once probe demo healthcheck reference     one command each, without a daemon or around it
    app          start, signals, stop
    reload       the configuration while the daemon runs: reload, files that are followed
    discovery    scopes found in CMDB
    status       what the landing page and the JSON APIs show
    fleet        all pollers: one locked `apply(config)` starts, changes and stops them
    poller       one poll as a transaction, and the loop around it
    exposed      what /metrics shows of one poller: state to chunks, birth hold, timers
    web          /metrics, landing page, JSON, web configuration file
    state        what has been counted: SQLite, memory
    metrics      a family as one row (family), its samples as bytes (render), the page made of them (page)
    collectors   one per thing that is watched: fetch, then a pure fold over the records
    blueking     one typed function per endpoint of the platform; authentication, retry, limits
    config       YAML to typed values
    telemetry    the exporter's own metrics
    log          one event, one line, no secret            systemd    the protocol of a service
    model        the words of BlueKing: scopes, statuses, slugs
    clock        this machine's time and the platform's    errors     all of them, as a tree
    simulator    a BlueKing platform made of thin air
"""

__version__ = "0.1.0"
