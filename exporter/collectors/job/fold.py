"""How the records of a poll become counts: the fold of the JOB collector."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import lru_cache

import msgspec

from exporter.blueking.job import Execution, ExecutionStatus, Step
from exporter.collectors.base import GAP, TRUNCATED, Observed
from exporter.collectors.failing_hosts import FailingHosts, HostResult
from exporter.collectors.job.state import (
    FUTURE,
    JobRecords,
    JobState,
    Tracked,
    Watched,
    end_order,
    group,
    known_end,
    matches,
    ms,
    selects,
    turn,
)
from exporter.config.schema import JobConfig
from exporter.metrics.counts import Tally
from exporter.metrics.family import Labels
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
    host_reason,
    job_outcome,
    job_status_slug,
)

CREATED = "blueking_job_executions_created_total"
FINISHED = "blueking_job_executions_finished_total"
REOPENED = "blueking_job_executions_reopened_total"
LOST = "blueking_job_executions_lost_total"
DURATION = "blueking_job_execution_duration_seconds"
STEP_FAILURES = "blueking_job_step_failures_total"
HOST_RESULTS = "blueking_job_host_results_total"
HOST_FAILURES = "blueking_job_host_failures_total"
EXIT_CODES = "blueking_job_host_exit_codes_total"


class Fold:
    """One application of records to a state: the mutable side of `observe`, thrown away after `result`."""

    def __init__(self, config: JobConfig, state: JobState | None, records: JobRecords, tally: Tally) -> None:
        self.config = config
        self.state = state
        self.records = records
        self.tally = tally
        self.executions = dict(state.executions) if state else {}
        self.last_finished = dict(state.last_finished) if state else {}
        self.watched = dict(state.watched) if state else {}
        self.hosts: list[HostResult] = []
        self.unknown: list[tuple[str, str]] = []

    def result(self) -> Observed[JobState]:
        self._born_at_zero()
        for row in sorted(self.records.rows.values(), key=end_order):
            if self.state is None:
                self._register(row)
            else:
                self._count(row)
        for id in self.records.gone:
            known = self.executions.pop(id)
            if known.deferred:
                self._count_deferred(known)
            elif not known.counted:
                self.tally.inc(LOST)
        records, state = self.records, self.state
        hosts = (state.hosts if state else FailingHosts()).fold(
            self.hosts, now=records.now / 1000, ttl=self.config.failing_host_ttl, settled=self._settled() / 1000
        )
        self._forget({streak.run for streak in hosts.streaks.values()})
        known_unreadable = state.unreadable if state else frozenset()
        self.unknown += [("job.job_instance_id", "beyond 64 bits") for _ in records.without_id - known_unreadable]
        if records.gap:
            self.tally.inc(GAP, by=records.gap)
        if truncated := records.truncated + len(records.unreadable - known_unreadable):
            self.tally.inc(TRUNCATED, by=truncated)
        self.tally.rebucket(DURATION, self.config.duration_buckets)
        return Observed(
            JobState(
                counts=self.tally.freeze(),
                last_success=self.tally.now,
                watermark=records.end / 1000,
                begin=records.begin,
                newest=max(records.rows, default=0) if state is None else max(state.newest, *records.rows, 0),
                unreadable=frozenset(at for at in known_unreadable | records.unreadable if at >= records.begin),
                executions=self.executions,
                hosts=hosts,
                last_finished=self.last_finished,
                watched=self.watched,
                looked=records.now if state is None or records.looked else state.looked,
                looked_holders=records.now if state is None or records.looked_holders else state.looked_holders,
            ),
            unknown=tuple(self.unknown),
            errors=records.errors,
            more=records.more,
        )

    def _settled(self) -> int:
        """Results from before it are all known: one that is still to come may be as old as its execution."""
        open_ended = (
            known.create_time for known in self.executions.values() if not known.counted or known.outcome == "failure"
        )
        return min([self.records.begin, *open_ended])

    def _born_at_zero(self) -> None:
        for family in (REOPENED, LOST, HOST_RESULTS, GAP, TRUNCATED):
            self.tally.zero(family)
        for task_type in TASK_TYPES.values():
            for launch_mode in LAUNCH_MODES.values():
                self.tally.zero(CREATED, (task_type, launch_mode))
                for status in ("success", "failed"):
                    self.tally.zero(FINISHED, (task_type, launch_mode, status))

    def _register(self, row: Execution) -> None:
        """A baseline: what has finished is known, and not counted."""
        ended = turn(None, row) == "finished"
        self.executions[row.id] = self._tracked(row, counted=ended, timed=ended)
        if ended:
            self._mark_finished(row, first=True)

    def _count(self, row: Execution) -> None:
        known = self.executions.get(row.id)
        if known is None:
            self._count_created(row)
        elif known.deferred:
            known = self._without_deferred(known, row)
        what = turn(known, row)
        if row.status not in JOB_STATUSES and what != "none" and (known is None or known.status != row.status):
            self.unknown.append(("job.status", str(row.status)))
        if what == "running" or row.id in self.records.deferred:
            if known and known.counted:
                self.tally.inc(REOPENED)
                known = msgspec.structs.replace(known, prior_end=known.end_time or known.prior_end)
            # Whatever ends next is not the first end, even if that was never told.
            timed = bool(known and (known.timed or known.counted))
            self.executions[row.id] = self._tracked(row, known, counted=False, timed=timed)
        elif what == "none":
            assert known is not None
            self._fill_in_end(known, row)
        else:
            if known and known.counted:
                self.tally.inc(REOPENED)
                known = msgspec.structs.replace(known, prior_end=known.end_time)
            self._finish(known, row)

    def _count_created(self, row: Execution) -> None:
        if row.task_type not in TASK_TYPES:
            self.unknown.append(("job.type", str(row.task_type)))
        if row.launch_mode not in LAUNCH_MODES:
            self.unknown.append(("job.launch_mode", str(row.launch_mode)))
        self.tally.inc(CREATED, _created_labels(row.task_type, row.launch_mode))

    def _without_deferred(self, known: Tracked, row: Execution) -> Tracked:
        """A run that ended, waited to be examined, and was run again before: counted as it is."""
        counted = msgspec.structs.replace(known, counted=True)
        if turn(counted, row) == "none":
            return known
        self._count_deferred(known)
        return counted

    def _count_deferred(self, known: Tracked) -> None:
        self.tally.inc(FINISHED, _finished_labels(known.task_type, known.launch_mode, known.status))
        self.tally.inc(TRUNCATED)

    def _finish(self, known: Tracked | None, row: Execution) -> None:
        self.tally.inc(FINISHED, _finished_labels(row.task_type, row.launch_mode, row.status))
        timed = bool(known and known.timed)
        if not timed and row.end_time is not None:
            self._observe_duration(row)
        self._mark_finished(row, first=not timed)
        steps = self._fold_status(known, row)
        self.executions[row.id] = self._tracked(
            row, known, counted=True, timed=timed or row.end_time is not None, steps=steps
        )

    def _fill_in_end(self, known: Tracked, row: Execution) -> None:
        """The same run; an end time that was null at first may be there now."""
        if known.end_time is None and row.end_time is not None:
            if not known.timed:
                self._observe_duration(row)
            self._mark_finished(row, first=not known.timed)
            self.executions[row.id] = msgspec.structs.replace(known, end_time=row.end_time, timed=True)

    def _observe_duration(self, row: Execution) -> None:
        """From start to end, unless one of them is missing or they contradict each other."""
        start, end = row.start_time, row.end_time
        if start is None or end is None:
            return
        if 0 <= start <= end <= self.records.now + FUTURE:
            labels, value = (task_type_slug(row.task_type),), (end - start) / 1000
            self.tally.observe(DURATION, labels, value, self.config.duration_buckets, row.id)
        else:
            self.unknown.append(("job.end_time", str(end)))

    def _mark_finished(self, row: Execution, *, first: bool) -> None:
        outcome = job_outcome(row.status, row.end_time is not None)
        end = known_end(row.end_time, self.records.now)
        if outcome is None or end is None:
            return
        if end > self.last_finished.get(outcome, -1):
            self.last_finished[outcome] = end
        for entry in self.config.watch:
            if not matches(entry, row.plan_id, row.name):
                continue
            old = self.watched.get(entry.job_name, Watched())
            ends = old.last_finished | {outcome: max(end, old.last_finished.get(outcome, end))}
            measured_at, duration = old.measured_at, old.duration
            if first and row.start_time is not None and 0 <= row.start_time <= end and end >= measured_at:
                measured_at, duration = end, end - row.start_time
            self.watched[entry.job_name] = Watched(ends, measured_at, duration)

    def _fold_status(self, known: Tracked | None, row: Execution) -> dict[int, int] | None:
        """Count the steps and hosts of an examined execution that have not been counted; what has been by now."""
        answer = self.records.examined.get(row.id)
        if answer is None:
            return known.steps if known else None
        steps = dict(known.steps or {}) if known else {}
        if selects(self.config.host_results, row):
            for step in answer.steps:
                if self._is_new(step, steps, known):
                    self._count_step(step, row)
                    steps[step.id] = step.execute_count
        self.hosts += host_results(answer, row, self.records.now)
        return steps or None

    def _is_new(self, step: Step, steps: Mapping[int, int], known: Tracked | None) -> bool:
        if job_outcome(step.status, step.end_time is not None) is None:
            return False
        if step.id in steps:
            return step.execute_count > steps[step.id]
        # A run before the first one that was examined (a baseline's, say) is not this run's to count.
        before = known.prior_end if known and known.steps is None else None
        return before is None or step.end_time is None or step.end_time > before

    def _count_step(self, step: Step, row: Execution) -> None:
        step_type = STEP_TYPES.get(step.step_type, UNKNOWN)
        if step_type == UNKNOWN:
            self.unknown.append(("job.step.type", str(step.step_type)))
        if step.status not in JOB_STATUSES:
            self.unknown.append(("job.step.status", str(step.status)))
        if job_outcome(step.status, step.end_time is not None) == "failure":
            self.tally.inc(STEP_FAILURES, (step_type,))
        for result in step.results:
            if result.status not in HOST_WAITING:
                self.tally.inc(HOST_RESULTS)
            if not is_failure(result.status):
                continue
            self.tally.inc(HOST_FAILURES, self._code_labels(result.status), exemplar=row.id)
            if step_type == "script" and result.exit_code is not None:
                self.tally.inc(EXIT_CODES, (code_text(result.exit_code),))

    def _code_labels(self, code: int) -> Labels:
        reason = host_reason(code)
        if reason != UNKNOWN_CODE:
            return (str(code), reason)
        self.unknown.append(("job.host.status", code_text(code)))
        return (code_text(code), reason)

    def _tracked(
        self,
        row: Execution,
        known: Tracked | None = None,
        *,
        counted: bool,
        timed: bool,
        steps: dict[int, int] | None = None,
    ) -> Tracked:
        ended = job_outcome(row.status, row.end_time is not None)
        return Tracked(
            row.create_time,
            row.status,
            row.end_time if ended else None,
            counted,
            timed,
            row.task_type,
            row.launch_mode,
            row.plan_id,
            "" if ended == "success" else row.name,
            known.prior_end if known else None,
            steps if steps is not None or known is None else known.steps,
        )

    def _forget(self, holders: Set[int]) -> None:
        """Keep what can still be listed, what has not ended, and what may be retried: failed executions for a time, and
        those of the failing hosts as long as these fail."""
        now, begin = self.records.now, self.records.begin
        reopen, age = ms(self.config.reopen_window), ms(self.config.max_unfinished_age)
        kept: dict[int, Tracked] = {}
        for id, known in self.executions.items():
            if known.counted and known.create_time >= begin:
                kept[id] = known
                continue
            old = now - known.create_time > age
            # During a catch-up nobody has looked whether it has ended.
            if old and not (known.counted or known.deferred or self.records.more):
                self.tally.inc(LOST)
                known = msgspec.structs.replace(known, counted=True, timed=True)
                retry = False
            else:
                recent = now - (known.end_time or known.create_time) < reopen
                retry = known.counted and known.outcome == "failure" and (recent or id in holders)
            if not known.counted or retry or known.create_time >= begin:
                kept[id] = known
        self.executions = kept


def host_results(answer: ExecutionStatus, row: Execution, now: int) -> list[HostResult]:
    """The result of each host of an execution in the last step that it takes part in. `now`: platform's time, ms."""
    newest: dict[str, HostResult | None] = {}
    of, labels = group(row.plan_id, row.name), _LabelsOfCode()
    for step in answer.steps:
        ends = (known_end(end, now) for end in (step.end_time, row.end_time, now))
        otherwise = next(end for end in ends if end is not None)
        for result in step.results:
            status = result.status
            host = None if status in HOST_WAITING else result.host
            if host is None:
                continue
            if status == HOST_ALREADY_SUCCEEDED:
                newest[host.identity] = None
            else:
                end = known_end(result.end_time, now)
                end = otherwise if end is None else end
                newest[host.identity] = HostResult(host, row.id, of, end / 1000, labels[status])
    return [result for result in newest.values() if result is not None]


class _LabelsOfCode(dict[int, Labels | None]):
    """The labels of a host status code, None for a success; one tuple per code, however many hosts have it."""

    def __missing__(self, code: int) -> Labels | None:
        self[code] = labels = (code_text(code), host_reason(code)) if is_failure(code) else None
        return labels


def code_text(code: int) -> str:
    """A status or exit code as a label: no number that a platform can mean has more than 64 bits."""
    return str(code) if -(2**63) <= code < 2**63 else "other"


def is_failure(code: int) -> bool:
    """Whether a host result is a failure, unknown codes included."""
    return code not in HOST_WAITING and code not in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)


def task_type_slug(number: int) -> str:
    return TASK_TYPES.get(number, UNKNOWN)


def launch_mode_slug(number: int) -> str:
    return LAUNCH_MODES.get(number, UNKNOWN)


# The same few come again and again, and three tables and a tuple cost as much as counting.


@lru_cache(maxsize=1024)
def _created_labels(task_type: int, launch_mode: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode))


@lru_cache(maxsize=1024)
def _finished_labels(task_type: int, launch_mode: int, status: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode), job_status_slug(status))
