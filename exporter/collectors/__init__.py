"""The list of all collectors. Importing it has no side effect."""

from __future__ import annotations

from exporter.collectors.base import Collector
from exporter.collectors.job.collector import JobCollector
from exporter.collectors.nodeman_job.collector import NodemanJobCollector
from exporter.collectors.nodeman_subscription.collector import NodemanSubscriptionCollector
from exporter.collectors.nodeman_task.collector import NodemanTaskCollector
from exporter.collectors.nodemgr.collector import NodemgrCollector

COLLECTORS: tuple[type[Collector], ...] = (
    JobCollector,
    NodemanJobCollector,
    NodemanSubscriptionCollector,
    NodemanTaskCollector,
    NodemgrCollector,
)
"""Each is one key of `collectors:` in the configuration, one value of the label `collector`, and one folder: what is
asked (collector), what is known (state), how it is counted (fold), what is shown (metrics)."""
