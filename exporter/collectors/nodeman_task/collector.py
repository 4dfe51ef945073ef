"""NodeMan 1.x tasks: hosts by status and system, and which fail with which error code (get_task_info).

A task shows neither a status of its own nor when a host ended, so a host's run is what lies between two returns to an
unfinished status, and its end is that of the task, or when it was seen. Times are unix seconds.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Collector, FailedExecution, Observed, Platforms, Trial
from exporter.collectors.failing_hosts import Run
from exporter.collectors.nodeman import NodemanCollector
from exporter.collectors.nodeman_task.fold import Fold
from exporter.collectors.nodeman_task.metrics import FAMILIES
from exporter.collectors.nodeman_task.state import NAME, TaskRecords, TaskState
from exporter.config.schema import NodemanTaskConfig, ScopeConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family


class NodemanTaskCollector(NodemanCollector[TaskState, NodemanTaskConfig, NodemanLegacyApi]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[TaskState]] = TaskState
    families: ClassVar[tuple[Family, ...]] = FAMILIES

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Collector | None:
        if platforms.nodeman_legacy is None or not config.collectors.nodeman_task.enabled:
            return None
        return cls(config.scope, config.collectors.nodeman_task, platforms.nodeman_legacy, clock)

    async def fetch(self, state: TaskState | None, deadline: Deadline) -> TaskRecords:
        """Read every configured task. A task with a final error is left out, as long as another task can be read.
        Raises `ApiError`."""
        begun = self._clock.platform()
        tasks, errors = await self.ask_each(
            "task", self.config.job_ids, lambda id: self._api.get_task_info(self.biz, id, deadline=deadline)
        )
        now = self._clock.platform()
        return TaskRecords(now, min(begun, now), tasks, errors)

    def observe(self, state: TaskState | None, records: TaskRecords, tally: Tally) -> Observed[TaskState]:
        """Fold the records of a poll."""
        return Fold(self.config, state, records, tally).result()

    async def probe(self, state: TaskState, deadline: Deadline) -> Trial:
        """One call per task and interval."""
        return Trial(len(self.config.job_ids) * 86400.0 / self.interval)

    def url(self, run: Run) -> str:
        """None: NodeMan 1.x has no page of one task."""
        return ""

    def failed_executions(self, state: TaskState) -> list[FailedExecution]:
        """Tasks with failed hosts, newest first."""
        return [
            FailedExecution(id, task.job_type, "failed", None)
            for id, task in sorted(state.tasks.items(), reverse=True)
            if task.status_count.get("failed")
        ]
