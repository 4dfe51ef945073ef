"""The state of the NodeMan 1.x task collector, and the records of a poll. Times are unix seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from exporter.blueking.nodeman_legacy import LegacyHost, LegacyTask
from exporter.collectors.base import FailedCall
from exporter.collectors.nodeman import NodemanState

NAME = "nodeman_task"


class TrackedTask(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a task. `hosts`: the last status of each host, by `names`. `start_time` tells another task with
    the same id."""

    job_type: str
    status_count: dict[str, int]
    os_count: dict[str, int]
    hosts: dict[str, str]
    start_time: float | None = None


class TaskState(NodemanState, frozen=True, kw_only=True):
    """By task id."""

    tasks: dict[int, TrackedTask]


class TaskRecords(msgspec.Struct, frozen=True):
    """What one poll, begun at `watermark`, brought by task id; `errors` of the tasks that are missing in it."""

    now: float
    watermark: float
    tasks: dict[int, LegacyTask]
    errors: tuple[FailedCall, ...]

    @property
    def size(self) -> int:
        """See `Records`."""
        return sum(len(task.hosts) for task in self.tasks.values())


def names(rows: Sequence[LegacyHost]) -> list[str]:
    """A unique name for each row of a task: the address, and a number among rows with the same address or none."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        address = row.host.identity if row.host else ""
        found.append(f"{address}#{seen[address]}" if seen[address] or not address else address)
        seen[address] += 1
    return found
