"""A simulated JOB: executions that run by a script, over the time of a clock.

A discrete-event simulation without a background task: every method first carries out the events that are due, in the
order of time. So it works in real, fast and virtual time, and events may lie in the past. Times inside are
milliseconds since the epoch; arguments called `duration`, `…_for` or `after` are seconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.model import HOST_ALREADY_SUCCEEDED, HOST_SUCCESS, HOST_WAITING, Host, Scope, job_outcome
from exporter.simulator.ledger import (
    DEFAULT,
    Attempt,
    Change,
    Exporter,
    HostResult,
    Ledger,
    Record,
    Refusal,
    Truth,
)

PENDING, RUNNING, SUCCESS, FAILED, IGNORED, WAITING_USER, STOPPING, STOPPED, ABANDONED, ROLLING_WAITING = (
    1, 2, 3, 4, 6, 7, 10, 11, 14, 15,
)  # fmt: skip
FAILURES = frozenset({4, 9})
ENDING_STEPS = frozenset({8, 11, 13})
"""Statuses of a step with which a user ended the whole execution."""
APPROVAL = 3
WITH_EXIT_CODE = frozenset({1, 4})
HOST_PENDING, HOST_RUNNING, FORCE_STOPPED = 5, 7, 403
DEFAULT_EXIT_CODES = {HOST_SUCCESS: 0, 104: 1}
NEVER_STARTED = frozenset({1, 2, 12, 18, 310, 311, 312})
"""Results of targets on which the agent never started: they have no times and no exit code."""

Outcome = int | tuple[int, int | None]
"""A host result code, or (code, exit code)."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a step runs: a host, or a container if `container` is set. `bk_host_id` None: a row without such an id."""

    bk_host_id: int | None = None
    ip: str | None = None
    bk_cloud_id: int = 0
    ipv6: str | None = None
    container: int | None = None

    @property
    def host(self) -> Host | None:
        """Who it is on /metrics, None for a container."""
        if self.container is not None:
            return None
        host_id = "" if self.bk_host_id is None else str(self.bk_host_id)
        return Host(str(self.bk_cloud_id), host_id, self.ip or self.ipv6 or "")


