"""What is known of JOB's executions: the state, what a poll brings, and what a row means after what is known.

Times are ms since the epoch as the platform gives them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from exporter.blueking.job import Execution, ExecutionStatus
from exporter.collectors.base import CollectorState, FailedCall
from exporter.collectors.failing_hosts import FailingHosts
from exporter.config.schema import Watch
from exporter.model import Outcome, job_outcome, name_matches

FUTURE = 86_400_000
"""ms: an end further ahead of the platform's own clock is a broken number, not a time."""


class Tracked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one execution. `counted`: its present run has been counted as finished. `timed`: it has had
    its first end. `prior_end`: end of the run before this one. `steps`: step → execute_count whose results have been
    counted."""

    create_time: int
    status: int
    end_time: int | None
    counted: bool
    timed: bool
    task_type: int
    launch_mode: int
    plan_id: int
    name: str
    prior_end: int | None = None
    steps: dict[int, int] | None = None

    @property
    def outcome(self) -> Outcome | None:
        return job_outcome(self.status, self.end_time is not None)

    @property
    def deferred(self) -> bool:
        """It has ended and waits to be examined, to be counted then."""
        return not self.counted and self.outcome is not None


class Watched(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The newest ends of the executions that one `watch` entry matches (ms by outcome), and the newest duration
    (ms)."""

    last_finished: dict[str, int] = {}
    measured_at: int = 0
    duration: int | None = None


class JobState(CollectorState, frozen=True, kw_only=True):
    """`begin`: what was created before it has been seen, and is forgotten unless it may still change; ms. `newest`: the
    highest id that was seen. `unreadable`: milliseconds since `begin` that the platform could not give completely."""

    begin: int
    newest: int = 0
    unreadable: frozenset[int] = frozenset()
    executions: dict[int, Tracked]
    hosts: FailingHosts
    last_finished: dict[str, int]
    watched: dict[str, Watched]
    looked: int
    looked_holders: int


class JobRecords(msgspec.Struct, frozen=True):
    """What one poll brought. `rows`: those that say something new; `examined`: status answers by id; `unexamined`:
    finished ones whose status cannot be had; `deferred`: finished ones that are examined by a later poll; `gone`:
    tracked ids that the platform no longer knows."""

    begin: int
    end: int
    now: int
    rows: dict[int, Execution]
    gap: float = 0.0
    unreadable: frozenset[int] = frozenset()
    without_id: frozenset[int] = frozenset()
    truncated: int = 0
    gone: frozenset[int] = frozenset()
    examined: dict[int, ExecutionStatus] = {}
    unexamined: frozenset[int] = frozenset()
    deferred: frozenset[int] = frozenset()
    errors: tuple[FailedCall, ...] = ()
    looked: bool = False
    looked_holders: bool = False
    more: bool = False

    @property
    def size(self) -> int:
        """See `Records`."""
        return len(self.rows) + sum(len(step.results) for answer in self.examined.values() for step in answer.steps)


Turn = Literal["none", "running", "finished", "again"]
"""What a row is for an execution: nothing new, (still or again) unfinished, its run has ended, another run has begun
and ended."""


def turn(known: Tracked | None, row: Execution) -> Turn:
    """What `row` means after what is known of its execution."""
    ended = job_outcome(row.status, row.end_time is not None) is not None
    if not ended:
        # What was counted without having ended was given up: it stays lost.
        return "none" if known and known.counted and known.outcome is None else "running"
    if known is None or not known.counted:
        return "finished"
    changed = known.end_time is not None and row.end_time is not None and row.end_time != known.end_time
    return "again" if changed else "none"


def is_news(state: JobState, row: Execution) -> bool:
    """Whether `row` says something that is not known. Most rows of a poll do not: windows overlap."""
    known = state.executions.get(row.id)
    if known is None:
        # What was created before `begin` and is not tracked has been counted and forgotten, unless its id is new.
        return row.create_time >= state.begin or row.id > state.newest
    return known.status != row.status or known.end_time != row.end_time or known.deferred


def group(plan_id: int, name: str) -> str:
    """What a success must share with a failure to be worth asking for its hosts: the plan, or the name of an ad-hoc
    run."""
    return f"plan:{plan_id}" if plan_id > 0 else f"name:{name}"


def selects(host_results: str, row: Execution) -> bool:
    """Whether the configuration wants the hosts of a run that has ended."""
    if host_results == "all":
        return True
    return host_results == "failed" and job_outcome(row.status, row.end_time is not None) == "failure"


def matches(entry: Watch, plan_id: int, name: str) -> bool:
    """Whether an execution belongs to a `watch` entry."""
    if entry.job_plan_id is not None:
        return plan_id == entry.job_plan_id
    return entry.name is not None and name_matches(name, entry.name)


def known_end(end: int | None, now: int) -> int | None:
    """An end time, unless it is none: before the epoch, or in a future that the platform cannot know of."""
    return end if end is not None and 0 <= end <= now + FUTURE else None


def end_order(row: Execution) -> tuple[int, int]:
    return (row.end_time or row.create_time, row.id)


def ms(value: float) -> int:
    return round(value * 1000)


def seconds(value: int | None) -> float | None:
    return None if value is None else value / 1000
