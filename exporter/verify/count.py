"""The plain count: what a collector must have counted, by what the platform shows when it is read once more.

Nothing here knows how a collector folds its polls. Of a run that was retried only the newest can be read again: earlier
ones are taken as the polls saw them. What ended before the first poll was never to be counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol

from exporter.blueking.job import Execution, ExecutionStatus, JobApi, Step
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_jobs import HostRow, Job
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import FinishedRun, Platforms
from exporter.collectors.calls import gather_bounded
from exporter.config.schema import JobConfig, NodemanJobConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.family import Labels
from exporter.model import (
    HOST_ALREADY_SUCCEEDED,
    HOST_CODES,
    HOST_SUCCESS,
    HOST_WAITING,
    JOB_STATUSES,
    LAUNCH_MODES,
    NODEMAN_STATUSES,
    NODEMAN_UNFINISHED,
    STEP_TYPES,
    TASK_TYPES,
    UNKNOWN,
    host_reason,
    job_outcome,
    job_status_slug,
)

DURATION = "blueking_job_execution_duration_seconds"
WAIT = "blueking_job_execution_wait_seconds"
NODEMAN_DURATION = "blueking_nodeman_job_duration_seconds"

CONCURRENCY = 4
PAGE = 500
"""Rows of a page of NodeMan."""
SCRIPT = 1
RUNNING_STEP = frozenset({2, 10})
RUNNING_HOST = 7
RESUMABLE = frozenset({11, 13})
"""Statuses of JOB besides failures from which an execution may run again: stopped, refused by a person."""
REVOKED = "terminated"
WEEK = 7 * 86400.0
"""Seconds after which an unfinished NodeMan job is not watched any more."""
V3_CONTAINERS = "1240002"
"""Code of a v3 status with container targets, when it is asked for host results."""

Finished = Mapping[int, Sequence[FinishedRun]]
"""The runs that a poller has counted as finished, by id, in their order."""


class Samples(dict[str, dict[Labels, float]]):
    """Values by sample name and labels."""

    def add(self, name: str, labels: Labels = (), by: float = 1.0) -> None:
        of_name = self.setdefault(name, {})
        of_name[labels] = of_name.get(labels, 0.0) + by

    def observe(self, name: str, labels: Labels, start: int | None, end: int | None, scale: int = 1000) -> None:
        """Observe the time between two times, of which `scale` make a second; not if one is missing or they contradict
        each other."""
        if start is not None and end is not None and start <= end:
            self.add(f"{name}_count", labels)
            self.add(f"{name}_sum", labels, (end - start) / scale)

    def expect(self, *names: str) -> None:
        """Compare these samples even where there is nothing to count."""
        for name in names:
            self.setdefault(name, {})


class Recounted:
    """A plain count. `samples`: what a poller must show; `at_least`: samples of which it may show more, since what was
    retried cannot be read again. `runs`: the status of the newest finished run by id; `gone`: ids that were counted and
    that the platform no longer shows. `unknown`: (field, value) that are in no table. `notes`: lines for the reader."""

    def __init__(self) -> None:
        self.samples = Samples()
        self.at_least: set[str] = set()
        self.runs: dict[int, str] = {}
        self.gone: set[int] = set()
        self.unknown: set[tuple[str, str]] = set()
        self.notes: list[str] = []


class Recount(Protocol):
    """Reads once more what the polls of one collector have read."""

    what: str
    """What `Recounted.runs` are runs of."""

    def note(self, records: Any) -> None:
        """Take the records of a complete poll, the first one first."""

    async def read(self, finished: Finished) -> Recounted:
        """Read everything afresh and count it. Raises `ApiError`."""


class Reader:
    """What all of them have: how long one call may take."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def deadline(self) -> Deadline:
        return Deadline(self._seconds, self._clock)


# JOB


