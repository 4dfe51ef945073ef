"""What /metrics shows of a state of NodeMan 1.x tasks: its families, and how the gauges among them read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from exporter.collectors import nodeman
from exporter.collectors.nodeman import NodemanView
from exporter.collectors.nodeman_task.state import TaskState, TrackedTask
from exporter.config.schema import NodemanTaskConfig
from exporter.metrics.family import Family, Labels

View: TypeAlias = NodemanView[TaskState, NodemanTaskConfig]


def hosts(view: View) -> Mapping[Labels, float]:
    return {
        (str(id), task.job_type, status): float(max(0, task.status_count.get(status, 0)))
        for id, task in _configured(view)
        if task.status_count
        for status in ("success", "failed", "running")
    }


def _configured(view: View) -> list[tuple[int, TrackedTask]]:
    return [(id, task) for id, task in view.state.tasks.items() if id in view.config.job_ids]


def hosts_by_os(view: View) -> Mapping[Labels, float]:
    return {
        (str(id), task.job_type, os): float(max(0, count))
        for id, task in _configured(view)
        for os, count in task.os_count.items()
    }


FAMILIES = (
    Family(
        "blueking_nodeman_task_hosts",
        "gauge",
        ("job_id", "job_type", "status"),
        "Hosts of a NodeMan 1.x task by status; running includes hosts in the queue.",
        "节点管理 1.x 任务的主机数，按状态统计；running 包含排队中的主机。",
        gauge=hosts,
    ),
    Family(
        "blueking_nodeman_task_hosts_by_os",
        "gauge",
        ("job_id", "job_type", "os_type"),
        "Hosts of a NodeMan 1.x task by operating system.",
        "节点管理 1.x 任务的主机数，按操作系统统计。",
        gauge=hosts_by_os,
    ),
    *nodeman.FAMILIES,
)
