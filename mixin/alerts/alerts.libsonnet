// Severity: critical wakes somebody, warning waits for the morning.
(import 'exporter.libsonnet') +
(import 'job.libsonnet') +
(import 'nodeman.libsonnet')
