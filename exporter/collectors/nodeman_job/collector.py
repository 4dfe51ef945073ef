"""NodeMan jobs: installs and plugin operations (job_list, job_details).

job_list is the cheap call: it carries status and statistics of every job. Hosts are asked for only where some
failed, or where a success may clear one that fails. A run is (job id, task ids): a retry appends a task; retrying a
single node shows only as a return to an unfinished status, and that only after somebody has read the details: so a job
with a host that fails is looked at every five minutes. Times are unix seconds.

Reading the details of a job whose task is not ready can make the platform end it. So they are read only of jobs that
have ended, or that run for the first time: RUNNING is then stored by the platform itself, once it saw instances.
Where there is no job_list nothing tells, and the configured jobs are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import msgspec

from exporter.blueking.links import nodeman_job
from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_jobs import HostRow, Job
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import (
    WITHOUT_HOSTS,
    Collector,
    FailedCall,
    FailedExecution,
    Observed,
    Platforms,
)
from exporter.collectors.calls import gather_bounded
from exporter.collectors.nodeman import NodemanCollector, ended, name_of, read_pages, status_label
from exporter.collectors.nodeman_job.fold import Fold
from exporter.collectors.nodeman_job.metrics import FAMILIES
from exporter.collectors.nodeman_job.state import (
    NAME,
    NodemanJobRecords,
    NodemanJobState,
    TrackedJob,
    failures,
    is_new_run,
)
from exporter.config.schema import NodemanJobConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family
from exporter.model import NODEMAN_STATUSES

FAILED = ("failed", "part_failed")
CONCURRENCY = 4
LEAST_ROWS = 20
"""Rows of the first page at least, so that a job that became visible late is still on it."""
BASELINE_JOBS = 200
"""Jobs that a baseline asks for their hosts, newest first: enough to know who fails, without a flood of calls."""
LOOK_AGAIN = 300.0
"""Seconds between two looks at the details of an ended job that has a failing host."""


class NodemanJobCollector(NodemanCollector[NodemanJobState, NodemanJobConfig, NodemanApi]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[NodemanJobState]] = NodemanJobState
    families: ClassVar[tuple[Family, ...]] = FAMILIES

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Collector | None:
        if platforms.nodeman is None or not config.collectors.nodeman_job.enabled:
            return None
        return cls(config.scope, config.collectors.nodeman_job, platforms.nodeman, clock)

    # Fetch

    async def fetch(self, state: NodemanJobState | None, deadline: Deadline) -> NodemanJobRecords:
        """All jobs that may have changed, and the hosts of those that failed anew. Raises `ApiError`."""
        rows: dict[int, Job] = {}
        begun = self._clock.platform()
        floor = state.floor if state else None
        if self.config.discover and (state is None or state.floor is None):
            rows, floor = await self._baseline(deadline)
        elif self.config.discover and state is not None:
            rows = await self._discover(state, deadline)
        errors: list[FailedCall] = []
        gone = await self._look_up(state, rows, errors, deadline)
        now = self._clock.platform()
        looked = await self._look_again(state, rows, now, errors, deadline) if state else frozenset()
        hosts, unexamined = await self._examine(state, rows, errors, deadline)
        self._attempts.forget(rows)
        return NodemanJobRecords(now, min(begun, now), floor, rows, hosts, unexamined, gone, looked, tuple(errors))

    async def _baseline(self, deadline: Deadline) -> tuple[dict[int, Job], int]:
        """Every unfinished job, however old, and those that began recently enough for a retry or a failing host; the id
        below which nothing else is new."""
        rows = await self._pages(deadline, statuses=("pending", "running"), until=lambda page: False)
        horizon = self._clock.platform() - max(self.config.max_finished_age, self.config.failing_host_ttl)

        def old(page: Sequence[Job]) -> bool:
            return any(job.start_time is not None and job.start_time < horizon for job in page)

        recent = await self._pages(deadline, until=old)
        return rows | recent, min(recent, default=1) - 1

    async def _discover(self, state: NodemanJobState, deadline: Deadline) -> dict[int, Job]:
        """Jobs newest first, back to the newest that is known. One that is over and done with comes back when it
        runs."""
        floor = state.floor or 0
        newest = max(state.jobs, default=floor)
        size = min(PAGE_SIZE, max(LEAST_ROWS, len(state.jobs) + LEAST_ROWS // 2))
        rows = await self._pages(deadline, until=lambda page: any(job.id <= newest for job in page), size=size)
        return {
            id: job for id, job in rows.items() if id in state.jobs or id > floor or not ended(job.status, job.end_time)
        }

    async def _pages(
        self,
        deadline: Deadline,
        until: Callable[[Sequence[Job]], bool],
        statuses: Sequence[str] = (),
        size: int = PAGE_SIZE,
    ) -> dict[int, Job]:
        """Jobs of the business, newest first, up to the page that `until` recognises as the last one wanted."""

        async def ask(page: int) -> tuple[Sequence[Job], int]:
            answer = await self._api.job_list(
                bk_biz_id=self.biz, statuses=statuses, page=page, pagesize=size, deadline=deadline
            )
            return answer.rows, answer.total

        return await read_pages("job_list", ask, lambda job: job.id, size=size, until=until)

    def _is_ours(self, job: Job) -> bool:
        """Whether it touches this business, as far as it says which it touches."""
        return not job.bk_biz_ids or self.biz in job.bk_biz_ids

    async def _look_up(
        self, state: NodemanJobState | None, rows: dict[int, Job], errors: list[FailedCall], deadline: Deadline
    ) -> frozenset[int]:
        """Add to `rows` the known and configured jobs that are not in it; the ids that no longer exist.

        A job that cannot be had is left as it is and told in `errors`, as long as another one can be had.
        """
        known = state.jobs if state else {}
        ids = sorted((set(self.config.job_ids) | known.keys()) - rows.keys())
        foreign: set[int] = set()
        if self._api.lists_jobs:
            for begin in range(0, len(ids), PAGE_SIZE):
                some = ids[begin : begin + PAGE_SIZE]
                answer = await self._api.job_list(job_ids=some, pagesize=len(some), deadline=deadline)
                found = {job.id: job for job in answer.rows if job.id in set(some)}
                rows |= {id: job for id, job in found.items() if self._is_ours(job)}
                foreign |= found.keys() - rows.keys()
        text = f"it does not touch business {self.biz}"
        refused = {id: ApiError("not_found", text, api="job_list") for id in sorted(foreign)}
        gone: set[int] = set()

        async def look(id: int) -> None:
            # job_list leaves out what one may not see; the details say which it is: gone, or forbidden.
            try:
                rows[id] = (await self._api.job_details(id, deadline=deadline)).job
            except ApiError as error:
                if error.reason == "not_found" and id in known:
                    gone.add(id)
                elif self._attempts.give_up(id, error):
                    refused[id] = error
                    # Of one that has been counted nothing more is to be learnt: do not ask again in every poll.
                    if id in known and known[id].counted and rows and id not in self.config.job_ids:
                        gone.add(id)
                else:
                    raise
            if len(refused) >= CONCURRENCY and not rows:
                raise next(iter(refused.values())).named(f"job {next(iter(refused))}")

        await gather_bounded((look(id) for id in ids if id not in rows and id not in foreign), CONCURRENCY)
        errors += [FailedCall.of(error, f"job {id}", "left as it was") for id, error in refused.items()]
        # An id that does not exist is a mistake in the configuration, which must not hide that all else is well.
        fatal = [id for id, error in refused.items() if error.reason != "not_found" or not self.config.discover]
        if fatal and not rows:
            raise refused[fatal[0]].named(f"job {fatal[0]}")
        return frozenset(gone)

    async def _look_again(
        self, state: NodemanJobState, rows: dict[int, Job], now: float, errors: list[FailedCall], deadline: Deadline
    ) -> frozenset[int]:
        """Replace in `rows` ended jobs with failing hosts by what their details say; which they were."""
        if not self._api.lists_jobs:
            return frozenset()
        failing = {run for streak in state.hosts.streaks.values() for run, _ in streak.runs}

        def due(id: int) -> bool:
            known, row = state.jobs[id], rows.get(id)
            settled = row is not None and known.counted and not is_new_run(known, row)
            return settled and now - max(known.looked, known.finished or 0.0) >= LOOK_AGAIN

        looked: set[int] = set()

        async def look(id: int) -> None:
            try:
                job = (await self._api.job_details(id, deadline=deadline)).job
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                errors.append(FailedCall.of(error, f"job {id}", "left as it was"))
            else:
                row = rows[id]
                rows[id] = msgspec.structs.replace(job, task_ids=row.task_ids, bk_biz_ids=row.bk_biz_ids)
            looked.add(id)

        await gather_bounded((look(id) for id in sorted(failing & state.jobs.keys()) if due(id)), CONCURRENCY)
        return frozenset(looked)

    async def _examine(
        self, state: NodemanJobState | None, rows: Mapping[int, Job], errors: list[FailedCall], deadline: Deadline
    ) -> tuple[dict[int, tuple[HostRow, ...]], frozenset[int]]:
        """Host rows of the jobs that failed anew or may clear a host that fails; the jobs that refuse them."""
        jobs = state.jobs if state else {}
        hosts: dict[int, tuple[HostRow, ...]] = {}
        unexamined: set[int] = set()
        readable = {id: row for id, row in rows.items() if self._is_readable(jobs.get(id), row)}
        failed = {id for id, row in readable.items() if self._has_news(jobs.get(id), row)}
        # A success before all failures clears nothing.
        first = min((rows[id].start_time or 0 for id in failed), default=None)
        if state and state.hosts.streaks:
            first = 0

        async def examine(id: int, statuses: Sequence[str]) -> None:
            try:
                hosts[id] = await self._hosts(id, statuses, deadline)
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                errors.append(FailedCall.of(error, f"job {id}", WITHOUT_HOSTS))
                unexamined.add(id)

        def statuses(id: int, row: Job) -> tuple[str, ...]:
            known = jobs.get(id)
            # Retrying a single node may show in nothing but the statistics.
            news = known is None or not known.counted or is_new_run(known, row) or row.statistics != known.statistics
            over = ended(row.status, row.end_time) and news
            clears = over and first is not None and row.statistics is not None and row.statistics.success > 0
            # After a retry the end is still that of the first run.
            if clears and first and row.end_time is not None and len(row.task_ids) < 2:
                clears = row.end_time >= first
            return (*(("failed",) if id in failed else ()), *(("success",) if clears else ()))

        candidates = sorted(readable)
        if state is None:
            candidates = candidates[-BASELINE_JOBS:]
        asked = {id: statuses(id, readable[id]) for id in candidates}
        await gather_bounded((examine(id, wanted) for id, wanted in asked.items() if wanted), CONCURRENCY)
        return hosts, frozenset(unexamined)

    @staticmethod
    def _is_readable(known: TrackedJob | None, row: Job) -> bool:
        """Whether reading the details changes nothing: see above."""
        if ended(row.status, row.end_time):
            return True
        tasks = row.task_ids or (known.task_ids if known else ())
        return row.status != "pending" and len(tasks) <= 1

    @staticmethod
    def _has_news(known: TrackedJob | None, row: Job) -> bool:
        """Whether the job has failed hosts that have not been asked for."""
        if not failures(row):
            return False
        if known is None or is_new_run(known, row) or failures(row) != known.failures:
            return True
        return not known.counted and ended(row.status, row.end_time)

    async def _hosts(self, id: int, statuses: Sequence[str], deadline: Deadline) -> tuple[HostRow, ...]:
        """The executed hosts of a job in these statuses. Filtered hosts come back on every page and are no results."""

        async def ask(page: int) -> tuple[Sequence[HostRow], int]:
            answer = await self._api.job_details(
                id, statuses=statuses, page=page, pagesize=PAGE_SIZE, deadline=deadline
            )
            return [row for row in answer.hosts if not row.filtered], answer.total

        def key(row: HostRow) -> str:
            return row.instance_id or (name_of(row.host) if row.host else "")

        return tuple((await read_pages("job_details", ask, key)).values())

    # Observe

    def observe(
        self, state: NodemanJobState | None, records: NodemanJobRecords, tally: Tally
    ) -> Observed[NodemanJobState]:
        return Fold(self.config, self.biz, state, records, tally).result()

    # What others read

    async def probe(self, state: NodemanJobState, deadline: Deadline) -> float:
        """A call per interval, one per job with a failing host every five minutes; the details of a job as a trial."""
        finished = [id for id, job in state.jobs.items() if job.counted and job.statistics]
        if finished:
            await self._api.job_details(max(finished), deadline=deadline)
        lists = self._api.lists_jobs
        calls = int(self.config.discover) + (1 if lists and self.config.job_ids else len(self.config.job_ids))
        failing = {streak.run for streak in state.hosts.streaks.values()} if lists else set()
        return 86400.0 * (calls / self.interval + len(failing) / max(LOOK_AGAIN, self.interval))

    def url(self, run: int) -> str:
        return nodeman_job(self._api.web_url, run)

    def failed_executions(self, state: NodemanJobState) -> list[FailedExecution]:
        return [
            FailedExecution(id, job.job_type, status_label(job.status), job.end_time)
            for id, job in sorted(state.jobs.items(), reverse=True)
            if job.counted and (job.status in FAILED or job.status not in NODEMAN_STATUSES)
        ]
