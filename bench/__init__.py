"""Measures the exporter against its anchors; see docs/en/performance.md. `python -m bench GROUP`."""
