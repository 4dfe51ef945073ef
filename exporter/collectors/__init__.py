"""What can be watched: the literal list of collectors. Importing it has no effect."""

from __future__ import annotations

from exporter.collectors.base import Collector
from exporter.collectors.job import JobCollector

COLLECTORS: tuple[type[Collector], ...] = (JobCollector,)
"""Each is one file here, one key of `collectors:` in the configuration and one value of the label `collector`."""