class JobRecount:
    """`Recount` of JOB: the list of the window with all pages, and the steps of the executions that `host_results`
    selects. Times in ms."""

    what = "execution"

    def __init__(self, one: ScopeConfig, api: JobApi, reader: Reader, clock: Clock) -> None:
        self._scope = one.scope
        self._config: JobConfig = one.collectors.job
        self._api = api
        self._reader = reader
        self._clock = clock
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
        begin, end = self._begin or 0, round(self._clock.platform() * 1000)
        rows = await self._list(begin, end)
        older = {id for id, row in self._known.items() if row.create_time < begin and not _ended(row)}
        found = await self._look_up((older | self._seen.keys()) - rows.keys())
        told = Recounted()
        told.gone = {id for id in finished if id not in rows and id not in found}
        rows |= found
        for name in ("created", "finished"):
            told.samples.expect(f"blueking_job_executions_{name}_total")
        told.samples.expect(f"{DURATION}_count", f"{DURATION}_sum", f"{WAIT}_count", f"{WAIT}_sum")
        counted: dict[int, Execution] = {}
        retried: set[int] = set()
        late: set[int] = set()
        for id, row in rows.items():
            known = self._known.get(id)
            if known is not None and known.create_time < begin and _ended(known) and id not in self._seen:
                continue
            if self._is_not_due(row, end):
                row = self._seen[id][-1]
                late.add(id)
            if self._earlier(row):
                retried.add(id)
            self._count(told, known, row)
            if _ended(row) and not _same_end(known, row):
                counted[id] = row
                told.runs[id] = job_status_slug(row.status)
        if late:
            told.notes.append(f"{len(late)} executions run again; the daemon looks for that from time to time only")
        await self._count_steps(told, {id: row for id, row in counted.items() if id not in late}, retried | late)
        return told

    def _is_not_due(self, row: Execution, end: int) -> bool:
        """Whether a retry of this execution is yet to be noticed: outside of the window that is rarely looked for."""
        seen = self._seen.get(row.id, [])
        if not seen or row.create_time >= end - self._config.lookback * 1000 or not _may_run_again(seen[-1]):
            return False
        return (row.status, row.end_time) != (seen[-1].status, seen[-1].end_time)

    async def _list(self, begin: int, end: int) -> dict[int, Execution]:
        """All executions that were created in [begin, end]."""
        longest = self._api.max_window
        if longest is not None and end - begin > longest:
            return await self._list(begin, begin + longest) | await self._list(begin + longest, end)
        rows: dict[int, Execution] = {}
        offset = 0
        while True:
            if self._api.max_offset is not None and offset > self._api.max_offset and end - begin > 1:
                middle = (begin + end) // 2
                return await self._list(begin, middle) | await self._list(middle, end)
            page = await self._api.list(self._scope, begin, end, offset=offset, deadline=self._reader.deadline())
            rows |= {row.id: row for row in page.rows}
            offset += page.size
            if page.size < self._api.page_size:
                return rows

    async def _look_up(self, ids: Iterable[int]) -> dict[int, Execution]:
        rows: dict[int, Execution] = {}

        async def look_up(id: int) -> None:
            created = (self._known.get(id) or self._seen[id][-1]).create_time
            try:
                page = await self._api.list(
                    self._scope, created, created + 1, job_instance_id=id, length=1, deadline=self._reader.deadline()
                )
            except ApiError as error:
                if error.reason != "not_found":
                    raise
            else:
                rows.update((row.id, row) for row in page.rows)

        await gather_bounded(map(look_up, sorted(ids)), CONCURRENCY)
        return rows

    def _count(self, told: Recounted, known: Execution | None, row: Execution) -> None:
        samples = told.samples
        task_type, mode = TASK_TYPES.get(row.task_type, UNKNOWN), LAUNCH_MODES.get(row.launch_mode, UNKNOWN)
        if row.status not in JOB_STATUSES:
            told.unknown.add(("job.status", str(row.status)))
        if task_type == UNKNOWN:
            told.unknown.add(("job.type", str(row.task_type)))
        if mode == UNKNOWN:
            told.unknown.add(("job.launch_mode", str(row.launch_mode)))
        if known is None:
            samples.add("blueking_job_executions_created_total", (task_type, mode))
        given_up = self._clock.platform() - row.create_time / 1000 > self._config.max_unfinished_age
        if not _ended(row) and not given_up:
            samples.add("blueking_job_executions_unfinished", (task_type, job_status_slug(row.status)))
        runs = [*self._earlier(row), *([row] if _ended(row) and not _same_end(known, row) else [])]
        for run in runs:
            samples.add("blueking_job_executions_finished_total", (task_type, mode, job_status_slug(run.status)))
        if runs and not (known is not None and _ended(known)):
            samples.observe(DURATION, (task_type,), _time(runs[0].start_time), _time(runs[0].end_time))
        if known is None or (not _ended(known) and _time(known.start_time) is None):
            starts = (_time(each.start_time) for each in (*self._seen.get(row.id, ()), row))
            start = next((start for start in starts if start is not None), None)
            samples.observe(WAIT, (task_type,), row.create_time, start)

    def _earlier(self, row: Execution) -> list[Execution]:
        """Runs that ended and were retried before the newest one, as the polls saw them."""
        runs: dict[int | None, Execution] = {}
        for seen in self._seen.get(row.id, []):
            before = not _ended(row) or (seen.end_time or 0) < (row.end_time or 0)
            if _may_run_again(seen) and before and not _same_end(self._known.get(row.id), seen):
                runs[seen.end_time] = seen
        return list(runs.values())

    async def _count_steps(self, told: Recounted, counted: Mapping[int, Execution], from_polls: Set[int]) -> None:
        """Count the steps of these executions as they are now, and what the polls saw of those in `from_polls`."""
        selected = [id for id, row in counted.items() if self._selects(row.status, _ended(row))]
        answers = await gather_bounded(map(self._status, selected), CONCURRENCY)
        fresh = dict(zip(selected, answers, strict=True))
        if self._config.host_results != "none":
            told.samples.expect("blueking_job_host_results_total", "blueking_job_host_failures_total")
            told.samples.expect("blueking_job_step_failures_total", "blueking_job_host_exit_codes_total")
        for id in from_polls | fresh.keys():
            known = self._known.get(id)
            before = known.end_time if known is not None and _ended(known) else None
            seen = [*self._answers.get(id, [])] if id in from_polls else []
            if id in fresh:
                seen.append(fresh[id])
            attempts: dict[tuple[int, int], Step] = {}
            for answer in seen:
                if not self._selects(answer.status, answer.end_time is not None):
                    continue
                for step in answer.steps:
                    if before is None or step.end_time is None or step.end_time > before:
                        attempts[step.id, step.execute_count] = step
            for step in attempts.values():
                self._count_step(told, step)

    def _selects(self, status: int, has_end: bool) -> bool:
        outcome, wanted = job_outcome(status, has_end), self._config.host_results
        return outcome is not None and (wanted == "all" or (wanted == "failed" and outcome == "failure"))

    async def _status(self, id: int) -> ExecutionStatus:
        try:
            return await self._api.status(self._scope, id, host_results=True, deadline=self._reader.deadline())
        except ApiError as error:
            if error.code != V3_CONTAINERS:
                raise error.named(f"execution {id}") from None
        return await self._api.status(self._scope, id, host_results=False, deadline=self._reader.deadline())

    def _count_step(self, told: Recounted, step: Step) -> None:
        outcome = job_outcome(step.status, step.end_time is not None)
        results = list(step.results)
        if outcome is None or step.status in RUNNING_STEP or any(one.status == RUNNING_HOST for one in results):
            return
        step_type = STEP_TYPES.get(step.step_type, UNKNOWN)
        if step_type == UNKNOWN:
            told.unknown.add(("job.step.type", str(step.step_type)))
        if outcome == "failure":
            told.samples.add("blueking_job_step_failures_total", (step_type,))
        for one in results:
            if one.status in HOST_WAITING:
                continue
            told.samples.add("blueking_job_host_results_total")
            if one.status in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED):
                continue
            if one.status not in HOST_CODES:
                told.unknown.add(("job.host.status", str(one.status)))
            told.samples.add("blueking_job_host_failures_total", (str(one.status), host_reason(one.status)))
            if step.step_type == SCRIPT and one.exit_code is not None:
                told.samples.add("blueking_job_host_exit_codes_total", (str(one.exit_code),))


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


