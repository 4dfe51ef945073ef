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
"""Each is one key of `collectors:` in the configuration and one value of the label `collector`. JOB is the largest: its
state, fold and families have files of their own."""
