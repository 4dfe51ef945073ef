"""What is known of NodeMan's jobs, what a poll brings, and what a row means. Times are unix seconds."""

from __future__ import annotations

import msgspec

from exporter.blueking.nodeman_jobs import HostRow, Job, Statistics
from exporter.collectors.base import FailedCall
from exporter.collectors.nodeman import NodemanState, ended
from exporter.config.schema import NodemanJobConfig

NAME = "nodeman_job"


class TrackedJob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a job.

    `counted`: its present run has been counted as finished. `timed`: the duration of its first run has been observed,
    or never will be. `finished`: end of the newest run. `failed`: end of each failed host that is known, 0 where the
    platform gave none; `failures`: the failed hosts in the statistics when the hosts were last read. `looked`: when its
    details were last read for what the list does not show.
    """

    job_type: str
    status: str
    task_ids: tuple[int, ...]
    start_time: float | None
    end_time: float | None
    statistics: Statistics | None
    counted: bool
    timed: bool
    finished: float | None = None
    failed: dict[str, float] = {}
    failures: int = 0
    looked: float = 0.0


class NodemanJobState(NodemanState, frozen=True, kw_only=True):
    """`floor`: a job with an id up to this one that is not in `jobs` is not watched any more; None before jobs have
    been discovered. `born`: time of the baseline; a host that failed before it is not counted."""

    floor: int | None
    born: float
    jobs: dict[int, TrackedJob]


class NodemanJobRecords(msgspec.Struct, frozen=True):
    """What one poll, begun at `watermark`, brought.

    `floor`: see `NodemanJobState`. `hosts`: host rows by job, where they were asked for. `unexamined`: jobs whose hosts
    cannot be had. `gone`: jobs that no longer exist. `looked`: jobs whose row comes from the details, not from the
    list.
    """

    now: float
    watermark: float
    floor: int | None
    rows: dict[int, Job]
    hosts: dict[int, tuple[HostRow, ...]]
    unexamined: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    looked: frozenset[int] = frozenset()
    errors: tuple[FailedCall, ...] = ()

    @property
    def size(self) -> int:
        """See `Records`."""
        return len(self.rows) + sum(map(len, self.hosts.values()))


def is_new_run(known: TrackedJob, row: Job) -> bool:
    """Whether the row shows another run than the one that is known."""
    if known.task_ids and not set(row.task_ids) <= set(known.task_ids):
        return True
    return known.counted and not ended(row.status, row.end_time)


def failures(row: Job) -> int:
    return row.statistics.failed if row.statistics else 0


def is_past(job: TrackedJob, now: float, config: NodemanJobConfig) -> bool:
    """Whether it ended too long ago for a retry to be expected."""
    return job.counted and job.finished is not None and job.finished < now - config.max_finished_age