# NodeMan


class NodemanJobRecount:
    """`Recount` of NodeMan jobs: the list back to the oldest job that is watched, and the failed hosts of new jobs."""

    what = "job"

    def __init__(self, one: ScopeConfig, api: NodemanApi, reader: Reader, clock: Clock) -> None:
        self._biz = int(one.scope.bk_scope_id)
        self._config: NodemanJobConfig = one.collectors.nodeman_job
        self._api = api
        self._reader = reader
        self._clock = clock
        self._first: dict[int, Job] | None = None
        """What the first poll saw."""
        self._floor: int | None = None
        self._watched: set[int] = set()

    def note(self, records: Any) -> None:
        if self._first is None:
            self._first, self._floor = dict(records.rows), records.floor
        self._watched |= records.rows.keys()

    async def read(self, finished: Finished) -> Recounted:
        first = self._first or {}
        rows = await self._list() if self._config.discover and self._floor is not None else {}
        rows |= await self._look_up(sorted((self._watched | set(self._config.job_ids)) - rows.keys()))
        told, now = Recounted(), self._clock.platform()
        told.gone = {id for id in finished if id not in rows}
        told.samples.expect("blueking_nodeman_jobs_finished_total")
        told.samples.expect("blueking_nodeman_jobs_unfinished", "blueking_nodeman_job_instances")
        told.samples.expect(f"{NODEMAN_DURATION}_count", f"{NODEMAN_DURATION}_sum")
        new: list[Job] = []
        for id, row in sorted(rows.items()):
            is_new = id not in first and (self._floor is None or id > self._floor)
            if not (is_new or id in self._watched):
                continue
            runs = list(finished.get(id, ()))
            is_counted = is_new or (id in first and not _job_ended(first[id]))
            self._count(told, row, runs, is_counted=is_counted, now=now)
            if is_counted and (runs or _job_ended(row)) and (id not in first or first[id].end_time is None):
                # The platform keeps the end of the first run.
                told.samples.observe(NODEMAN_DURATION, (row.job_type,), row.start_time, row.end_time, scale=1)
            failures = row.statistics is not None and row.statistics.failed > 0
            if is_new and failures and len(runs) <= 1 and len(row.task_ids) <= 1:
                new.append(row)
            elif (failures or len(runs) > 1) and (is_new or runs or not _job_ended(row)):
                told.at_least.add("blueking_nodeman_host_failures_total")
        await self._count_hosts(told, new)
        return told

    async def _list(self) -> dict[int, Job]:
        least = min([(self._floor or 0) + 1, *(self._first or {})])
        rows: dict[int, Job] = {}
        number = 1
        while True:
            page = await self._api.job_list(
                bk_biz_id=self._biz, page=number, pagesize=PAGE, deadline=self._reader.deadline()
            )
            jobs = [job for job in page.rows if job is not None]
            rows |= {job.id: job for job in jobs}
            if len(page.rows) < PAGE or number * PAGE >= page.total or any(job.id < least for job in jobs):
                return rows
            number += 1

    async def _look_up(self, ids: Sequence[int]) -> dict[int, Job]:
        rows: dict[int, Job] = {}
        if self._api.lists_jobs:
            for start in range(0, len(ids), PAGE):
                page = await self._api.job_list(
                    job_ids=ids[start : start + PAGE], pagesize=PAGE, deadline=self._reader.deadline()
                )
                rows |= {job.id: job for job in page.rows if job and self._is_ours(job)}
            return rows
        for id in ids:
            try:
                rows[id] = (await self._api.job_details(id, deadline=self._reader.deadline())).job
            except ApiError as error:
                if error.reason != "not_found":
                    raise
        return rows

    def _is_ours(self, job: Job) -> bool:
        return not job.bk_biz_ids or self._biz in job.bk_biz_ids

    def _count(self, told: Recounted, row: Job, runs: Sequence[FinishedRun], *, is_counted: bool, now: float) -> None:
        if row.status not in NODEMAN_STATUSES:
            told.unknown.add(("nodeman_job.status", row.status))
        earlier = [run.status for run in runs]
        if _job_ended(row) and (is_counted or runs):
            status = row.status if row.status in NODEMAN_STATUSES else UNKNOWN
            if runs and runs[-1].status == REVOKED:
                # The platform shows a revoked job as failed some time later; it has ended once.
                status = REVOKED
            told.runs[row.id] = status
            earlier = [*earlier[:-1], status]
        for status in earlier:
            told.samples.add("blueking_nodeman_jobs_finished_total", (row.job_type, status))
        abandoned = row.end_time is None and row.start_time is not None and row.start_time < now - WEEK
        if not _job_ended(row) and not abandoned:
            status = row.status if row.status in NODEMAN_STATUSES else UNKNOWN
            told.samples.add("blueking_nodeman_jobs_unfinished", (row.job_type, status))
        recent = not _job_ended(row) or bool(runs) or (row.end_time or now) >= now - self._config.max_finished_age
        if row.statistics is not None and recent and not abandoned:
            names = ("pending", "running", "success", "failed", "ignored")
            numbers = {name: getattr(row.statistics, name) for name in names}
            numbers["other"] = row.statistics.total - sum(numbers.values())
            for name, number in numbers.items():
                told.samples.add("blueking_nodeman_job_instances", (row.job_type, name), max(0, number))

    async def _count_hosts(self, told: Recounted, jobs: Sequence[Job]) -> None:
        told.samples.expect("blueking_nodeman_host_failures_total")
        pages = await gather_bounded((self._failed_hosts(job.id) for job in jobs), CONCURRENCY)
        for job, hosts in zip(jobs, pages, strict=True):
            for host in hosts:
                if host.bk_biz_id in (None, self._biz) and host.status == "failed":
                    told.samples.add(
                        "blueking_nodeman_host_failures_total", ("nodeman_job", job.job_type, host.step, "")
                    )

    async def _failed_hosts(self, id: int) -> list[HostRow]:
        hosts: dict[str, HostRow] = {}
        number, total = 1, 1
        while (number - 1) * PAGE < total:
            page = await self._api.job_details(
                id, statuses=("failed",), page=number, pagesize=PAGE, deadline=self._reader.deadline()
            )
            hosts |= {row.instance_id or str(row.host): row for row in page.hosts if not row.filtered}
            number, total = number + 1, page.total
        return list(hosts.values())


