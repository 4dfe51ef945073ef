// File name: dashboard.
{
  grafanaDashboards+:: {
    'overview.json': import 'overview.libsonnet',
    'business.json': import 'business.libsonnet',
    'nodeman.json': import 'nodeman.libsonnet',
    'exporter.json': import 'exporter.libsonnet',
  },
}
