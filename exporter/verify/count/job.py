"""The plain count of JOB."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import msgspec

from exporter.blueking.job import Execution, ExecutionStatus, JobApi, Step
from exporter.clock import Clock
from exporter.collectors.calls import gather_bounded
from exporter.config.schema import JobConfig, Watch
from exporter.errors import ApiError
from exporter.model import (
    HOST_ALREADY_SUCCEEDED,
    HOST_CODES,
    HOST_SUCCESS,
    HOST_WAITING,
    JOB_STATUSES,
    LAUNCH_MODES,
    STEP_TYPES,
    TASK_TYPES,
    UNKNOWN,
    Host,
    Scope,
    host_reason,
    job_outcome,
    job_status_slug,
)
from exporter.verify.count.base import CONCURRENCY, Finished, Recount, Recounted
from exporter.verify.count.hosts import HostResults, count_failing, labels_of

DURATION = "blueking_job_execution_duration_seconds"
WAIT = "blueking_job_execution_wait_seconds"
UNFINISHED = "blueking_job_executions_unfinished"
OLDEST_UNFINISHED = "blueking_job_oldest_unfinished_timestamp_seconds"
IN_A_ROW = "blueking_job_host_consecutive_failures"
LAST_FINISHED = "blueking_job_last_finished_timestamp_seconds"
WATCHED_LAST_FINISHED = "blueking_job_watched_last_finished_timestamp_seconds"
WATCHED_LAST_DURATION = "blueking_job_watched_last_duration_seconds"
WATCHED_UNFINISHED = "blueking_job_watched_unfinished"
WATCHED_UNFINISHED_SINCE = "blueking_job_watched_unfinished_since_timestamp_seconds"

AHEAD = 300_000
"""ms: a time further ahead of the platform's clock is no time."""
EARLY = 86_400_000
"""ms: a start more than this before the creation is no time."""
SCRIPT = 1
SUCCESS = 3
RUNNING_STEP = frozenset({2, 10})
RUNNING_HOST = 7
RESUMABLE = frozenset({11, 13})
"""Statuses of JOB besides failures from which an execution may run again: stopped, refused by a person."""
V3_CONTAINERS = "1240002"
"""Code of a v3 status with container targets, when it is asked for host results."""