def _job_ended(row: Job) -> bool:
    return row.end_time is not None if row.status not in NODEMAN_STATUSES else row.status not in NODEMAN_UNFINISHED


class SubscriptionRecount:
    """`Recount` of NodeMan subscriptions: the counter of each."""

    what = "subscription"

    def __init__(self, one: ScopeConfig, api: NodemanApi, reader: Reader, clock: Clock) -> None:
        self._ids = one.collectors.nodeman_subscription.subscription_ids
        self._api = api
        self._reader = reader

    def note(self, records: Any) -> None:
        """The polls need not be known: the counter says how things are now."""

    async def read(self, finished: Finished) -> Recounted:
        told = Recounted()
        told.samples.expect("blueking_nodeman_subscription_instances")
        for id in self._ids:
            try:
                counter = (await self._api.task_result(id, deadline=self._reader.deadline())).counter
            except ApiError as error:
                raise error.named(f"subscription {id}") from None
            if counter is None:
                told.notes.append(f"subscription {id}: the platform gives no counter, so nothing is compared")
                told.samples.pop("blueking_nodeman_subscription_instances", None)
                return told
            for status, number in counter.items():
                if status not in NODEMAN_STATUSES:
                    told.unknown.add(("nodeman_subscription.status", status))
                label = status if status in NODEMAN_STATUSES else UNKNOWN
                told.samples.add("blueking_nodeman_subscription_instances", (str(id), label), max(0, number))
        return told


