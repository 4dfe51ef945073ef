// Settings that differ between sites. Override them from outside: (import 'mixin.libsonnet') + { _config+:: { … } }.
{
  _config+:: {
    // Selects the series about the exporter itself; all others are selected by their names.
    exporterSelector: 'job=~"blueking(-exporter)?"',
    // Target labels that a restart may change, as it does in Kubernetes.
    restartLabels: 'instance, pod',
    // Where docs/ is published; a runbook is <docsUrl>/<language>/runbooks/<alert>.md.
    docsUrl: 'https://example.com/blueking-exporter/docs',
    // Where people reach the exporter's web pages; links to its /failures begin with it.
    exporterUrl: 'http://{{ $labels.instance }}',

    // The exporter.
    exporterDownFor: '5m',
    collectorFailingFor: '15m',
    // Less than the exporter's stale_after (5): these alerts fire, and inhibit others, before gauges disappear.
    unreachableIntervals: 2,
    platformUnreachableFor: '30s',
    staleIntervals: 3,
    staleFor: '30s',
    // How long after the last event an alert on a counter keeps firing.
    errorWindow: '15m',
    historyWindow: '1h',
    rateLimitedFor: '5m',
    reloadFailedFor: '1m',
    // Several replicas or shards. Longer than lease_ttl and two scrapes, so that a takeover fires no alert.
    leaseLostFor: '1m',
    unownedFor: '2m',
    // Longer than a rolling update of all replicas.
    configDiffersFor: '30m',
    shardsFor: '5m',

    // JOB.
    failureRateWindow: '30m',
    failureRate: 0.2,
    failureRateMinimum: 10,
    failureRateFor: '5m',
    hostConsecutiveFailures: 3,
    agentOutageHosts: 20,
    agentOutageFor: '2m',
    stuckSeconds: 2 * 3600,
    stuckFor: '5m',

    // NodeMan.
    nodemanInstallFailures: 3,
    nodemanInstallWindow: '1h',
    nodemanStuckSeconds: 3600,
    nodemanStuckFor: '5m',
    nodemanSubscriptionFor: '10m',
  },
}