def target(number: int, bk_cloud_id: int = 0) -> Target:
    """An ordinary IPv4 host: number 1 is host id 101 at 10.0.0.1."""
    return Target(100 + number, f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", bk_cloud_id)


@dataclass(frozen=True)
class StepScript:
    """What one step does.

    `step_type`: 1 script, 2 file, 3 approval (the execution waits for a user for `duration`), 4 SQL. `duration` may be
    math.inf. `results`: the result of each target. `status`: how the step ends, by default failed (4) if a target
    failed, else success (3). `ignore_error`: a failure becomes status 6 and the execution continues. `rolling_wait`:
    it waits half-way for so many seconds in status 15, with half of the targets done. `settles_late`: when the
    execution ends with this step, the step and half of its targets still show running for so many seconds, or for ever
    (math.inf).
    """

    step_type: int = 1
    duration: float = 3.0
    results: Mapping[Target, Outcome] = field(default_factory=dict)
    name: str = "step"
    status: int | None = None
    ignore_error: bool = False
    rolling_wait: float | None = None
    settles_late: float = 0.0


@dataclass(slots=True)
class Result:
    """One target of a step, as the platform stores it."""

    target: Target
    status: int = HOST_PENDING
    exit_code: int | None = None
    start_time: int | None = None
    end_time: int | None = None


@dataclass(slots=True)
class Step:
    """One step of an execution, as the platform stores it: its newest attempt."""

    id: int
    script: StepScript
    create_time: int
    results: list[Result]
    status: int = PENDING
    execute_count: int = 0
    start_time: int | None = None
    end_time: int | None = None
    planned: Mapping[Target, Outcome] = field(default_factory=dict)


@dataclass(frozen=True)
class Deviation:
    """What the platform shows wrongly about one execution.

    `start_time`: shown instead of the true start, ms. `end_time_late`: the end is written so many seconds after the
    status; until then it is null, or 0 with `zero_end`. `end_time_ahead`: seconds by which the end lies in the future.
    `status_refused`: a request for its status is refused. `look_up_refused`: the list shows it by its creation time
    only; a request by its id is refused, and lists of one status do not contain it.
    """

    start_time: int | None = None
    end_time_late: float = 0.0
    zero_end: bool = False
    end_time_ahead: float = 0.0
    status_refused: Refusal = ""
    look_up_refused: bool = False


NO_DEVIATION = Deviation()


@dataclass(slots=True)
class Execution:
    """A job instance, as the platform stores it."""

    id: int
    scope: Scope
    name: str
    operator: str
    task_type: int
    launch_mode: int
    plan_id: int
    template_id: int
    create_time: int
    visible_from: int
    steps: list[Step]
    outcome: int | None
    stopping_for: float
    deviation: Deviation
    status: int = PENDING
    start_time: int | None = None
    end_time: int | None = None
    gone: bool = False
    generation: int = 0
    """Events that were planned for an earlier generation are dropped."""


class JobWorld:
    """All executions of one platform. `now`: unix seconds. `speed` affects the traffic of `populate` only: so many
    times more executions, so many times shorter. Raises KeyError for an execution that does not exist."""

    def __init__(
        self,
        seed: int = 1,
        now: Callable[[], float] = time.time,
        *,
        scopes: Iterable[Scope] = (Scope("biz", "2"),),
        speed: float = 1.0,
    ) -> None:
        self.seed = seed
        self.speed = speed
        self.scopes = list(scopes)
        self.ledger = Ledger()
        self.flowing = True
        """Whether the traffic of `populate` goes on."""
        self._now = now
        self._keep_ms = math.inf
        self._forget_at = math.inf
        self._at = int(now() * 1000)
        self._advancing = False
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._order = random.Random(f"{seed} order")
        self._executions: dict[int, Execution] = {}
        self._history: dict[Scope, list[tuple[int, int]]] = {}
        self._next_id = 20_000_000_000
        self._next_step_id = 70_000_000

    # Reading

    @property
    def time(self) -> int:
        """Now, or the time of the event that is being carried out; milliseconds."""
        return self._at if self._advancing else int(self._now() * 1000)

    def advance(self) -> None:
        """Carry out the events that are due."""
        if self._advancing:
            return
        limit = int(self._now() * 1000)
        self._advancing = True
        try:
            while self._events and self._events[0][0] <= limit:
                self._at, _, event = heapq.heappop(self._events)
                event()
        finally:
            self._advancing = False
        if limit >= self._forget_at:
            self._forget(limit)

    def keep_for(self, seconds: float) -> None:
        """From now on drop ended executions that were created longer ago than this, also from the ledger."""
        self._keep_ms = seconds * 1000
        self._forget_at = self.time

    def _forget(self, now: int) -> None:
        self._forget_at = now + self._keep_ms / 10
        limit = now - int(self._keep_ms)
        for history in self._history.values():
            count = bisect.bisect_left(history, (limit, 0))
            kept = [entry for entry in history[:count] if not self._ended(self._executions[entry[1]])]
            for entry in set(history[:count]).difference(kept):
                del self._executions[entry[1]]
            history[:count] = kept
        self.ledger.forget(limit, self._executions.keys())

    @staticmethod
    def _ended(row: Execution) -> bool:
        return row.gone or job_outcome(row.status, row.end_time is not None) is not None

    def between(self, scope: Scope, begin: int, end: int) -> list[Execution]:
        """The visible executions created in [begin, end], newest first; those with the same time in random order."""
        self.advance()
        history, now = self._history.get(scope, []), self.time
        first, last = bisect.bisect_left(history, (begin, 0)), bisect.bisect_left(history, (end + 1, 0))
        found = (self._executions[number] for _, number in history[first:last])
        rows = [row for row in found if not row.gone and row.visible_from <= now]
        rows.reverse()
        start = 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop].create_time != rows[start].create_time:
                if stop - start > 1:
                    tied = rows[start:stop]
                    self._order.shuffle(tied)
                    rows[start:stop] = tied
                start = stop
        return rows

    def find(self, scope: Scope, execution: int) -> Execution | None:
        """One visible execution of this scope; None if there is none."""
        self.advance()
        row = self._executions.get(execution)
        return row if row and row.scope == scope and not row.gone and row.visible_from <= self.time else None

    def truth(
        self, scope: Scope, since_ms: int = 0, until_ms: int | None = None, exporter: Exporter = DEFAULT
    ) -> Truth:
        """`Ledger.truth`, until now by default."""
        self.advance()
        return self.ledger.truth(scope, since_ms, self.time if until_ms is None else until_ms, exporter)

    # What happens

    def start(
        self,
        scope: Scope,
        *,
        name: str = "restart-app",
        operator: str = "admin",
        task_type: int = 1,
        launch_mode: int = 2,
        plan_id: int | None = None,
        steps: Sequence[StepScript] = (StepScript(),),
        create_time: int | None = None,
        visible_from: int | None = None,
        pending_for: float = 0.0,
        outcome: int | None = None,
        stopping_for: float = 2.0,
        deviation: Deviation = NO_DEVIATION,
        reused_id: int | None = None,
    ) -> int:
        """Start an execution now, or at `create_time` in the past or future; returns its id.

        `visible_from`: the list knows it only from then on, by default from its creation, but not before this call.
        `outcome`: the terminal status, by default failed when a step failed, else success; 14 (abandoned) never starts,
        11 (stopped) passes through stopping. `reused_id`: the id of an earlier execution, which is gone from now on.
        """
        self.advance()
        created = self.time if create_time is None else create_time
        visible = max(created, self.time) if visible_from is None else visible_from
        if reused_id is None:
            number = self._next_id = self._next_id + 1
        else:
            number = reused_id
            self.vanish(number)
            old = self._executions[number]
            self._history[old.scope].remove((old.create_time, number))
        plan = plan_id if plan_id is not None else (1_000_001 if task_type == 0 else -1)
        execution = Execution(
            number, scope, name, operator, task_type, launch_mode, plan, plan + 500_000 if plan > 0 else -1,
            created, visible, [self._step(script, created, task_type) for script in steps],
            outcome, stopping_for, deviation,
        )  # fmt: skip
        self._executions[number] = execution
        bisect.insort(self._history.setdefault(scope, []), (created, number))
        self.ledger.created(
            Record(
                number, scope, name, plan, task_type, launch_mode, created, visible,
                deviation.status_refused, deviation.look_up_refused,
            )
        )  # fmt: skip
        self._enter(execution, PENDING, at=created)
        self._later(execution, created + pending_for * 1000, functools.partial(self._begin, execution))
        self.advance()
        return number

    def retry(
        self,
        execution: int,
        *,
        duration: float = 3.0,
        results: Mapping[Target, Outcome] | None = None,
        all_hosts: bool = False,
    ) -> None:
        """A user retries the failed step; if none failed, the last step that was reached.

        Targets that had succeeded are not run again and show 3, unless `all_hosts`. `results`: the results of the
        targets this time; targets that are not named succeed. `duration` 0: it ends before anybody can see that it
        runs.
        """
        self.advance()
        row = self._executions[execution]
        row.generation += 1
        reached = [index for index, step in enumerate(row.steps) if step.start_time is not None]
        failed = [index for index in reached if row.steps[index].status in FAILURES]
        index = (failed or reached or [0])[-1]
        step, given = row.steps[index], results or {}
        kept = {} if all_hosts else {
            result.target: HOST_ALREADY_SUCCEEDED
            for result in step.results
            if result.status in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)
        }  # fmt: skip
        planned = {result.target: given.get(result.target, HOST_SUCCESS) for result in step.results}
        old_end, row.end_time = row.end_time, None
        row.outcome = None
        step.execute_count += 1
        at = self.time
        if old_end is not None and at + int(duration * 1000) <= old_end:
            at = old_end + 1  # the same millisecond twice would be no new end
        self._enter_step(row, index, {**planned, **kept}, duration, at=at)
        self._enter(row, RUNNING, at=at)
        self.advance()

    def ignore_error(self, execution: int) -> None:
        """A user ignores the error of the failed step: the execution continues with the next step."""
        self.advance()
        row = self._executions[execution]
        row.generation += 1
        index = next(index for index, step in enumerate(row.steps) if step.status in FAILURES)
        row.steps[index].status = IGNORED
        row.end_time = None
        self._enter(row, RUNNING)
        self._next_step(row, index)
        self.advance()

    def stop(self, execution: int, *, after: float = 2.0) -> None:
        """A user stops an execution: its status is stopping, `after` seconds later stopped."""
        self.advance()
        row = self._executions[execution]
        row.generation += 1
        for step in row.steps:
            if step.start_time is not None and step.end_time is None:
                step.status = STOPPING
        self._enter(row, STOPPING)
        self._later(row, self.time + after * 1000, functools.partial(self._stopped, row))
        self.advance()

    def vanish(self, execution: int) -> None:
        """Archive an execution: it is not listed any more, and its id is unknown."""
        self.advance()
        row = self._executions[execution]
        row.generation += 1
        row.gone = True
        self.ledger.changed(row.id, Change(self.time, row.status, gone=True))

    def set_status(
        self, execution: int, status: int, *, start_time: int | None = None, end_time: int | None = None
    ) -> None:
        """Set status and end time of an execution, and its start time if given. Its planned events are dropped."""
        self.advance()
        row = self._executions[execution]
        row.generation += 1
        row.end_time = end_time
        if start_time is not None:
            row.start_time = start_time
        self._enter(row, status)

    def at(self, moment: int, event: Callable[[], None]) -> None:
        """Carry out `event` at a time (ms). Methods that it calls use that time."""
        self._sequence += 1
        heapq.heappush(self._events, (moment, self._sequence, event))

    def populate(self, *, history: float = 3600.0) -> None:
        """Start traffic in every scope, `history` seconds of it in the past, until `calm`. See traffic.py."""
        from exporter.simulator.traffic import populate

        populate(self, history=history)

    def calm(self) -> None:
        """The traffic of `populate` starts nothing new. What has started continues to its end, including retries."""
        self.advance()
        self.flowing = False

    # The life of an execution

    def _step(self, script: StepScript, created: int, task_type: int) -> Step:
        self._next_step_id += 1
        # The targets of a plan's step are known when it starts, those of an ad-hoc run from the beginning.
        targets = script.results if task_type != 0 else ()
        results = [Result(target) for target in targets]
        return Step(self._next_step_id, script, created, results, planned=script.results)

    def _later(self, row: Execution, at: float, event: Callable[[], None]) -> None:
        """Schedule an event of an execution. It is dropped if a user changes the execution before. `at`: ms or inf."""
        if math.isinf(at):
            return
        generation = row.generation

        def happen() -> None:
            if row.generation == generation:
                event()

        self.at(round(at), happen)

    def _enter(self, row: Execution, status: int, *, at: int | None = None) -> None:
        row.status = status
        change = Change(self.time if at is None else at, status, row.start_time, row.end_time)
        if change.ended:
            attempts = tuple(_attempt(step) for step in row.steps if step.start_time is not None)
            change = dataclasses.replace(change, attempts=attempts)
        self.ledger.changed(row.id, change)

    def _begin(self, row: Execution) -> None:
        if row.outcome == ABANDONED:
            self._finish(row, ABANDONED)
            return
        row.start_time = self.time if row.deviation.start_time is None else row.deviation.start_time
        self._enter(row, RUNNING)
        script = row.steps[0].script
        self._enter_step(row, 0, script.results, script.duration)

    def _enter_step(
        self, row: Execution, index: int, planned: Mapping[Target, Outcome], duration: float, *, at: int | None = None
    ) -> None:
        step, start = row.steps[index], self.time if at is None else at
        before = {result.target: result for result in step.results}
        step.planned, step.start_time, step.end_time = planned, start, None
        step.status = WAITING_USER if step.script.step_type == APPROVAL else RUNNING
        step.results = []
        for place, (where, outcome) in enumerate(planned.items()):
            if outcome == HOST_ALREADY_SUCCEEDED and where in before:
                result = before[where]
                result.status = HOST_ALREADY_SUCCEEDED
            elif step.script.rolling_wait is not None and place >= (len(planned) + 1) // 2:
                result = Result(where)
            else:
                result = Result(where, HOST_RUNNING, start_time=start)
            step.results.append(result)
        if step.script.step_type == APPROVAL:
            self._enter(row, WAITING_USER, at=start)
        end = start + duration * 1000
        if step.script.rolling_wait is not None and step.execute_count == 0:
            half, wait = start + duration * 500, step.script.rolling_wait * 1000
            self._later(row, half, functools.partial(self._roll, step, ROLLING_WAITING))
            self._later(row, half + wait, functools.partial(self._roll, step, RUNNING))
            end += wait
        self._later(row, end, functools.partial(self._end_step, row, index))

    def _roll(self, step: Step, status: int) -> None:
        """Between two batches: the step waits, or continues."""
        step.status = status
        if status == ROLLING_WAITING:
            _settle(step, self.time, [result for result in step.results if result.status == HOST_RUNNING])
        for result in step.results:
            if status == RUNNING and result.status == HOST_PENDING:
                result.status, result.start_time = HOST_RUNNING, self.time

    def _end_step(self, row: Execution, index: int) -> None:
        step, script, now = row.steps[index], row.steps[index].script, self.time
        unfinished = [result for result in step.results if result.status in HOST_WAITING]
        _settle(step, now, unfinished)
        step.end_time = now
        step.status = FAILED if any(_is_failure(result.status) for result in step.results) else SUCCESS
        if script.status is not None and step.execute_count == 0:
            step.status = script.status
        elif step.status == FAILED and script.ignore_error:
            step.status = IGNORED
        last = step.status in FAILURES or index + 1 == len(row.steps)
        if script.settles_late and step.execute_count == 0 and last:
            self._end_before_its_step(row, index, unfinished)
        elif step.status in FAILURES:
            self._finish(row, FAILED if row.outcome is None else row.outcome)
        elif step.status in ENDING_STEPS:
            self._finish(row, step.status)
        else:
            self._next_step(row, index)

    def _end_before_its_step(self, row: Execution, index: int, results: Sequence[Result]) -> None:
        """The execution has ended with this step, but the step and half of its targets show it later."""
        step, late = row.steps[index], results[(len(results) + 1) // 2 :]
        status, end = step.status, step.end_time
        told = [(result, result.status, result.end_time) for result in late]
        step.status, step.end_time = RUNNING, None
        for result in late:
            result.status, result.end_time = HOST_RUNNING, None
        by_default = FAILED if status in FAILURES else SUCCESS
        self._finish(row, by_default if row.outcome is None else row.outcome)

        def settle() -> None:
            step.status, step.end_time = status, end
            for result, code, ended in told:
                result.status, result.end_time = code, ended
            self._enter(row, row.status)

        self._later(row, self.time + step.script.settles_late * 1000, settle)

    def _next_step(self, row: Execution, index: int) -> None:
        if index + 1 == len(row.steps):
            self._finish(row, SUCCESS if row.outcome is None else row.outcome)
            return
        if row.status == WAITING_USER:
            self._enter(row, RUNNING)
        script = row.steps[index + 1].script
        self._enter_step(row, index + 1, script.results, script.duration)

    def _finish(self, row: Execution, status: int) -> None:
        end = self.time
        if status == STOPPED and row.status != STOPPING:
            self._enter(row, STOPPING)
            self._later(row, end + row.stopping_for * 1000, functools.partial(self._stopped, row))
            return
        deviation = row.deviation
        if deviation.end_time_late:
            row.end_time = 0 if deviation.zero_end else None
            self._enter(row, status)
            self._later(row, end + deviation.end_time_late * 1000, functools.partial(self._write_end_time, row, end))
            return
        row.end_time = end + int(deviation.end_time_ahead * 1000)
        self._enter(row, status)

    def _write_end_time(self, row: Execution, end: int) -> None:
        row.end_time = end
        self._enter(row, row.status)

    def _stopped(self, row: Execution) -> None:
        for step in row.steps:
            if step.start_time is not None and step.end_time is None:
                step.status, step.end_time = STOPPED, self.time
                for result in step.results:
                    if result.status in HOST_WAITING:
                        result.status, result.end_time = FORCE_STOPPED, self.time
        self._finish(row, STOPPED)


def _settle(step: Step, now: int, results: Sequence[Result]) -> None:
    """Set the planned results of the targets, one after another until now."""
    assert step.start_time is not None
    for place, result in enumerate(results, 1):
        planned = step.planned[result.target]
        result.status, result.exit_code = planned if isinstance(planned, tuple) else (planned, None)
        if result.status in NEVER_STARTED:
            result.start_time = result.end_time = None
            continue
        start = step.start_time if result.start_time is None else result.start_time
        result.start_time, result.end_time = start, start + (now - start) * place // len(results)
        if not isinstance(planned, tuple) and step.script.step_type in WITH_EXIT_CODE:
            result.exit_code = DEFAULT_EXIT_CODES.get(result.status)


def _is_failure(code: int) -> bool:
    return code not in HOST_WAITING and code not in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)


def _attempt(step: Step) -> Attempt:
    results = tuple(
        HostResult(result.target.host, result.status, result.exit_code, result.end_time) for result in step.results
    )
    return Attempt(step.id, step.execute_count, step.script.step_type, step.status, step.end_time, results)