class TaskRecount:
    """`Recount` of NodeMan 1.x tasks: the hosts of each, by status and by system."""

    what = "task"

    def __init__(self, one: ScopeConfig, api: NodemanLegacyApi, reader: Reader, clock: Clock) -> None:
        self._biz = int(one.scope.bk_scope_id)
        self._ids = one.collectors.nodeman_task.job_ids
        self._api = api
        self._reader = reader

    def note(self, records: Any) -> None:
        """The polls need not be known: a task says how things are now."""

    async def read(self, finished: Finished) -> Recounted:
        told = Recounted()
        for id in self._ids:
            try:
                task = await self._api.get_task_info(self._biz, id, deadline=self._reader.deadline())
            except ApiError as error:
                raise error.named(f"task {id}") from None
            for status, number in task.status_count.items():
                told.samples.add("blueking_nodeman_task_hosts", (str(id), task.job_type, status), max(0, number))
            for system, number in task.os_count.items():
                told.samples.add("blueking_nodeman_task_hosts_by_os", (str(id), task.job_type, system), max(0, number))
            for host in task.hosts:
                if host.status not in NODEMAN_STATUSES:
                    told.unknown.add(("nodeman_task.status", host.status))
        return told


def recount(collector: str, one: ScopeConfig, apis: Platforms, reader: Reader, clock: Clock) -> Recount | None:
    """The plain count for a collector of this scope, None for one that has none."""
    if collector == "job" and apis.job:
        return JobRecount(one, apis.job, reader, clock)
    if collector == "nodeman_job" and apis.nodeman:
        return NodemanJobRecount(one, apis.nodeman, reader, clock)
    if collector == "nodeman_subscription" and apis.nodeman:
        return SubscriptionRecount(one, apis.nodeman, reader, clock)
    if collector == "nodeman_task" and apis.nodeman_legacy:
        return TaskRecount(one, apis.nodeman_legacy, reader, clock)
    return None