class JobRecount(Recount[JobConfig, JobApi]):
    """`Recount` of JOB: the list of the window with all pages, and the steps of the executions that `host_results`
    selects. Times in ms."""

    what = "execution"

    def __init__(self, scope: Scope, config: JobConfig, api: JobApi, seconds: float, clock: Clock) -> None:
        super().__init__(scope, config, api, seconds, clock)
        self._begin: int | None = None
        self._known: dict[int, Execution] = {}
        """What the first poll saw."""
        self._seen: dict[int, list[Execution]] = {}
        """What later polls saw of an execution, as often as it changed."""
        self._answers: dict[int, list[ExecutionStatus]] = {}

    def note(self, records: Any) -> None:
        if self._begin is None:
            self._begin, self._known = records.begin, dict(records.rows)
            return
        for id, row in records.rows.items():
            self._seen.setdefault(id, []).append(row)
        for id, answer in records.examined.items():
            self._answers.setdefault(id, []).append(answer)

    async def read(self, finished: Finished) -> Recounted:
        begin, end = self._begin or 0, round(self.clock.platform() * 1000)
        rows = await self._list(begin, end)
        older = {id for id, row in self._known.items() if row.create_time < begin and not _ended(row)}
        found = await self._look_up((older | self._seen.keys()) - rows.keys())
        recounted = Recounted()
        recounted.gone = {id for id in finished if id not in rows and id not in found}
        rows = {id: _with_valid_times(row, end) for id, row in (rows | found).items()}
        for name in ("created", "finished"):
            recounted.samples.expect(f"blueking_job_executions_{name}_total")
        recounted.samples.expect(f"{DURATION}_count", f"{DURATION}_sum", f"{WAIT}_count", f"{WAIT}_sum")
        recounted.samples.expect(UNFINISHED, OLDEST_UNFINISHED)
        counted: dict[int, Execution] = {}
        retried: set[int] = set()
        late: set[int] = set()
        for id, row in list(rows.items()):
            known = self._known.get(id)
            if known is not None and known.create_time < begin and _ended(known) and id not in self._seen:
                continue
            if self._is_not_due(row, end):
                row = rows[id] = self._versions(id)[-1]
                late.add(id)
            if self._earlier(row):
                retried.add(id)
            self._count(recounted, known, row)
            if _ended(row) and not _same_end(known, row):
                counted[id] = row
                recounted.runs[id] = job_status_slug(row.status)
        if late:
            recounted.notes.append(
                f"{len(late)} executions run again; the daemon looks for that from time to time only"
            )
        self._count_ends(recounted, rows)
        self._count_watched(recounted, [row for row in rows.values() if self._is_unfinished(row)])
        ended = {id: row for id, row in counted.items() if id not in late}
        answers = await self._count_steps(recounted, ended, retried | late)
        await self._count_hosts(recounted, rows, ended, answers)
        return recounted

    def _is_not_due(self, row: Execution, end: int) -> bool:
        """Whether a retry of this execution is yet to be noticed: outside of the window that is rarely looked for."""
        seen = self._versions(row.id)
        if not seen or row.create_time >= end - self.config.lookback * 1000 or not _may_run_again(seen[-1]):
            return False
        return (row.status, row.end_time) != (seen[-1].status, seen[-1].end_time)

    def _versions(self, id: int) -> list[Execution]:
        """An execution as the polls saw it, oldest first."""
        return [*([self._known[id]] if id in self._known else []), *self._seen.get(id, [])]

    async def _list(self, begin: int, end: int) -> dict[int, Execution]:
        """All executions that were created in [begin, end]."""
        longest = self.api.max_window
        if longest is not None and end - begin > longest:
            return await self._list(begin, begin + longest) | await self._list(begin + longest, end)
        rows: dict[int, Execution] = {}
        offset = 0
        while True:
            if self.api.max_offset is not None and offset > self.api.max_offset and end - begin > 1:
                middle = (begin + end) // 2
                return await self._list(begin, middle) | await self._list(middle, end)
            page = await self.api.list(self.scope, begin, end, offset=offset, deadline=self.deadline())
            rows |= {row.id: row for row in page.rows}
            offset += page.size
            if page.size < self.api.page_size:
                return rows

    async def _look_up(self, ids: Iterable[int]) -> dict[int, Execution]:
        rows: dict[int, Execution] = {}

        async def look_up(id: int) -> None:
            created = (self._known.get(id) or self._seen[id][-1]).create_time
            try:
                page = await self.api.list(
                    self.scope, created, created + 1, job_instance_id=id, length=1, deadline=self.deadline()
                )
            except ApiError as error:
                if error.reason != "not_found":
                    raise
            else:
                rows.update((row.id, row) for row in page.rows)

        await gather_bounded(map(look_up, sorted(ids)), CONCURRENCY)
        return rows

    def _count(self, recounted: Recounted, known: Execution | None, row: Execution) -> None:
        samples = recounted.samples
        task_type, mode = TASK_TYPES.get(row.task_type, UNKNOWN), LAUNCH_MODES.get(row.launch_mode, UNKNOWN)
        if row.status not in JOB_STATUSES:
            recounted.unknown.add(("job.status", str(row.status)))
        if task_type == UNKNOWN:
            recounted.unknown.add(("job.type", str(row.task_type)))
        if mode == UNKNOWN:
            recounted.unknown.add(("job.launch_mode", str(row.launch_mode)))
        if known is None:
            samples.add("blueking_job_executions_created_total", (task_type, mode))
        if self._is_unfinished(row):
            samples.add(UNFINISHED, (task_type, job_status_slug(row.status)))
            samples.earliest(OLDEST_UNFINISHED, (job_status_slug(row.status),), row.create_time / 1000)
        runs = [*self._earlier(row), *([row] if _ended(row) and not _same_end(known, row) else [])]
        for run in runs:
            samples.add("blueking_job_executions_finished_total", (task_type, mode, job_status_slug(run.status)))
        if runs and not (known is not None and _ended(known)):
            samples.observe(DURATION, (task_type,), _time(runs[0].start_time), _time(runs[0].end_time))
        if known is None or (not _ended(known) and _time(known.start_time) is None):
            starts = (_time(each.start_time) for each in (*self._seen.get(row.id, ()), row))
            start = next((start for start in starts if start is not None), None)
            samples.observe(WAIT, (task_type,), row.create_time, start)

    def _is_unfinished(self, row: Execution) -> bool:
        age = self.clock.platform() - row.create_time / 1000
        return not _ended(row) and age <= self.config.max_unfinished_age

    def _earlier(self, row: Execution) -> list[Execution]:
        """Runs that ended and were retried before the newest one, as the polls saw them."""
        runs: dict[int | None, Execution] = {}
        for seen in self._seen.get(row.id, []):
            before = not _ended(row) or (seen.end_time or 0) < (row.end_time or 0)
            if _may_run_again(seen) and before and not _same_end(self._known.get(row.id), seen):
                runs[seen.end_time] = seen
        return list(runs.values())

    def _count_ends(self, recounted: Recounted, rows: Mapping[int, Execution]) -> None:
        """The newest end of each outcome, of all executions and of the watched jobs; the duration of the newest watched
        execution, whose first run counts."""
        samples = recounted.samples
        samples.expect(LAST_FINISHED, WATCHED_LAST_FINISHED, WATCHED_LAST_DURATION)
        newest: dict[str, tuple[int, int]] = {}
        for id in sorted(self._known.keys() | self._seen.keys() | rows.keys()):
            versions = [*self._versions(id), *([rows[id]] if id in rows else [])]
            ended = [(end, row) for row in versions if _ended(row) and (end := _time(row.end_time)) is not None]
            for end, row in ended:
                outcome = str(job_outcome(row.status, True))
                samples.latest(LAST_FINISHED, (outcome,), end / 1000)
                for name in self._watched_as(row):
                    samples.latest(WATCHED_LAST_FINISHED, (name, outcome), end / 1000)
            first, row = min(ended, key=lambda one: one[0], default=(0, versions[0]))
            start = _time(row.start_time)
            for name in self._watched_as(row):
                if start is not None and start <= first and (first, id) > newest.get(name, (0, 0)):
                    newest[name] = first, id
                    samples[WATCHED_LAST_DURATION][(name,)] = (first - start) / 1000

    def _count_watched(self, recounted: Recounted, unfinished: Iterable[Execution]) -> None:
        samples = recounted.samples
        samples.expect(WATCHED_UNFINISHED, WATCHED_UNFINISHED_SINCE)
        for row in unfinished:
            for name in self._watched_as(row):
                samples.add(WATCHED_UNFINISHED, (name,))
                begun = _time(row.start_time) or row.create_time
                samples.earliest(WATCHED_UNFINISHED_SINCE, (name,), begun / 1000)

    def _watched_as(self, row: Execution) -> Iterator[str]:
        return (entry.job_name for entry in self.config.watch if _is_watched(entry, row))

    async def _count_steps(
        self, recounted: Recounted, counted: Mapping[int, Execution], from_polls: Set[int]
    ) -> dict[int, list[ExecutionStatus]]:
        """Count the steps of these executions as they are now, and what the polls saw of those in `from_polls`; the
        answers by execution."""
        selected = [id for id, row in counted.items() if self._selects(row.status, _ended(row))]
        answers = await gather_bounded(map(self._status, selected), CONCURRENCY)
        fresh = dict(zip(selected, answers, strict=True))
        if self.config.host_results != "none":
            recounted.samples.expect("blueking_job_host_results_total", "blueking_job_host_failures_total")
            recounted.samples.expect("blueking_job_step_failures_total", "blueking_job_host_exit_codes_total")
        answers_of: dict[int, list[ExecutionStatus]] = {}
        for id in from_polls | fresh.keys():
            known = self._known.get(id)
            before = known.end_time if known is not None and _ended(known) else None
            seen = [*self._answers.get(id, [])] if id in from_polls else []
            if id in fresh:
                seen.append(fresh[id])
            answers_of[id] = seen
            attempts: dict[tuple[int, int], Step] = {}
            for answer in seen:
                if not self._selects(answer.status, answer.end_time is not None):
                    continue
                for step in answer.steps:
                    if before is None or step.end_time is None or step.end_time > before:
                        attempts[step.id, step.execute_count] = step
            for step in attempts.values():
                self._count_step(recounted, step)
        return answers_of

    def _selects(self, status: int, has_end: bool) -> bool:
        outcome, wanted = job_outcome(status, has_end), self.config.host_results
        return outcome is not None and (wanted == "all" or (wanted == "failed" and outcome == "failure"))

    async def _status(self, id: int) -> ExecutionStatus:
        try:
            return await self.api.status(self.scope, id, host_results=True, deadline=self.deadline())
        except ApiError as error:
            if error.code != V3_CONTAINERS:
                raise error.named(f"execution {id}") from None
        return await self.api.status(self.scope, id, host_results=False, deadline=self.deadline())

    def _count_step(self, recounted: Recounted, step: Step) -> None:
        outcome = job_outcome(step.status, step.end_time is not None)
        results = list(step.results)
        if outcome is None or step.status in RUNNING_STEP or any(one.status == RUNNING_HOST for one in results):
            return
        step_type = STEP_TYPES.get(step.step_type, UNKNOWN)
        if step_type == UNKNOWN:
            recounted.unknown.add(("job.step.type", str(step.step_type)))
        if outcome == "failure":
            recounted.samples.add("blueking_job_step_failures_total", (step_type,))
        for one in results:
            if one.status in HOST_WAITING:
                continue
            recounted.samples.add("blueking_job_host_results_total")
            if one.status in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED):
                continue
            if one.status not in HOST_CODES:
                recounted.unknown.add(("job.host.status", str(one.status)))
            recounted.samples.add("blueking_job_host_failures_total", (str(one.status), host_reason(one.status)))
            if step.step_type == SCRIPT and one.exit_code is not None:
                recounted.samples.add("blueking_job_host_exit_codes_total", (str(one.exit_code),))

    async def _count_hosts(
        self,
        recounted: Recounted,
        rows: Mapping[int, Execution],
        counted: Mapping[int, Execution],
        answers: Mapping[int, list[ExecutionStatus]],
    ) -> None:
        """The hosts that fail, run by run in the order of time. The successes of a plan or name are read from the first
        failure of a host on: others clear nothing."""
        runs: list[tuple[int, int, ExecutionStatus | None]] = [
            (_time(answer.end_time) or _time(rows[id].end_time) or 0, id, answer)
            for id, of_run in answers.items()
            for answer in of_run
        ]
        if self.config.host_results == "failed":
            succeeded = (row for id, row in counted.items() if row.status == SUCCESS and id not in answers)
            runs += [(_time(row.end_time) or 0, row.id, None) for row in succeeded]
        results, now = HostResults(), round(self.clock.platform() * 1000)
        for end, id, answer in sorted(runs, key=lambda run: run[:2]):
            row = rows[id]
            group = f"plan {row.plan_id}" if row.plan_id > 0 else f"name {row.name}"
            if answer is None:
                if results.groups().get(group, math.inf) > end / 1000:
                    continue
                answer = await self._status(id)
            for host, code, moment in _last_results(answer, end, now):
                if code != HOST_ALREADY_SUCCEEDED:
                    labels = None if code == HOST_SUCCESS else (str(code), host_reason(code))
                    results.add(host, id, moment / 1000 if moment else None, labels, group)
        failing = results.failing(self.clock.platform() - self.config.failing_host_ttl)
        count_failing(recounted, "blueking_job", results, failing, self.config.max_failing_hosts)
        if len(failing) <= self.config.max_failing_hosts:
            recounted.samples[IN_A_ROW] = {
                labels_of(streak): float(len({one.run for one in streak})) for streak in failing
            }


