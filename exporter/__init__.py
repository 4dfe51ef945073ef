"""blueking-exporter: BlueKing JOB executions and NodeMan installs as Prometheus metrics, counted exactly once.

Where things are, from the outside in:

    cli          one table of flags, one of commands; exit codes
    once probe demo healthcheck reference state_command     one command each, beside the daemon
    verify       one command: poll, read the same again, compare
    app          the daemon: start, signals, stop
    reload       the configuration while the daemon runs: reload, files that are followed
    process      the process as its web server shows it: readiness, status, failures, the page
    sharing      scopes shared by several replicas on Redis     shard      static shards without Redis
    discovery    scopes found in CMDB
    web          /metrics, pages for people, JSON, web configuration file
    status       what the pages and the JSON APIs show
    fleet        all pollers: one locked `apply` starts, changes and stops them
    poller       one poll as a transaction, and the loop around it
    exposed      what /metrics shows of one poller: state to chunks, birth hold, timers
    state        what has been counted: SQLite, memory, Redis
    metrics      a family as one row (family), its samples as bytes (render), the page made of them (page)
    collectors   one per API that is watched: fetch, then a pure fold over the records
    blueking     one typed function per endpoint of the platform; authentication, retry, limits
    config       YAML to typed values
    telemetry    the metrics of the process
    log          one event, one line, no secret                 systemd    READY, watchdog, socket activation
    model        scopes, statuses and slugs of BlueKing         errors     all errors, as a tree
    clock        this machine's time and the platform's         timers     timers of thousands of pollers
    simulator    a simulated BlueKing platform
"""

__version__ = "0.1.0"
