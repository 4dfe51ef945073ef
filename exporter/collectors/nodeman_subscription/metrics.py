"""What /metrics shows of a state of NodeMan subscriptions: its families, and how the gauges among them read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from exporter.collectors import nodeman
from exporter.collectors.nodeman import NodemanView, status_label
from exporter.collectors.nodeman_subscription.fold import STEP_DURATION
from exporter.collectors.nodeman_subscription.state import SubscriptionState
from exporter.config.schema import NodemanSubscriptionConfig
from exporter.metrics.family import Family, Labels

View: TypeAlias = NodemanView[SubscriptionState, NodemanSubscriptionConfig]


def instances(view: View) -> Mapping[Labels, float]:
    """Counted by label, since several unknown words share one."""
    counted: dict[Labels, float] = {}
    for id, known in view.state.subscriptions.items():
        for status, count in known.counter.items() if id in view.config.subscription_ids else ():
            labels = (str(id), status_label(status))
            counted[labels] = counted.get(labels, 0.0) + max(0, count)
    return counted


def last_finished(view: View) -> Mapping[Labels, float]:
    return {
        (str(id),): known.last_finished
        for id, known in view.state.subscriptions.items()
        if known.last_finished is not None and id in view.config.subscription_ids
    }


FAMILIES = (
    Family(
        "blueking_nodeman_subscription_instances",
        "gauge",
        ("subscription_id", "status"),
        "Instances of a subscription by status.",
        "订阅的实例数，按状态统计。",
        gauge=instances,
    ),
    Family(
        "blueking_nodeman_subscription_last_finished_timestamp_seconds",
        "gauge",
        ("subscription_id",),
        "Newest finish among the newest instances of a subscription.",
        "订阅最新实例中最近一次完成的时间。",
        gauge=last_finished,
    ),
    Family(
        STEP_DURATION,
        "histogram",
        ("job_type", "step"),
        "Sub-steps of finished hosts, of the rows that were read.",
        "已完成主机的子步骤耗时（仅限读取到的记录）。",
    ),
    *nodeman.FAMILIES,
)
