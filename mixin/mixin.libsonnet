// The whole mixin: prometheusRules, prometheusAlerts and grafanaDashboards, as other mixins name them.
(import 'config.libsonnet') +
(import 'rules/rules.libsonnet') +
(import 'alerts/alerts.libsonnet') +
(import 'dashboards/dashboards.libsonnet')
