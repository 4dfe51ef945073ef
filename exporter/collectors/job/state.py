"""The state of the JOB collector, the records of a poll, and what a row means for a known execution.

Times are ms since the epoch as the platform gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import msgspec

from exporter.blueking.job import Execution, ExecutionStatus
from exporter.clock import DOUBTED
from exporter.collectors.base import CollectorState, FailedCall
from exporter.collectors.failing_hosts import FailingHosts
from exporter.config.schema import Watch
from exporter.model import Outcome, job_outcome, name_matches


def ms(value: float) -> int:
    return round(value * 1000)


def seconds(value: int | None) -> float | None:
    return None if value is None else value / 1000


AHEAD = ms(DOUBTED)
"""A time further ahead of the known clock than that clock may be wrong lies in the future."""
END_AWAITED = 300_000
"""ms for which an end time may come later than the status."""
EARLY_START = 86_400_000
"""A start so long before the creation, or longer, is no time."""
FORGOTTEN_WITHIN = 300_000
"""ms for which an execution that has left the window is kept, unless the state changes for another reason."""
RESUMABLE = frozenset({11, 13})
"""Statuses besides failures from which JOB takes an execution up again: stopped, refused by a person."""

Odd = tuple[str, str]
"""A value that cannot be used: the dotted name of its field, and the value as text."""


class Tracked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one execution.

    `counted`: its present run has been counted as finished, or the execution as lost. `timed`: it has had its first
    end. `baseline_end`: steps that ended up to then are not counted. `steps`: step → execute_count whose results have
    been counted; None while none of its runs was to be examined. `start_time`: only of one that is not `counted`.
    `asked_while_running`: how many times its steps and hosts have been asked for while one of them was still running.
    `examined_end`: end of the newest run whose hosts have all been read. `end_awaited`: until when an end time is
    looked for that was not there when the run was counted.
    """

    create_time: int
    status: int
    end_time: int | None
    counted: bool
    timed: bool
    task_type: int
    launch_mode: int
    plan_id: int
    name: str
    baseline_end: int | None = None
    steps: dict[int, int] | None = None
    start_time: int | None = None
    asked_while_running: int = 0
    examined_end: int | None = None
    end_awaited: int | None = None

    @property
    def outcome(self) -> Outcome | None:
        return job_outcome(self.status, self.end_time is not None)

    @property
    def deferred(self) -> bool:
        """It has ended and waits to be examined, to be counted then."""
        return not self.counted and self.outcome is not None

    @property
    def may_run_again(self) -> bool:
        """Whether a user may retry it or take it up again."""
        return self.counted and (self.outcome == "failure" or self.status in RESUMABLE)

    @property
    def waits(self) -> bool:
        """Whether something of its present run is still to come: its end, the time of its end, results."""
        return not self.counted or self.asked_while_running > 0 or self.end_awaited is not None


