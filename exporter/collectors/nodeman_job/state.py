"""The state of the NodeMan job collector, the records of a poll, and what a row means. Times are unix seconds.

A run of a job is its list of tasks: a retry appends a task. Retrying a single node appends none and shows only as a
return to an unfinished status.
"""

from __future__ import annotations

import msgspec

from exporter.blueking.nodeman_jobs import HostRow, Job, Statistics
from exporter.blueking.nodeman_subscriptions import Instance
from exporter.collectors.nodeman import NodemanState, RunRecords, ended, known_end
from exporter.config.schema import NodemanJobConfig

NAME = "nodeman_job"

FAILED = ("failed", "part_failed")
"""Statuses of a job that has failed."""
SETTLING = 90.0
"""Seconds for which a job must say that it has succeeded, as long as it has no task and only ignored instances."""
MAX_UNFINISHED_AGE = 7 * 86400.0
"""Seconds after its start when a job that has never ended is forgotten. The platform leaves some pending for ever."""


class TrackedJob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a job.

    `counted`: its present run has been counted as finished. `timed`: the duration of its first run has been observed,
    or never will be. `finished`: end of the newest run. `failed`: end of each failed host that is known, 0 where the
    platform gave none; `failures`: the failed hosts in the statistics when the hosts were last read. `last_checked`:
    when its details were last read for what the list does not show. `host_running`: a host that was listed as failed
    said that it is running. `success_since`: see `provisional_since`. `unread`: its hosts are still to be read.
    `history`: its present run ended before the baseline. `new`: the job was first seen after the baseline, so no host
    of it failed before.
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
    last_checked: float = 0.0
    host_running: bool = False
    success_since: float | None = None
    unread: bool = False
    history: bool = False
    new: bool = False


class NodemanJobState(NodemanState, frozen=True, kw_only=True):
    """`floor`: a job with an id up to this one that is not in `jobs` is not watched any more; None before jobs have
    been discovered. `born`: time of the baseline; a host that failed before it is not counted. `unreadable`: see
    `NodemanJobRecords`."""

    floor: int | None
    born: float
    jobs: dict[int, TrackedJob]
    unreadable: dict[int, int] = msgspec.field(default_factory=dict)


class MissedRun(msgspec.Struct, frozen=True):
    """A run that ended and was retried since the last poll. `counter`: its instances by status, None if they cannot be
    read; `failed`: the failed ones."""

    counter: dict[str, int] | None = None
    failed: tuple[Instance, ...] = ()


class NodemanJobRecords(RunRecords[int, Job, HostRow]):
    """`rows`: those that `is_news` lets through. `floor`: see `NodemanJobState`. `missed`: runs that nobody has seen
    end, by job. `from_details`: jobs whose row comes from the details, not from the list. `unreadable`: how many rows
    of the list cannot be read, by the next older job; `without_id`: how many of them have no usable id."""

    now: float = 0.0
    floor: int | None = None
    missed: dict[int, list[MissedRun]] = msgspec.field(default_factory=dict)
    from_details: set[int] = msgspec.field(default_factory=set)
    unreadable: dict[int, int] = msgspec.field(default_factory=dict)
    without_id: int = 0


def provisional_since(known: TrackedJob | None, row: Job, now: float) -> float | None:
    """Since when a job has reported success although it has no task and only ignored instances.

    The platform reports this if somebody reads the job before its task exists; the job then runs nevertheless.
    """
    statistics = row.statistics
    if row.status != "success" or row.task_ids or statistics is None or not 0 < statistics.ignored == statistics.total:
        return None
    if known and known.success_since is not None:
        return known.success_since
    end = known_end(row.end_time, now)
    return now if end is None else min(end, now)


def has_ended(known: TrackedJob | None, row: Job, now: float) -> bool:
    """Whether the row shows a job whose run has ended; a provisional success ends it after `SETTLING`."""
    since = provisional_since(known, row, now)
    return ended(row.status, row.end_time) and (since is None or now - since >= SETTLING)


def is_new_run(known: TrackedJob, row: Job) -> bool:
    """Whether the row shows another run than the one that is known."""
    if known.task_ids and not set(row.task_ids) <= set(known.task_ids):
        return True
    return known.counted and not ended(row.status, row.end_time)


def is_news(known: TrackedJob | None, row: Job) -> bool:
    """Whether a row of the list may change anything: what is known of the job, what has been counted, or what is to be
    read."""
    return (
        known is None
        or known.statistics != row.statistics
        or known.status != row.status
        or known.end_time != row.end_time
        or known.start_time != row.start_time
        or known.task_ids != row.task_ids
        or known.job_type != row.job_type
        # It waits for time to pass, or for its hosts to be read.
        or known.success_since is not None
        or known.unread
        or known.host_running
        or known.failures != failures(row)
    )


def is_same_job(known: TrackedJob | None, row: Job) -> bool:
    """Whether the id still names the job that is known: it does not when the job was created at another time."""
    return known is not None and (None in (known.start_time, row.start_time) or known.start_time == row.start_time)


def missed_tasks(known: TrackedJob | None, row: Job) -> list[int]:
    """The tasks, but for the newest, whose run has not been counted: it was retried since the last poll.

    Whether such a run has ended is not known yet: a retry may come while a run goes on.
    """
    if row.end_time is None:
        return []
    new = sorted(set(row.task_ids) - set(known.task_ids if known else ()))
    if known and known.task_ids and not known.counted and new:
        new.insert(0, max(known.task_ids))
    return new[:-1]


def was_retried_unseen(known: TrackedJob, row: Job) -> bool:
    """Whether a run ended, and went on in the same task, since the last poll.

    Where the platform names no task, an end with ignored instances may be that of a provisional success.
    """
    first_end = not known.counted and known.end_time is None and row.end_time is not None
    if not first_end or ended(row.status, row.end_time) or set(row.task_ids) != set(known.task_ids):
        return False
    return bool(row.task_ids) or (row.statistics is not None and not row.statistics.ignored)


def failures(row: Job) -> int:
    """Failed hosts by the statistics; these may be negative after a retry."""
    statistics = row.statistics
    return max(0, statistics.failed) if statistics else 0


def is_abandoned(row: Job | TrackedJob, now: float) -> bool:
    """Whether an unfinished job that has never ended began so long ago that it is not watched."""
    return row.end_time is None and row.start_time is not None and row.start_time < now - MAX_UNFINISHED_AGE


def is_past(job: TrackedJob, now: float, config: NodemanJobConfig) -> bool:
    """Whether it ended too long ago for a retry to be expected."""
    return job.counted and job.finished is not None and job.finished < now - config.max_finished_age
