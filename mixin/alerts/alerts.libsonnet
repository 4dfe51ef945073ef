// Severity: critical needs action at once, warning during working hours.
(import 'exporter.libsonnet') +
(import 'job.libsonnet') +
(import 'nodeman.libsonnet')
