"""How the records of a poll become counts: the fold of the JOB collector. Times are ms since the epoch."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from functools import lru_cache
from typing import TypeVar

import msgspec

from exporter.blueking.job import Execution, ExecutionStatus, Step
from exporter.collectors.base import GAP, TRUNCATED, FinishedRun, Observed
from exporter.collectors.failing_hosts import FailingHosts, HostResult, Run
from exporter.collectors.job.state import (
    END_AWAITED,
    Ended,
    JobRecords,
    JobState,
    Odd,
    Tracked,
    Watched,
    end_order,
    group,
    known_time,
    matches,
    ms,
    must_forget,
    number_text,
    seconds,
    selects,
    transition,
)
from exporter.config.schema import JobConfig
from exporter.metrics.bounds import MOST_VALUES, OTHER
from exporter.metrics.counts import Tally
from exporter.metrics.family import Exemplar, Labels
from exporter.model import (
    HOST_ALREADY_SUCCEEDED,
    HOST_SUCCESS,
    HOST_WAITING,
    JOB_STATUSES,
    LAUNCH_MODES,
    STEP_TYPES,
    TASK_TYPES,
    UNKNOWN,
    UNKNOWN_CODE,
    Outcome,
    host_reason,
    job_outcome,
    job_status_slug,
)

CREATED = "blueking_job_executions_created_total"
FINISHED = "blueking_job_executions_finished_total"
REOPENED = "blueking_job_executions_reopened_total"
LOST = "blueking_job_executions_lost_total"
DURATION = "blueking_job_execution_duration_seconds"
WAIT = "blueking_job_execution_wait_seconds"
STEP_FAILURES = "blueking_job_step_failures_total"
HOST_RESULTS = "blueking_job_host_results_total"
HOST_FAILURES = "blueking_job_host_failures_total"
EXIT_CODES = "blueking_job_host_exit_codes_total"

T = TypeVar("T")

_ENDED_WELL = frozenset(status for status, known in JOB_STATUSES.items() if known.outcome == "success")

_PAIRS = [(task_type, launch_mode) for task_type in TASK_TYPES.values() for launch_mode in LAUNCH_MODES.values()]
_BORN_AT_ZERO: Mapping[str, Set[Labels]] = {
    **dict.fromkeys((REOPENED, LOST, HOST_RESULTS, GAP, TRUNCATED), frozenset({()})),
    CREATED: frozenset(_PAIRS),
    FINISHED: frozenset((*pair, status) for pair in _PAIRS for status in ("success", "failed")),
}

STEP_RUNNING = frozenset({2, 10})
"""Step statuses that will change although the execution has ended: running, stopping. A step that waits or has not
begun may stay so for ever."""
HOST_RUNNING = 7
ASKED_AGAIN = 5
"""Polls that ask again for the steps of an execution that has ended while one of them was still running."""


class Fold:
    """One application of records to a state: the mutable side of `observe`, thrown away after `result`."""

    def __init__(self, config: JobConfig, state: JobState | None, records: JobRecords, tally: Tally) -> None:
        self.config = config
        self.state = state
        self.records = records
        self.tally = tally
        self.changed: dict[int, Tracked | None] = {}
        """By id; None for those that are forgotten."""
        self.ended: dict[int, Ended] = {}
        self.last_finished = dict(state.last_finished) if state else {}
        self.watched = dict(state.watched) if state else {}
        self.hosts: list[Iterator[HostResult]] = []
        self.failed_hosts: dict[int, Counter[str]] = {}
        """By execution and code; complete when `hosts` have been read."""
        self.finished: list[Execution | tuple[int, Tracked]] = []
        self.reused: list[int] = []
        self.unknown: list[Odd] = list(records.odd)

    def result(self) -> Observed[JobState]:
        records, state = self.records, self.state
        self._born_at_zero()
        self._settle()
        if state is None:
            for row in sorted(records.rows.values(), key=end_order):
                self._register(row)
        elif records.rows:
            for row in sorted(self._count_usual(state), key=end_order):
                self._count(row)
        for id in records.gone:
            known = self._tracked(id)
            assert known is not None
            self._give_up(id, known)
            self.changed[id] = None
        hosts = (state.hosts if state else FailingHosts()).without_runs(self.reused)
        hosts = hosts.fold(
            itertools.chain.from_iterable(self.hosts),
            now=records.now / 1000,
            ttl=self.config.failing_host_ttl,
            # To learn when, all executions are looked through: where no result came, successes may wait.
            settled=self._settled() / 1000 if self.hosts else 0.0,
        )
        executions, resumable, ended = self._executions(hosts.runs())
        self._count_unread()
        for family in (DURATION, WAIT):
            self.tally.rebucket(family, self.config.duration_buckets)
        unreadable = (state.unreadable if state else frozenset()) | records.unreadable
        return Observed(
            JobState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.end / 1000,
                begin=records.begin,
                newest=max(records.rows, default=0) if state is None else max(state.newest, *records.rows, 0),
                unreadable=frozenset(at for at in unreadable if at >= records.begin),
                executions=executions,
                resumable_executions=resumable,
                ended_executions=ended,
                hosts=hosts,
                last_finished=self.last_finished,
                watched=self.watched,
                checked=records.now if state is None or records.checked else state.checked,
                checked_failing=records.now if state is None or records.checked_failing else state.checked_failing,
            ),
            unknown=tuple(self.unknown),
            errors=records.errors,
            more=records.more,
            finished=_finished_runs(self.finished, self.failed_hosts),
        )

    def _born_at_zero(self) -> None:
        counters = self.state.counts.counters if self.state else {}
        for family, born in _BORN_AT_ZERO.items():
            known = counters.get(family, {}).keys()
            # Nearly always all of them exist: nothing is made to find that out.
            for labels in () if known >= born else born - known:
                self.tally.zero(family, labels)

    def _count_unread(self) -> None:
        """Count what could not be read, once however often it is listed."""
        records, known = self.records, self.state.unreadable if self.state else frozenset()
        self.unknown += [("job.job_instance_id", "beyond 64 bits") for _ in records.without_id - known]
        if truncated := len(records.unexamined) + len(records.unreadable - known):
            self.tally.inc(TRUNCATED, by=truncated)
        if records.gap:
            self.tally.inc(GAP, by=records.gap)

    # Executions

    def _register(self, row: Execution) -> None:
        """A baseline: what has finished is known, and neither it nor its steps are ever counted."""
        ended = transition(None, row) == "finished"
        tracked = _tracked(row, None, counted=ended, timed=ended)
        if ended:
            tracked = msgspec.structs.replace(tracked, baseline_end=row.end_time or self.records.now)
            self._mark_finished(row, first=True)
        self.changed[row.id] = _without_name(tracked)

    def _tracked(self, id: int) -> Tracked | None:
        """What is known of an execution that this poll had to look at."""
        if id in self.changed:
            return self.changed[id]
        return (self.state.executions.get(id) or self.state.resumable_executions.get(id)) if self.state else None

    def _count_usual(self, state: JobState) -> list[Execution]:
        """Count the rows of new executions that have ended well and about which nothing is odd: most of them.

        Returns the other rows. Nothing is made for a single row but what is kept of it.
        """
        records, tally, bounds = self.records, self.tally, self.config.duration_buckets
        places = (state.executions, state.resumable_executions, state.ended_executions, self.changed, records.examined)
        special = records.deferred | records.unexamined
        for ids in places:
            special |= records.rows.keys() & ids.keys()
        alike: defaultdict[tuple[int, int, int], list[Execution]] = defaultdict(list)
        for row in records.rows.values():
            alike[row.task_type, row.launch_mode, row.status].append(row)
        begin, ended, usual = records.begin, self.ended, list[Execution]()
        others: list[Execution] = []
        newest: defaultdict[int, dict[int, int]] = defaultdict(dict)
        """The end of the execution that is the exemplar, by task type and bucket."""
        for (task_type, launch_mode, status), rows in alike.items():
            if status not in _ENDED_WELL or task_type not in TASK_TYPES or launch_mode not in LAUNCH_MODES:
                others += rows
                continue
            labels, ends = (task_type_slug(task_type),), newest[task_type]
            count = waited = lasted = 0
            for row in rows:
                id, created, start, end = row.id, row.create_time, row.start_time, row.end_time
                if id in special or start is None or end is None or not created <= start <= end:
                    others.append(row)
                    continue
                if not count:
                    waits, durations = tally.histogram(WAIT, labels, bounds), tally.histogram(DURATION, labels, bounds)
                count += 1
                waited += start - created
                lasted += end - start
                duration = (end - start) / 1000
                bucket = bisect_left(bounds, duration)
                durations.counts[bucket] += 1
                waits.counts[bisect_left(bounds, (start - created) / 1000)] += 1
                last = ends.get(bucket, -1)
                if end > last or (end == last and id > durations.exemplars[bucket].job_instance_id):
                    ends[bucket] = end
                    durations.exemplars[bucket] = Exemplar(id, duration, tally.now)
                if created >= begin:
                    ended[id] = Ended(created, status, end)
                usual.append(row)
            if count:
                # Sums of whole milliseconds are exact.
                waits.sum += waited / 1000
                durations.sum += lasted / 1000
                tally.inc(CREATED, _created_labels(task_type, launch_mode), by=count)
                tally.inc(FINISHED, _finished_labels(task_type, launch_mode, status), by=count)
        if usual:
            self._mark_end("success", max([end for ends in newest.values() for end in ends.values()]))
        # Of two executions that ended at once a watched job shows the last one.
        for row in sorted(usual, key=end_order) if self.config.watch else ():
            self._mark_finished(row, first=True)
        self.finished += usual
        return others

    def _count(self, row: Execution) -> None:
        known = self.changed.get(row.id)
        if known is None and self.state is not None:
            known = self.state.known(row)
        if known is not None and known.create_time != row.create_time:
            self._give_up(row.id, known)
            self.reused.append(row.id)
            known = None
        if known is None:
            self._count_created(row)
        elif known.deferred:
            known = self._without_deferred(known, row)
        what = transition(known, row)
        if row.status not in JOB_STATUSES and what != "none" and (known is None or known.status != row.status):
            self.unknown.append(("job.status", number_text(row.status)))
        if known is None or not (known.counted or known.timed or known.start_time is not None):
            self._observe_wait(row)
        if known is not None and known.counted and what in ("running", "again"):
            known = self._reopened(known)
        if what == "running" or row.id in self.records.deferred:
            # The next end is not the first one, even if the platform never reported the first.
            timed = known is not None and (known.timed or known.counted)
            self.changed[row.id] = _tracked(row, known, counted=False, timed=timed)
        elif what == "none":
            assert known is not None
            self._update_ended(known, row)
        else:
            self._finish(known, row)

    def _count_created(self, row: Execution) -> None:
        if row.task_type not in TASK_TYPES:
            self.unknown.append(("job.type", number_text(row.task_type)))
        if row.launch_mode not in LAUNCH_MODES:
            self.unknown.append(("job.launch_mode", number_text(row.launch_mode)))
        self.tally.inc(CREATED, _created_labels(row.task_type, row.launch_mode))

    def _without_deferred(self, known: Tracked, row: Execution) -> Tracked:
        """A run that ended, waited to be examined, and was run again before: counted as it is."""
        counted = msgspec.structs.replace(known, counted=True)
        if transition(counted, row) == "none":
            return known
        self._count_deferred(row.id, known)
        return counted

    def _count_deferred(self, id: int, known: Tracked) -> None:
        self.tally.inc(FINISHED, _finished_labels(known.task_type, known.launch_mode, known.status))
        self.tally.inc(TRUNCATED)
        self.finished.append((id, known))

    def _give_up(self, id: int, known: Tracked) -> None:
        """The platform no longer knows this execution."""
        if known.deferred:
            self._count_deferred(id, known)
        elif not known.counted:
            self.tally.inc(LOST)
        elif known.asked_while_running:
            self.tally.inc(TRUNCATED)

    def _reopened(self, known: Tracked) -> Tracked:
        """The execution runs again. Results that were still running can no longer be read."""
        self.tally.inc(REOPENED)
        if known.asked_while_running:
            self.tally.inc(TRUNCATED)
        # A run that failed and was not to be examined is that of a baseline, or `host_results` said none.
        unexamined = known.steps is None and known.outcome == "failure"
        baseline_end = (known.end_time if unexamined else None) or known.baseline_end
        return msgspec.structs.replace(known, baseline_end=baseline_end, asked_while_running=0)

    def _finish(self, known: Tracked | None, row: Execution) -> None:
        self.tally.inc(FINISHED, _finished_labels(row.task_type, row.launch_mode, row.status))
        timed = known is not None and known.timed
        if not timed:
            self._observe_duration(row)
        self._mark_finished(row, first=not timed)
        tracked = _tracked(row, known, counted=True, timed=timed or row.end_time is not None)
        if row.end_time is None:
            tracked = msgspec.structs.replace(tracked, end_awaited=self.records.now + END_AWAITED)
        answer = self.records.examined.get(row.id)
        if answer is not None:
            tracked = self._fold_steps(row.id, tracked, answer)
        elif row.id in self.records.unexamined:
            tracked = msgspec.structs.replace(tracked, steps=tracked.steps or {})
        self.changed[row.id] = _without_name(tracked)
        self.finished.append(row)

    def _update_ended(self, known: Tracked, row: Execution) -> None:
        """The same run: an end time that was null at first may be there now, and a status may be another one."""
        if known.end_time is None and not known.timed:
            self._observe_duration(row)
        self._mark_finished(row, first=not known.timed)
        end = row.end_time if known.end_time is None else known.end_time
        timed = known.timed or end is not None
        self.changed[row.id] = _without_name(
            msgspec.structs.replace(
                known,
                status=row.status,
                end_time=end,
                timed=timed,
                end_awaited=known.end_awaited if end is None else None,
            )
        )

    def _observe_wait(self, row: Execution) -> None:
        """From creation to start, when the start of the first run becomes known."""
        if row.start_time is None:
            return
        if row.start_time >= row.create_time:
            self._observe(WAIT, row, (row.start_time - row.create_time) / 1000)
        else:
            self.unknown.append(("job.start_time", number_text(row.start_time)))

    def _observe_duration(self, row: Execution) -> None:
        """From start to end, unless one of them is missing or they contradict each other."""
        if row.start_time is None or row.end_time is None:
            return
        if row.start_time <= row.end_time:
            self._observe(DURATION, row, (row.end_time - row.start_time) / 1000, row.id)
        else:
            self.unknown.append(("job.end_time", number_text(row.end_time)))

    def _observe(self, family: str, row: Execution, value: float, exemplar: int | None = None) -> None:
        self.tally.observe(family, (task_type_slug(row.task_type),), value, self.config.duration_buckets, exemplar)

    def _mark_finished(self, row: Execution, *, first: bool) -> None:
        """Note the newest end of each outcome, and of each watched job. `first`: of the first run of the execution."""
        outcome, end = job_outcome(row.status, row.end_time is not None), row.end_time
        if outcome is None or end is None:
            return
        self._mark_end(outcome, end)
        self._mark_watched(row, outcome, end, first=first)

    def _mark_end(self, outcome: Outcome, end: int) -> None:
        self.last_finished[outcome] = max(end, self.last_finished.get(outcome, end))

    def _mark_watched(self, row: Execution, outcome: Outcome, end: int, *, first: bool) -> None:
        for entry in self.config.watch:
            if not matches(entry, row.plan_id, row.name):
                continue
            old = self.watched.get(entry.job_name, Watched())
            ends = old.last_finished | {outcome: max(end, old.last_finished.get(outcome, end))}
            measured_at, duration = old.measured_at, old.duration
            if first and row.start_time is not None and row.start_time <= end and end >= measured_at:
                measured_at, duration = end, end - row.start_time
            self.watched[entry.job_name] = Watched(ends, measured_at, duration)

    # Steps and hosts

    def _settle(self) -> None:
        """Fold the steps of executions that had ended before while one of them was still running."""
        for id, known in self.state.executions.items() if self.state else ():
            if not known.asked_while_running:
                continue
            row = self.records.rows.get(id)
            if row is not None and transition(known, row) != "none":
                continue
            answer = self.records.examined.get(id)
            if answer is not None:
                self.changed[id] = _without_name(self._fold_steps(id, known, answer))
            elif id in self.records.unexamined:
                self.changed[id] = _without_name(msgspec.structs.replace(known, asked_while_running=0))

    def _fold_steps(self, id: int, known: Tracked, answer: ExecutionStatus) -> Tracked:
        """Count the steps and hosts of an execution that have not been counted, and learn who fails.

        What is still running is left for a later poll; the last one that asks counts what it has until then.
        """
        steps = dict(known.steps or {})
        last = known.asked_while_running >= ASKED_AGAIN
        running = False
        for step in answer.steps:
            results = Counter((result.status, result.exit_code) for result in step.results)
            if step.status in STEP_RUNNING or any(status == HOST_RUNNING for status, _ in results):
                running = True
                if not last:
                    continue
            elif job_outcome(step.status, step.end_time is not None) is None:
                continue  # it waits, or has not begun
            if selects(self.config.host_results, known.outcome) and _is_new(step, known):
                self._count_step(step, results, id)
                steps[step.id] = step.execute_count
        self.hosts.append(self._noting_codes(id, host_results(answer, id, known, self.records.now)))
        if running and last:
            self.tally.inc(TRUNCATED)
        asked_while_running = known.asked_while_running + 1 if running and not last else 0
        examined_end = known.examined_end if asked_while_running else known.end_time
        return msgspec.structs.replace(
            known, steps=steps, asked_while_running=asked_while_running, examined_end=examined_end
        )

    def _noting_codes(self, id: int, results: Iterable[HostResult]) -> Iterator[HostResult]:
        """The results, which are counted by code in `failed_hosts` as they are read."""
        codes = self.failed_hosts[id] = Counter()

        def noted() -> Iterator[HostResult]:
            for result in results:
                if result.labels:
                    code = result.labels[0]
                    codes[code if code in codes or len(codes) < MOST_VALUES else OTHER] += 1
                yield result

        return noted()

    def _count_step(self, step: Step, results: Mapping[tuple[int, int | None], int], id: int) -> None:
        """Count a step; `results`: how many of its targets have which status and exit code."""
        step_type = STEP_TYPES.get(step.step_type, UNKNOWN)
        if step_type == UNKNOWN:
            self.unknown.append(("job.step.type", number_text(step.step_type)))
        if step.status not in JOB_STATUSES:
            self.unknown.append(("job.step.status", number_text(step.status)))
        if job_outcome(step.status, step.end_time is not None) == "failure":
            self.tally.inc(STEP_FAILURES, (step_type,))
        for (status, exit_code), number in results.items():
            if status not in HOST_WAITING:
                self.tally.inc(HOST_RESULTS, by=number)
            if not is_failure(status):
                continue
            code, reason = code_labels(status)
            if reason == UNKNOWN_CODE:
                self.unknown.append(("job.host.status", code))
            self.tally.inc(HOST_FAILURES, (code, reason), by=number, exemplar=id)
            if step_type == "script" and exit_code is not None:
                self.tally.inc(EXIT_CODES, (number_text(exit_code),), by=number)

    # What is kept

    def _settled(self) -> int:
        """All results before this time are known. A result that is still to come may be as old as its execution."""
        places = (self.state.executions, self.state.resumable_executions) if self.state else ()
        executions = itertools.chain(
            (known for known in self.changed.values() if known is not None),
            (known for place in places for id, known in place.items() if id not in self.changed),
        )
        open_ended = (known.create_time for known in executions if known.waits or known.may_run_again)
        return min([self.records.begin, *open_ended])

    def _executions(
        self, runs_of_failing_hosts: Set[Run]
    ) -> tuple[dict[int, Tracked], dict[int, Tracked], dict[int, Ended]]:
        """What is kept, in its three places: executions that can still be listed, and those that have not ended or
        settled; for a time, and as long as a host fails because of them, those that may run again. A place in which
        nothing changes remains the same object.
        """
        begin, changed = self.records.begin, self.changed
        places = (self.state.executions, self.state.resumable_executions) if self.state else ({}, {})
        ended = self.state.ended_executions if self.state else {}
        # Those that may run again are forgotten when they are checked: no more is done about them in between.
        found: dict[int, Tracked | None] = {}
        for place in places if self.records.checked else places[:1]:
            for id, known in place.items():
                if id in changed:
                    continue
                aged = self._aged(id, known, runs_of_failing_hosts)
                if aged is not known or (place is places[0] and _only_may_run_again(known)):
                    found[id] = aged
        changed |= found
        new: tuple[dict[int, Tracked], dict[int, Tracked]] = ({}, {})
        for id, one in changed.items():
            kept = None if one is None else self._aged(id, one, runs_of_failing_hosts)
            if kept is None:
                continue
            if short := Ended.of(kept):
                self.ended[id] = short
            else:
                new[_only_may_run_again(kept)][id] = kept
        moved = self.state is not None and begin > self.state.begin
        # To walk through them and to commit what is left, when nothing else happens, would make quiet polls dear.
        forgets = moved and (bool(changed or self.ended) or must_forget(ended, begin))
        gone = [id for id, known in ended.items() if known.create_time < begin] if forgets else []
        return (
            _replaced(places[0], new[0], changed),
            _replaced(places[1], new[1], changed),
            _replaced(ended, self.ended, [*gone, *changed]),
        )

    def _aged(self, id: int, known: Tracked, runs_of_failing_hosts: Set[Run]) -> Tracked | None:
        """The execution as it is kept now, None if it is forgotten."""
        now, begin = self.records.now, self.records.begin
        if known.counted and not known.waits and known.create_time >= begin:
            return known
        # During a catch-up it has not been checked whether it has ended.
        old = now - known.create_time > ms(self.config.max_unfinished_age)
        if old and not (known.counted or known.deferred or self.records.more):
            self.tally.inc(LOST)
            known = msgspec.structs.replace(known, counted=True, timed=True, start_time=None)
        if known.end_awaited is not None and known.end_awaited <= now:
            known = msgspec.structs.replace(known, end_awaited=None)
        recent = now - (known.end_time or known.create_time) < ms(self.config.reopen_window)
        retried = known.may_run_again and (recent or id in runs_of_failing_hosts)
        return known if known.waits or retried or known.create_time >= begin else None


def _only_may_run_again(known: Tracked) -> bool:
    return known.may_run_again and not known.waits


def _replaced(before: dict[int, T], new: dict[int, T], gone: Collection[int]) -> dict[int, T]:
    """`before` with the new values and without those that are gone; the same object if nothing changes."""
    leaving = {id for id in gone if id in before and id not in new}
    if not new and not leaving:
        return before
    after = before | new
    for id in leaving:
        del after[id]
    return after


def _finished_runs(
    finished: Iterable[Execution | tuple[int, Tracked]], failed_hosts: Mapping[int, Counter[str]]
) -> Iterator[FinishedRun]:
    """In the order of their ends. Made when they are read, which is seldom. The hosts of what has not come as a row of
    this poll were never read."""
    runs = [(one[0], one[1], False) if isinstance(one, tuple) else (one.id, one, True) for one in finished]
    for id, run, was_read in sorted(runs, key=lambda run: (run[1].end_time or run[1].create_time, run[0])):
        failed = job_outcome(run.status, run.end_time is not None) == "failure"
        hosts: Mapping[str, int] = failed_hosts.get(id, {}) if failed and was_read else {}
        start, end = seconds(run.start_time), seconds(run.end_time)
        yield FinishedRun(id, run.name, job_status_slug(run.status), failed, start, end, hosts)


def _tracked(row: Execution, known: Tracked | None, *, counted: bool, timed: bool) -> Tracked:
    ended = job_outcome(row.status, row.end_time is not None) is not None
    start = row.start_time if row.start_time is not None or known is None else known.start_time
    return Tracked(
        row.create_time,
        row.status,
        row.end_time if ended else None,
        counted,
        timed,
        row.task_type,
        row.launch_mode,
        row.plan_id,
        row.name,
        known.baseline_end if known else None,
        known.steps if known else None,
        None if counted else start,
        examined_end=known.examined_end if known else None,
    )


def _without_name(known: Tracked) -> Tracked:
    """Without the name where nothing asks for it any more: most executions succeed."""
    return known if known.outcome != "success" or known.asked_while_running else msgspec.structs.replace(known, name="")


def _is_new(step: Step, known: Tracked) -> bool:
    """Whether the results of a step have not been counted."""
    if known.steps and step.id in known.steps:
        return step.execute_count > known.steps[step.id]
    return known.baseline_end is None or step.end_time is None or step.end_time > known.baseline_end


def host_results(answer: ExecutionStatus, id: int, of: Execution | Tracked, now: int) -> Iterator[HostResult]:
    """The result of each host of an execution in the last step that it takes part in. `now`: platform's time, ms.

    There may be very many: they are read one after another, and of a single step none is remembered.
    """
    execution_group, labels = group(of), _LabelsOfCode()
    read_before = seconds(of.examined_end) if isinstance(of, Tracked) else None
    steps = [step for step in answer.steps if len(step.results)]
    seen: set[str] = set()
    addresses: set[str] = set()
    """Of hosts that came with their id: one without it is the same host."""
    for step in reversed(steps):
        ends = (known_time(end, now) for end in (step.end_time, of.end_time, now))
        otherwise = next(end for end in ends if end is not None)
        for result in reversed(step.results):
            status = result.status
            host = None if status in HOST_WAITING else result.host
            if host is None:
                continue
            if len(steps) > 1:
                identity, address = host.identity, host.address
                if identity in seen or address in (seen if host.bk_host_id else addresses):
                    continue
                seen.add(identity)
                if host.bk_host_id:
                    addresses.add(address)
            if status != HOST_ALREADY_SUCCEEDED:
                end = known_time(result.end_time, now)
                end = otherwise if end is None else end
                yield HostResult(host, id, execution_group, end / 1000, labels[status], read_before)


class _LabelsOfCode(dict[int, Labels | None]):
    """The labels of a host status code, None for a success; one tuple per code, however many hosts have it."""

    def __missing__(self, code: int) -> Labels | None:
        self[code] = labels = code_labels(code) if is_failure(code) else None
        return labels


def code_labels(code: int) -> tuple[str, str]:
    return number_text(code), host_reason(code)


def is_failure(code: int) -> bool:
    """Whether a host result is a failure, unknown codes included."""
    return code not in HOST_WAITING and code not in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)


def task_type_slug(number: int) -> str:
    return TASK_TYPES.get(number, UNKNOWN)


def launch_mode_slug(number: int) -> str:
    return LAUNCH_MODES.get(number, UNKNOWN)


# The same few label sets recur, and building one costs as much as counting.


@lru_cache(maxsize=1024)
def _created_labels(task_type: int, launch_mode: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode))


@lru_cache(maxsize=1024)
def _finished_labels(task_type: int, launch_mode: int, status: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode), job_status_slug(status))
