"""The two formats as prometheus_client parses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from prometheus_client import Metric, parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from exporter.metrics.negotiate import Format


def parse(text: str, form: Format) -> Iterable[Metric]:
    """The families of a whole page; OpenMetrics ends with its `# EOF`."""
    module = openmetrics_parser if form.openmetrics else parser
    return cast(Iterable[Metric], module.text_string_to_metric_families(text))
