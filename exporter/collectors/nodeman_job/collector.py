"""NodeMan jobs: installs and plugin operations (job_list, job_details).

job_list is the cheap call: it has the status and statistics of every job. Hosts are read only where some failed, or
where a success may clear one that fails. state.py says what a row means, fold.py counts it. Times are unix seconds.

Reading the details of a job whose task is not ready can make the platform end it. So they are read only of jobs that
have ended, or that run for the first time: the platform itself stores RUNNING once it has seen instances. Over the ESB
there is no job_list, so only the details of the configured jobs are read; those of a job that has not begun are read
less and less often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import ClassVar

import msgspec

from exporter.blueking.links import nodeman_job
from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_jobs import HostRow, Job, JobPage
from exporter.blueking.nodeman_subscriptions import Instance
from exporter.blueking.pacing import Deadline
from exporter.collectors.base import FailedCall, FailedExecution, Trial
from exporter.collectors.calls import gather_bounded
from exporter.collectors.failing_hosts import Run
from exporter.collectors.nodeman import CONCURRENCY, NodemanCollector, ended, name_of, read_pages, status_label
from exporter.collectors.nodeman_job.fold import Fold
from exporter.collectors.nodeman_job.metrics import FAMILIES
from exporter.collectors.nodeman_job.state import (
    FAILED,
    NAME,
    MissedRun,
    NodemanJobRecords,
    NodemanJobState,
    TrackedJob,
    failures,
    has_ended,
    is_abandoned,
    is_new_run,
    is_news,
    is_same_job,
    missed_tasks,
)
from exporter.config.schema import NodemanJobConfig
from exporter.errors import ApiError
from exporter.metrics.family import Family
from exporter.model import NODEMAN_STATUSES

LEAST_ROWS = 20
"""Rows of the first page at least, so that a job that became visible late is still on it."""
CHECK_AGAIN = 300.0
"""Seconds between two reads of the details of an ended job that has a failing host."""
LONGEST_WAIT = 1800.0
"""Seconds at most between two reads of a job that has not begun, over the ESB."""


class NodemanJobCollector(NodemanCollector[NodemanJobState, NodemanJobConfig, NodemanApi, NodemanJobRecords]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[NodemanJobState]] = NodemanJobState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    fold: ClassVar[type[Fold]] = Fold

    # Fetch

    async def fetch(self, state: NodemanJobState | None, deadline: Deadline) -> NodemanJobRecords:
        """All jobs that may have changed, and the hosts of those that failed anew. Raises `ApiError`."""
        begun = self._clock.platform()
        records = NodemanJobRecords(floor=state.floor if state else None)
        if self.config.discover:
            if state is None or state.floor is None:
                await self._baseline(records, deadline)
            else:
                await self._discover(state, records, deadline)
        await self._look_up(state, records, deadline)
        records.now = self._clock.platform()
        records.watermark = min(begun, records.now)
        listed = records.rows
        if state:
            await self._check_again(state, records, deadline)
            known, read = state.jobs, records.from_details
            records.rows = {id: row for id, row in listed.items() if id in read or is_news(known.get(id), row)}
            await self._read_missed(state, records, deadline)
        await self._examine(state, records, deadline)
        self._attempts.forget(listed)
        return records

    async def _baseline(self, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Every unfinished job, and those that began recently enough for a retry or a failing host. No other job up to
        `floor` is new."""
        now = self._clock.platform()
        horizon = now - max(self.config.max_finished_age, self.config.failing_host_ttl)

        def old(page: Sequence[Job]) -> bool:
            return any(job.start_time is not None and job.start_time < horizon for job in page)

        unfinished = await self._pages(records, deadline, statuses=("pending", "running"))
        recent = await self._pages(records, deadline, until=old)
        kept = {id: job for id, job in unfinished.items() if not is_abandoned(job, now)}
        records.rows |= kept | recent
        records.floor = min(recent, default=1) - 1

    async def _discover(self, state: NodemanJobState, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Jobs newest first, back to the newest that is known. One that is not watched any more comes back when it
        runs."""
        floor = state.floor or 0
        newest = max(state.jobs, default=floor)
        size = min(PAGE_SIZE, max(LEAST_ROWS, len(state.jobs) + LEAST_ROWS // 2))
        rows = await self._pages(records, deadline, until=lambda page: any(job.id <= newest for job in page), size=size)
        now = self._clock.platform()

        def is_watched(job: Job) -> bool:
            if job.id in state.jobs or job.id > floor:
                return True
            return not ended(job.status, job.end_time) and not is_abandoned(job, now)

        records.rows |= {id: job for id, job in rows.items() if is_watched(job)}

    async def _pages(
        self,
        records: NodemanJobRecords,
        deadline: Deadline,
        *,
        until: Callable[[Sequence[Job]], bool] = lambda page: False,
        statuses: Sequence[str] = (),
        size: int = PAGE_SIZE,
    ) -> dict[int, Job]:
        """Jobs of the business, newest first, up to the page for which `until` is true. Rows that cannot be read are
        noted in `records`."""

        async def ask(page: int, size: int) -> tuple[Sequence[Job | None], int]:
            answer = await self._api.job_list(
                bk_biz_id=self.biz, statuses=statuses, page=page, pagesize=size, deadline=deadline
            )
            records.without_id += answer.rows.count(None)
            return answer.rows, answer.total

        pages = await read_pages(
            "job_list", ask, attrgetter("id"), self._page_size, size=size, until=until, pass_over=True
        )
        if not statuses:  # every row is in the list without a filter, too
            records.unreadable |= {older or 0: count for older, count in pages.unreadable.items()}
        return pages.rows

    async def _look_up(self, state: NodemanJobState | None, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Read the known and configured jobs that the list does not show.

        An unavailable job is left as it was, as long as another one is available; its error is noted. A known job that
        no longer exists is gone.
        """
        known, rows = state.jobs if state else {}, records.rows
        ids = sorted((set(self.config.job_ids) | known.keys()) - rows.keys())
        foreign: set[int] = set()
        if self._api.lists_jobs:

            async def ask(some: Sequence[int]) -> JobPage:
                return await self._api.job_list(job_ids=some, pagesize=len(some), deadline=deadline)

            pages, _ = await self.ask_for_many(ids, ask)
            for job in (job for _, page in pages for job in page.rows if job):
                if not job.bk_biz_ids or self.biz in job.bk_biz_ids:
                    rows[job.id] = job
                else:
                    foreign.add(job.id)
        else:
            now = self._clock.platform()
            ids = [id for id in ids if id not in known or _is_due(known[id], now)]
        text = f"it does not touch business {self.biz}"
        refused = {id: ApiError("not_found", text, api="job_list") for id in sorted(foreign)}

        async def read(id: int) -> None:
            # job_list leaves out forbidden jobs; the details show whether the job is gone or forbidden.
            try:
                rows[id] = (await self._api.job_details(id, deadline=deadline)).job
                records.from_details.add(id)
            except ApiError as error:
                if error.reason == "not_found" and id in known:
                    records.gone.add(id)
                elif self._attempts.give_up(id, error):
                    refused[id] = error
                    # After it has been counted, a job needs no call in every poll.
                    if id in known and known[id].counted and rows and id not in self.config.job_ids:
                        records.gone.add(id)
                else:
                    raise
            if len(refused) >= CONCURRENCY and not rows:
                first = next(iter(refused))
                raise refused[first].named(f"job {first}")

        await gather_bounded((read(id) for id in ids if id not in rows and id not in foreign), CONCURRENCY)
        for id, error in refused.items():
            configured = id in self.config.job_ids
            records.errors.append(FailedCall.of(error, f"job {id}", "left as it was", configured=configured))
        # An id that does not exist is a mistake in the configuration; it must not fail the poll of the other jobs.
        fatal = [id for id, error in refused.items() if error.reason != "not_found" or not self.config.discover]
        if fatal and not rows:
            raise refused[fatal[0]].named(f"job {fatal[0]}")

    async def _check_again(self, state: NodemanJobState, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Replace the rows of ended jobs with failing hosts by what their details say: a retry of a single node shows
        in the list only after a client has read the details."""
        if not self._api.lists_jobs:
            return
        rows = records.rows
        runs = {run for streak in state.hosts.streaks.values() for run, _ in streak.runs}
        failing = [id for id in sorted(state.jobs) if id in runs]

        def due(id: int) -> bool:
            known, row = state.jobs[id], rows.get(id)
            counted = row is not None and known.counted and not is_new_run(known, row)
            return counted and records.now - max(known.last_checked, known.finished or 0.0) >= CHECK_AGAIN

        async def read(id: int) -> None:
            try:
                job = (await self._api.job_details(id, deadline=deadline)).job
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                records.errors.append(FailedCall.of(error, f"job {id}", "left as it was"))
            else:
                row = rows[id]
                rows[id] = msgspec.structs.replace(
                    job, task_ids=row.task_ids, subscription_id=row.subscription_id, bk_biz_ids=row.bk_biz_ids
                )
            records.from_details.add(id)

        await gather_bounded((read(id) for id in failing if due(id)), CONCURRENCY)

    async def _read_missed(self, state: NodemanJobState, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Read how the runs ended that were retried since the last poll: the subscription keeps what each task did."""
        wanted: list[tuple[int, int]] = []
        for id, row in records.rows.items():
            known = state.jobs.get(id)
            if known is None and (state.floor is None or id <= state.floor):
                continue
            wanted += [(id, task) for task in missed_tasks(known if is_same_job(known, row) else None, row)]

        async def read(id: int, task: int) -> MissedRun:
            try:
                return await self._missed_run(records.rows[id], task, deadline)
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                records.errors.append(FailedCall.of(error, f"job {id}", "a run counted without host results"))
                return MissedRun()

        runs = await gather_bounded((read(id, task) for id, task in wanted), CONCURRENCY)
        for (id, _), run in zip(wanted, runs, strict=True):
            records.missed.setdefault(id, []).append(run)

    async def _missed_run(self, row: Job, task: int, deadline: Deadline) -> MissedRun:
        """The instances of a job as of the end of this task, of which the failed ones with their steps."""
        if row.subscription_id is None:
            return MissedRun()
        subscription_id = row.subscription_id
        tasks = [id for id in row.task_ids if id <= task]
        counter: dict[str, int] | None = None

        async def ask(page: int, size: int) -> tuple[Sequence[Instance], int | None]:
            nonlocal counter
            answer = await self._api.task_result(
                subscription_id, task_ids=tasks, statuses=("failed",), page=page, pagesize=size,
                with_steps=lambda instance: True, deadline=deadline,
            )  # fmt: skip
            counter = answer.counter
            return answer.instances, answer.total

        pages = await read_pages("task_result", ask, lambda instance: instance.instance_id, self._page_size)
        return MissedRun(counter, tuple(pages.rows.values()))

    async def _examine(self, state: NodemanJobState | None, records: NodemanJobRecords, deadline: Deadline) -> None:
        """Read the hosts of the jobs that failed anew or may clear a host that fails."""
        wanted = self._wanted(state, records)
        # Failures first: a success is worth a call only while a host fails.
        order = sorted(wanted, key=lambda id: ("failed" not in wanted[id], -id))

        async def read(id: int) -> tuple[HostRow, ...]:
            return await self._hosts(id, wanted[id], deadline)

        await self.examine(order, records, read, lambda id: f"job {id}", deadline)

    def _wanted(self, state: NodemanJobState | None, records: NodemanJobRecords) -> dict[int, tuple[str, ...]]:
        """The jobs whose hosts are to be read, and in which statuses."""
        jobs, rows = state.jobs if state else {}, records.rows
        known = {id: jobs[id] if id in jobs and is_same_job(jobs[id], row) else None for id, row in rows.items()}
        readable = {id: row for id, row in rows.items() if _is_readable(known[id], row)}
        failed = {id for id, row in readable.items() if _has_failed_anew(known[id], row)}
        # A success before all failures clears nothing.
        first = min((rows[id].start_time or 0 for id in failed), default=None)
        if state and state.hosts.streaks:
            first = 0

        def may_clear(known: TrackedJob | None, row: Job) -> bool:
            # Retrying a single node may show in nothing but the statistics.
            news = known is None or not known.counted or is_new_run(known, row) or row.statistics != known.statistics
            if not (news or (known and known.unread)) or not has_ended(known, row, records.now):
                return False
            if first is None or row.statistics is None or row.statistics.success <= 0:
                return False
            # After a retry the end is still that of the first run.
            return not first or row.end_time is None or len(row.task_ids) > 1 or row.end_time >= first

        wanted = {
            id: (
                *(("failed",) if id in failed else ()),
                *(("success",) if may_clear(known[id], row) else ()),
            )
            for id, row in readable.items()
        }
        return {id: statuses for id, statuses in wanted.items() if statuses}

    async def _hosts(self, id: int, statuses: Sequence[str], deadline: Deadline) -> tuple[HostRow, ...]:
        """The executed hosts of a job in these statuses. Filtered hosts come back on every page and are no results."""

        async def ask(page: int, size: int) -> tuple[Sequence[HostRow], int]:
            answer = await self._api.job_details(id, statuses=statuses, page=page, pagesize=size, deadline=deadline)
            return [row for row in answer.hosts if not row.filtered], answer.total

        def key(row: HostRow) -> str:
            return row.instance_id or (name_of(row.host) if row.host else "")

        pages = await read_pages("job_details", ask, key, self._page_size)
        return tuple(pages.rows.values())

    # What others read

    async def probe(self, state: NodemanJobState, deadline: Deadline) -> Trial:
        """One call per interval, one per job with a failing host every five minutes; the details of a job as a trial.

        job_list never refuses, so an empty list proves nothing. Details are refused for a job that touches a forbidden
        business, so the trial uses a job that touches this business only.
        """
        notes: list[str] = []
        certain = True
        if self.config.discover:
            page = await self._api.job_list(bk_biz_id=self.biz, pagesize=LEAST_ROWS, deadline=deadline)
            jobs = [job for job in page.rows if job and job.statistics and has_ended(None, job, self._clock.platform())]
            own = [job.id for job in jobs if job.bk_biz_ids == (self.biz,)]
            if not page.rows and not state.jobs:
                certain = False
                notes.append(
                    f"job_list is empty: a forbidden or unknown business {self.biz} cannot be told apart from an idle "
                    "business; look in NodeMan whether the user sees its task history. It is empty too when no user "
                    "arrives: then the gateway's administrator has to let bk_username of this application pass "
                    "(from_username) and to switch skip_user_verification off"
                )
            elif own:
                await self._api.job_details(own[0], deadline=deadline)
            elif jobs:
                try:
                    await self._api.job_details(jobs[0].id, deadline=deadline)
                except ApiError as error:
                    if error.reason != "permission":
                        raise
                    notes.append(f"job {jobs[0].id} touches other businesses too, and its details are refused: {error}")
        elif finished := [id for id, job in state.jobs.items() if job.counted and job.statistics]:
            await self._api.job_details(max(finished), deadline=deadline)
        lists = self._api.lists_jobs
        calls = int(self.config.discover) + (1 if lists and self.config.job_ids else len(self.config.job_ids))
        failing = {streak.run for streak in state.hosts.streaks.values()} if lists else set()
        checks = len(failing) / max(CHECK_AGAIN, self.interval)
        return Trial(86400.0 * (calls / self.interval + checks), tuple(notes), certain)

    def url(self, run: Run) -> str:
        return nodeman_job(self._api.web_url, run)

    def failed_executions(self, state: NodemanJobState) -> list[FailedExecution]:
        return [
            FailedExecution(id, job.job_type, status_label(job.status), job.end_time)
            for id, job in sorted(state.jobs.items(), reverse=True)
            if job.counted and (job.status in FAILED or job.status not in NODEMAN_STATUSES)
        ]


def _is_due(known: TrackedJob, now: float) -> bool:
    """Whether to ask for a job again over the ESB: one that has not begun after twice the time that it has waited."""
    if known.status != "pending" or known.start_time is None:
        return True
    return now - known.last_checked >= min(LONGEST_WAIT, known.last_checked - known.start_time)


def _is_readable(known: TrackedJob | None, row: Job) -> bool:
    """Whether reading the details changes nothing on the platform."""
    if ended(row.status, row.end_time):
        return True
    tasks = row.task_ids or (known.task_ids if known else ())
    return row.status != "pending" and len(tasks) <= 1


def _has_failed_anew(known: TrackedJob | None, row: Job) -> bool:
    """Whether the job has failed hosts that have not been read, or not to their end."""
    if known and known.host_running:
        return True
    if not failures(row):
        return False
    if known is None or known.unread or is_new_run(known, row) or failures(row) != known.failures:
        return True
    return not known.counted and ended(row.status, row.end_time)
