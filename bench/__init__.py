"""Measures the exporter against its anchors; see docs/performance.md. `python -m bench GROUP`."""
