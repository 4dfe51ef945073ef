"""NodeMan 1.x tasks: hosts by status and system, and which fail with which error code (get_task_info).

A task shows neither a status of its own nor when a host ended, so a host's run is what lies between two returns to an
unfinished status, and its end is that of the task, or when it was seen. Times are unix seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from exporter.blueking.nodeman_legacy import LegacyHost, LegacyTask, NodemanLegacyApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Collector, FailedExecution, Observed, Platforms
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import (
    FAMILIES,
    NodemanCollector,
    NodemanState,
    NodemanView,
    count_failure,
)
from exporter.config.schema import NodemanTaskConfig, ScopeConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family, Labels
from exporter.model import NODEMAN_STATUSES


class TrackedTask(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a task. `hosts`: the last status of each host, by `names`."""

    job_type: str
    status_count: dict[str, int]
    os_count: dict[str, int]
    hosts: dict[str, str]


class TaskState(NodemanState, frozen=True, kw_only=True):
    """By task id."""

    tasks: dict[int, TrackedTask]


class TaskRecords(msgspec.Struct, frozen=True):
    """What one poll, begun at `watermark`, brought by task id; `errors` of the tasks that are missing in it."""

    now: float
    watermark: float
    tasks: dict[int, LegacyTask]
    errors: tuple[str, ...]

    @property
    def size(self) -> int:
        """See `Records`."""
        return sum(len(task.hosts) for task in self.tasks.values())


class NodemanTaskCollector(NodemanCollector[NodemanTaskConfig, NodemanLegacyApi]):
    """See `Collector`."""

    name: ClassVar[str] = "nodeman_task"
    state_type: ClassVar[type[TaskState]] = TaskState
    families: ClassVar[tuple[Family, ...]]

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock, hold: float) -> Collector | None:
        if platforms.nodeman_legacy is None or not config.collectors.nodeman_task.enabled:
            return None
        return cls(config.scope, config.collectors.nodeman_task, platforms.nodeman_legacy, clock, hold)

    async def fetch(self, state: TaskState | None, deadline: Deadline) -> TaskRecords:
        """Every configured task. One that cannot be had for good is left out, as long as another one can. Raises
        `ApiError`."""
        begun = self._clock.platform()
        tasks, errors = await self.ask_each(
            self.config.job_ids, lambda id: self._api.get_task_info(self.biz, id, deadline=deadline)
        )
        now = self._clock.platform()
        return TaskRecords(now, min(begun, now), tasks, errors)

    def observe(self, state: TaskState | None, records: TaskRecords, now: float) -> Observed[TaskState]:
        """Fold the records of a poll; `now` is the wall clock."""
        tally = self.tally(state, now)
        before = state.tasks if state else {}
        # Of one that gave no answer nothing is shown.
        tasks = {
            id: msgspec.structs.replace(before[id], status_count={}, os_count={})
            for id in self.config.job_ids
            if id in before
        }
        results: list[HostResult] = []
        unknown: list[tuple[str, str]] = []
        for id, task in records.tasks.items():
            known = before.get(id)
            hosts: dict[str, str] = {}
            for name, row in zip(names(task.hosts), task.hosts, strict=True):
                hosts[name] = row.status
                if known and row.status == known.hosts.get(name):
                    continue
                if row.status not in NODEMAN_STATUSES:
                    unknown.append(("nodeman_task.status", row.status))
                results += self._take(id, task, row, records.now, tally, counts=known is not None)
            tasks[id] = TrackedTask(task.job_type, task.status_count, task.os_count, hosts)
        failing = self.fold_hosts(state, results, records.now, settled=self.config.failing_host_ttl)
        return Observed(
            TaskState(counts=tally.freeze(), last_success=now, watermark=records.watermark, hosts=failing, tasks=tasks),
            unknown=tuple(unknown),
            errors=records.errors,
        )

    def _take(
        self, id: int, task: LegacyTask, row: LegacyHost, now: float, tally: Tally, *, counts: bool
    ) -> list[HostResult]:
        """Count a host that has just failed; the result of one that has just ended."""
        if row.status not in ("failed", "success"):
            return []
        labels = (self.name, task.job_type, row.step, row.err_code) if row.status == "failed" else None
        if labels and counts:
            count_failure(tally, labels)
        end = now if task.end_time is None else min(now, float(task.end_time))
        return [HostResult(row.host, id, "", end, labels)] if row.host else []

    async def probe(self, state: TaskState, deadline: Deadline) -> float:
        """One call per task and interval."""
        return len(self.config.job_ids) * 86400.0 / self.interval

    def failed_executions(self, state: TaskState) -> list[FailedExecution]:
        """Tasks with failed hosts, newest first."""
        return [
            FailedExecution(id, task.job_type, "failed", None)
            for id, task in sorted(state.tasks.items(), reverse=True)
            if task.status_count.get("failed")
        ]


def names(rows: Sequence[LegacyHost]) -> list[str]:
    """What the rows of a task are known by: the address, and the place among those that have the same or none."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        address = row.host.identity if row.host else ""
        found.append(f"{address}#{seen[address]}" if seen[address] or not address else address)
        seen[address] += 1
    return found


def hosts(view: NodemanView) -> Mapping[Labels, float]:
    return {
        (str(id), task.job_type, status): float(task.status_count.get(status, 0))
        for id, task in _configured(view)
        if task.status_count
        for status in ("success", "failed", "running")
    }


def _configured(view: NodemanView) -> list[tuple[int, TrackedTask]]:
    return [(id, task) for id, task in view.state.tasks.items() if id in view.config.job_ids]


def hosts_by_os(view: NodemanView) -> Mapping[Labels, float]:
    return {
        (str(id), task.job_type, os): float(count)
        for id, task in _configured(view)
        for os, count in task.os_count.items()
    }


NodemanTaskCollector.families = (
    Family(
        "blueking_nodeman_task_hosts",
        "gauge",
        ("job_id", "job_type", "status"),
        "Hosts of a NodeMan 1.x task by status; running holds what waits in the queue too.",
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
    *FAMILIES,
)