def _last_results(answer: ExecutionStatus, end: int, now: int) -> Iterator[tuple[Host, int, int]]:
    """Each host with its code in the last step that it takes part in, and when that was; ms, 0 if unknown."""
    last: dict[str, tuple[Host, int, int]] = {}
    ids: dict[str, str] = {}
    for step in answer.steps:
        for one in step.results:
            if one.host is None or one.status in HOST_WAITING:
                continue
            name, address = one.host.identity, one.host.address
            if not one.host.bk_host_id:
                name = ids.get(address, address)
            elif address:
                ids[address] = name
                last.pop(address, None)
            ends = (one.end_time, step.end_time, end)
            moment = next((time for time in ends if time is not None and 0 < time <= now + AHEAD), 0)
            last[name] = one.host, one.status, moment
    return iter(last.values())


def _is_watched(entry: Watch, row: Execution) -> bool:
    """In a pattern only `*` and `?` are special."""
    if entry.job_plan_id is not None:
        return row.plan_id == entry.job_plan_id
    return entry.name is not None and fnmatch.fnmatchcase(row.name, entry.name.replace("[", "[[]"))


def _with_valid_times(row: Execution, now: int) -> Execution:
    """The row without an end in the future and without a start long before its creation."""
    start, end = _time(row.start_time), _time(row.end_time)
    if start is not None and not row.create_time - EARLY <= start <= now + AHEAD:
        start = None
    return msgspec.structs.replace(row, start_time=start, end_time=end if end and end <= now + AHEAD else None)


def _time(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _ended(row: Execution) -> bool:
    return job_outcome(row.status, _time(row.end_time) is not None) is not None


def _same_end(known: Execution | None, row: Execution) -> bool:
    """Whether the run that `row` shows had ended before the first poll."""
    if known is None or not _ended(known):
        return False
    return None in (_time(known.end_time), _time(row.end_time)) or known.end_time == row.end_time


def _may_run_again(row: Execution) -> bool:
    return _ended(row) and (job_outcome(row.status, True) == "failure" or row.status in RESUMABLE)
