"""What /metrics shows of a state of V3 workflows: its families, and how the gauges among them read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from exporter.collectors import nodeman
from exporter.collectors.nodeman import NodemanView
from exporter.collectors.nodemgr.fold import DURATION, FINISHED, LOST, REOPENED
from exporter.collectors.nodemgr.state import NodemgrState, Tracked, parts_of
from exporter.config.schema import NodemgrConfig
from exporter.metrics.family import Family, Labels

View: TypeAlias = NodemanView[NodemgrState, NodemgrConfig]


def unfinished(view: View) -> Mapping[Labels, float]:
    counted = Counter((domain, known.type) for domain, known in _unfinished(view))
    return {labels: float(count) for labels, count in counted.items()}


def oldest_unfinished(view: View) -> Mapping[Labels, float]:
    oldest: dict[Labels, float] = {}
    for domain, known in _unfinished(view):
        begun = known.operate_time / 1000
        oldest[domain,] = min(begun, oldest.get((domain,), begun))
    return oldest


def _unfinished(view: View) -> Iterator[tuple[str, Tracked]]:
    return ((parts_of(key)[0], known) for key, known in view.state.workflows.items() if not known.counted)


FAMILIES = (
    Family(
        FINISHED,
        "counter",
        ("domain", "workflow_type", "status"),
        "Workflows of NodeMan V3 that reached a terminal status, once per workflow and finish time.",
        "进入终态的节点管理 V3 工作流数，每个工作流的每个结束时间只计一次。",
    ),
    Family(
        REOPENED,
        "counter",
        ("domain",),
        "Finished workflows of NodeMan V3 that ran again.",
        "结束后再次运行的节点管理 V3 工作流数。",
    ),
    Family(
        LOST,
        "counter",
        ("domain",),
        "Unfinished workflows of NodeMan V3 that were given up: too old, or gone from the platform.",
        "被放弃的未结束节点管理 V3 工作流数：时间过久或平台上已不存在。",
    ),
    Family(
        "blueking_nodemgr_workflows_unfinished",
        "gauge",
        ("domain", "workflow_type"),
        "Workflows of NodeMan V3 that have not ended.",
        "尚未结束的节点管理 V3 工作流数。",
        sticky=True,
        gauge=unfinished,
    ),
    Family(
        "blueking_nodemgr_oldest_unfinished_timestamp_seconds",
        "gauge",
        ("domain",),
        "Start of the oldest unfinished workflow of NodeMan V3.",
        "最早的未结束节点管理 V3 工作流的开始时间。",
        gauge=oldest_unfinished,
    ),
    Family(
        DURATION,
        "histogram",
        ("domain", "workflow_type"),
        "Start to end of workflows of NodeMan V3, first run only.",
        "节点管理 V3 工作流首次运行从开始到结束的耗时。",
    ),
    *nodeman.FAMILIES,
)
