"""NodeMan 1.x tasks: hosts by status and system, and which fail with which error code (get_task_info).

A task shows neither a status of its own nor when a host ended, so a host's run is what lies between two returns to an
unfinished status, and its end is that of the task, or when it was seen. Times are unix seconds.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.pacing import Deadline
from exporter.collectors.base import FailedExecution, Trial
from exporter.collectors.nodeman import NodemanCollector
from exporter.collectors.nodeman_task.fold import Fold
from exporter.collectors.nodeman_task.metrics import FAMILIES
from exporter.collectors.nodeman_task.state import NAME, TaskRecords, TaskState
from exporter.config.schema import NodemanTaskConfig
from exporter.metrics.family import Family


class NodemanTaskCollector(NodemanCollector[TaskState, NodemanTaskConfig, NodemanLegacyApi, TaskRecords]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[TaskState]] = TaskState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    fold: ClassVar[type[Fold]] = Fold

    async def fetch(self, state: TaskState | None, deadline: Deadline) -> TaskRecords:
        """Read every configured task. A task with a final error is left out, as long as another task can be read.
        Raises `ApiError`."""
        begun = self._clock.platform()
        tasks, errors = await self.ask_each(
            "task", self.config.job_ids, lambda id: self._api.get_task_info(self.biz, id, deadline=deadline)
        )
        now = self._clock.platform()
        return TaskRecords(now, min(begun, now), tasks, errors)

    async def probe(self, state: TaskState, deadline: Deadline) -> Trial:
        """One call per task and interval."""
        return Trial(len(self.config.job_ids) * 86400.0 / self.interval)

    def failed_executions(self, state: TaskState) -> list[FailedExecution]:
        """Tasks with failed hosts, newest first."""
        return [
            FailedExecution(id, task.job_type, "failed", None)
            for id, task in sorted(state.tasks.items(), reverse=True)
            if task.status_count.get("failed")
        ]