class Ended(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All that is kept of the usual execution, which has ended, was counted and will not run again: enough to tell that
    the next poll lists the same run."""

    create_time: int
    status: int
    end_time: int

    @classmethod
    def of(cls, known: Tracked) -> Ended | None:
        """The short form; None for an execution of which more has to be kept."""
        if not known.timed or known.waits or known.may_run_again or known.outcome is None or known.end_time is None:
            return None
        if known.steps is not None or known.baseline_end is not None or known.examined_end is not None:
            return None
        return cls(known.create_time, known.status, known.end_time)

    def tracked(self, row: Execution) -> Tracked:
        """The long form, for a row of this execution."""
        return Tracked(
            *(self.create_time, self.status, self.end_time, True, True),
            *(row.task_type, row.launch_mode, row.plan_id, ""),
        )


class Watched(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The newest ends of the executions that one `watch` entry matches (ms by outcome), and the newest duration
    (ms) with the end of the execution that it was measured on."""

    last_finished: dict[str, int] = {}
    measured_at: int = 0
    duration: int | None = None


class JobState(CollectorState, frozen=True, kw_only=True):
    """`begin`: what was created before it has been seen, and is forgotten unless it may still change; ms. `newest`: the
    highest id that was seen. `unreadable`: milliseconds since `begin` that the platform could not give completely.
    `checked`, `checked_failing`: when executions that may run again, and those among them that hold a failing host,
    were last looked for; ms.

    An execution is in one of three places. `resumable_executions` have ended and may run again; they are looked through
    when they are checked. `ended_executions` have ended and are listed again; they are looked up by id only. All
    others, and all of a state of an older build, are in `executions`, which every poll looks through.
    """

    TIMES: ClassVar[frozenset[str]] = CollectorState.TIMES | {"begin", "checked", "checked_failing"}

    begin: int
    newest: int = 0
    unreadable: frozenset[int] = frozenset()
    executions: dict[int, Tracked]
    hosts: FailingHosts
    last_finished: dict[str, int]
    watched: dict[str, Watched]
    checked: int = msgspec.field(name="looked")
    checked_failing: int = msgspec.field(name="looked_holders")
    resumable_executions: dict[int, Tracked] = msgspec.field(default_factory=dict)
    ended_executions: dict[int, Ended] = msgspec.field(default_factory=dict)

    def tracked(self) -> Iterator[tuple[int, Tracked]]:
        """Every execution of which more than its end is kept, with its id."""
        return itertools.chain(self.executions.items(), self.resumable_executions.items())

    def known(self, row: Execution) -> Tracked | None:
        """What is known of the execution of a row."""
        known = self.executions.get(row.id) or self.resumable_executions.get(row.id)
        if known is None and (ended := self.ended_executions.get(row.id)) is not None:
            return ended.tracked(row)
        return known


class JobRecords(msgspec.Struct, frozen=True):
    """The records of one poll.

    `rows`: rows with something new, with known times (see `news`); `odd`: values in them that cannot be used.
    `examined`: status answers by id; `unexamined`: executions that ended and whose status cannot be had; `deferred`:
    those that are examined by a later poll. `gone`: tracked ids that the platform no longer knows. `checked`,
    `checked_failing`: see `JobState`.
    """

    begin: int
    end: int
    now: int
    rows: dict[int, Execution]
    odd: tuple[Odd, ...] = ()
    gap: float = 0.0
    unreadable: frozenset[int] = frozenset()
    without_id: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    examined: dict[int, ExecutionStatus] = {}
    unexamined: frozenset[int] = frozenset()
    deferred: frozenset[int] = frozenset()
    errors: tuple[FailedCall, ...] = ()
    checked: bool = False
    checked_failing: bool = False
    more: bool = False

    @property
    def nothing_new(self) -> bool:
        """Whether only the times differ from those of an empty poll."""
        return not (
            self.rows
            or self.odd
            or self.gap
            or self.unreadable
            or self.without_id
            or self.gone
            or self.examined
            or self.unexamined
            or self.deferred
            or self.errors
            or self.more
        )

    @property
    def size(self) -> int:
        """See `Records`."""
        return len(self.rows) + sum(len(step.results) for answer in self.examined.values() for step in answer.steps)


def news(
    state: JobState | None, rows: Iterable[Execution], now: int
) -> tuple[dict[int, Execution], dict[int, list[Odd]]]:
    """The rows with something new, with known times, and the odd times in them, both by id.

    Most rows of a poll contain nothing new, because windows overlap: for these one look-up has to do.
    """
    found: dict[int, Execution] = {}
    odd: dict[int, list[Odd]] = {}
    if state is None:
        for row in rows:
            found[row.id], odd[row.id] = known_times(row, now)
        return found, odd
    begin, newest, latest = state.begin, state.newest, now + AHEAD
    executions, resumable, ended_executions = state.executions, state.resumable_executions, state.ended_executions
    for row in rows:
        id, created, end = row.id, row.create_time, row.end_time
        ended = ended_executions.get(id)
        if ended is not None and ended.end_time == end and ended.status == row.status and ended.create_time == created:
            continue
        known = executions.get(id) or resumable.get(id)
        if known is None and ended is not None:
            known = ended.tracked(row)
        if known is None or known.create_time != created:
            # What was created before `begin` and is not tracked has been counted and forgotten, unless its id is new.
            if created < begin and id <= newest:
                continue
        elif not _may_differ(known, row) or not _differs(known, known_times(row, now)[0]):
            continue
        start = row.start_time
        if start is None or end is None or not (0 < start <= latest and 0 < end <= latest) or start < created:
            row, odd[id] = known_times(row, now)
        found[id] = row
    return found, odd


def _may_differ(known: Tracked, row: Execution) -> bool:
    """Quick check: False for the usual row, which equals what is known."""
    same = known.status == row.status and known.end_time == row.end_time
    return not same or not (known.counted or (known.outcome is None and known.start_time == row.start_time))


def _differs(known: Tracked, row: Execution) -> bool:
    outcome = job_outcome(row.status, row.end_time is not None)
    if known.deferred or known.status != row.status or known.outcome != outcome:
        return True
    if outcome is None:
        return not known.counted and row.start_time not in (None, known.start_time)
    return row.end_time not in (None, known.end_time)


def must_forget(ended: Mapping[int, Ended], begin: int) -> bool:
    """Whether executions have left the window so long ago that they are forgotten although nothing else changes.

    Only the first one is looked at. It was listed before all others, so none of them waits much longer.
    """
    first = next(iter(ended.values()), None)
    return first is not None and first.create_time < begin - FORGOTTEN_WITHIN


def known_times(row: Execution, now: int) -> tuple[Execution, list[Odd]]:
    """The row with None in place of invalid times, and the odd ones among these.

    0 and less are no times. A start long before the creation and times in the future are no times either, and odd.
    """
    odd: list[Odd] = []
    start, end = known_time(row.start_time, now), known_time(row.end_time, now)
    if start is not None and start < row.create_time - EARLY_START:
        start = None
    for field, given, known in (("job.start_time", row.start_time, start), ("job.end_time", row.end_time, end)):
        if given is not None and given > 0 and known is None:
            odd.append((field, number_text(given)))
    if (start, end) == (row.start_time, row.end_time):
        return row, odd
    return msgspec.structs.replace(row, start_time=start, end_time=end), odd


def known_time(value: int | None, now: int) -> int | None:
    """The time, or None if it is invalid: at or before the epoch, or in a future that the platform cannot know."""
    return value if value is not None and 0 < value <= now + AHEAD else None


def number_text(number: int) -> str:
    """A number as text for a label or the log. A meaningful number has at most 64 bits."""
    return str(number) if -(2**63) <= number < 2**63 else "other"


Transition = Literal["none", "running", "finished", "again"]
"""What a row is for an execution: nothing new, (still or again) unfinished, its run has ended, another run has begun
and ended."""


def transition(known: Tracked | None, row: Execution) -> Transition:
    """What `row`, with known times, means after what is known of its execution."""
    if known is not None and known.create_time != row.create_time:
        known = None  # a reused id: another execution
    if job_outcome(row.status, row.end_time is not None) is None:
        # What was counted without having ended was given up: it stays lost.
        return "none" if known and known.counted and known.outcome is None else "running"
    if known is None or not known.counted:
        return "finished"
    changed = known.end_time is not None and row.end_time is not None and row.end_time != known.end_time
    return "again" if changed else "none"


def group(of: Execution | Tracked) -> str:
    """The plan, or the name of an ad-hoc run. A success is asked for its hosts only if its group has failing hosts."""
    return f"plan:{of.plan_id}" if of.plan_id > 0 else f"name:{of.name}"


def selects(host_results: str, outcome: Outcome | None) -> bool:
    """Whether the configuration wants the hosts of a run with this outcome to be counted."""
    return host_results == "all" or (host_results == "failed" and outcome == "failure")


def matches(entry: Watch, plan_id: int, name: str) -> bool:
    """Whether an execution belongs to a `watch` entry."""
    if entry.job_plan_id is not None:
        return plan_id == entry.job_plan_id
    return entry.name is not None and name_matches(name, entry.name)


def end_order(row: Execution) -> tuple[int, int]:
    return (row.end_time or row.create_time, row.id)
