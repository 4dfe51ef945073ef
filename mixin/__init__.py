"""Rules, alerts and dashboards. The sources are jsonnet; `render` makes files of them."""
