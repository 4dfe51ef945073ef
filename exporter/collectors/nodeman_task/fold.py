"""How the records of a poll become counts: the fold of the NodeMan 1.x task collector. Times are unix seconds."""

from __future__ import annotations

import msgspec

from exporter.blueking.nodeman_legacy import LegacyHost, LegacyTask
from exporter.collectors.base import Observed
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import NodemanFold
from exporter.collectors.nodeman_task.state import NAME, TaskRecords, TaskState, TrackedTask, names
from exporter.config.schema import NodemanTaskConfig
from exporter.model import NODEMAN_STATUSES


class Fold(NodemanFold[TaskState, NodemanTaskConfig, TaskRecords]):
    """See `NodemanFold`."""

    def result(self) -> Observed[TaskState]:
        records = self.records
        before = self.state.tasks if self.state else {}
        # A task without an answer is not shown.
        tasks = {
            id: msgspec.structs.replace(before[id], status_count={}, os_count={})
            for id in self.config.job_ids
            if id in before
        }
        for id, task in records.tasks.items():
            tasks[id] = self._task(id, task, before.get(id))
        hosts = self.fold_hosts(records.now, settled=self.config.failing_host_ttl)
        return Observed(
            TaskState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.watermark,
                hosts=hosts,
                tasks=tasks,
            ),
            unknown=tuple(self.unknown),
            errors=records.errors,
        )

    def _task(self, id: int, task: LegacyTask, known: TrackedTask | None) -> TrackedTask:
        hosts: dict[str, str] = {}
        before = known.hosts if known else {}
        if known and None not in (known.start_time, task.start_time) and known.start_time != task.start_time:
            before = {}
        self._note_negative(task, known)
        for name, row in zip(names(task.hosts), task.hosts, strict=True):
            hosts[name] = row.status
            if known and row.status == before.get(name):
                continue
            if row.status not in NODEMAN_STATUSES:
                self.unknown.append(("nodeman_task.status", row.status))
            self._take(id, task, row, counts=known is not None)
        return TrackedTask(task.job_type, task.status_count, task.os_count, hosts, task.start_time)

    def _note_negative(self, task: LegacyTask, known: TrackedTask | None) -> None:
        for field in ("status_count", "os_count"):
            before = getattr(known, field) if known else {}
            for name, count in getattr(task, field).items():
                if count < 0 and count != before.get(name):
                    self.unknown.append((f"nodeman_task.{field}", str(count)))

    def _take(self, id: int, task: LegacyTask, row: LegacyHost, *, counts: bool) -> None:
        """Count a host that has just failed, and keep the result of a host that has just ended."""
        if row.status not in ("failed", "success"):
            return
        now = self.records.now
        labels = (NAME, task.job_type, row.step, row.err_code) if row.status == "failed" else None
        if labels and counts:
            self.count_failure(labels)
        if row.host:
            end = now if task.end_time is None else min(now, float(task.end_time))
            self.results.append(HostResult(row.host, id, "", end, labels))
