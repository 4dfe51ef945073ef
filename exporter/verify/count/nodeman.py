"""The plain counts of NodeMan 2.x jobs, its subscriptions, and NodeMan 1.x tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_jobs import HostRow, Job
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.nodeman_subscriptions import Instance
from exporter.clock import Clock
from exporter.collectors.base import FinishedRun
from exporter.collectors.calls import gather_bounded
from exporter.config.schema import NodemanJobConfig, NodemanSubscriptionConfig, NodemanTaskConfig
from exporter.errors import ApiError
from exporter.metrics.family import Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED, UNKNOWN, Host, Scope
from exporter.verify.count.base import CONCURRENCY, PAGE, Finished, Recount, Recounted
from exporter.verify.count.hosts import HostResults, count_failing

DURATION = "blueking_nodeman_job_duration_seconds"
HOST_FAILURES = "blueking_nodeman_host_failures_total"
HOSTS_FAILING = "blueking_nodeman_hosts_failing"

REVOKED = "terminated"
WEEK = 7 * 86400.0
"""Seconds after which an unfinished NodeMan job is not watched any more."""


class NodemanJobRecount(Recount[NodemanJobConfig, NodemanApi]):
    """`Recount` of NodeMan jobs: the list back to the oldest job that is watched, and the hosts of the jobs that failed
    or may have cleared a host."""

    what = "job"

    def __init__(self, scope: Scope, config: NodemanJobConfig, api: NodemanApi, seconds: float, clock: Clock) -> None:
        super().__init__(scope, config, api, seconds, clock)
        self._first: dict[int, Job] | None = None
        """What the first poll saw."""
        self._floor: int | None = None
        self._watched: set[int] = set()
        self._hosts: dict[int, dict[str, list[HostRow]]] = {}
        """What the polls saw of each host of a job, as often as its end changed."""
        self._missed: dict[int, list[Instance]] = {}
        """The failed hosts of runs that ended and were retried between two polls."""

    def note(self, records: Any) -> None:
        if self._first is None:
            self._first, self._floor = dict(records.rows), records.floor
        self._watched |= records.rows.keys()
        for id, hosts in records.hosts.items():
            for row in hosts:
                seen = self._hosts.setdefault(id, {}).setdefault(_instance(row), [])
                if not seen or seen[-1].end_time != row.end_time:
                    seen.append(row)
        for id, runs in records.missed.items():
            self._missed.setdefault(id, []).extend(instance for run in runs for instance in run.failed)

    async def read(self, finished: Finished) -> Recounted:
        first = self._first or {}
        rows = await self._list() if self.config.discover and self._floor is not None else {}
        rows |= await self._look_up(sorted((self._watched | set(self.config.job_ids)) - rows.keys()))
        recounted, now = Recounted(), self.clock.platform()
        recounted.gone = {id for id in finished if id not in rows}
        recounted.samples.expect("blueking_nodeman_jobs_finished_total")
        recounted.samples.expect("blueking_nodeman_jobs_unfinished", "blueking_nodeman_job_instances")
        recounted.samples.expect(f"{DURATION}_count", f"{DURATION}_sum")
        new: set[int] = set()
        for id, row in sorted(rows.items()):
            is_new = id not in first and (self._floor is None or id > self._floor)
            if not (is_new or id in self._watched):
                continue
            runs = list(finished.get(id, ()))
            is_counted = is_new or (id in first and not _job_ended(first[id]))
            self._count(recounted, row, runs, is_counted=is_counted, now=now)
            if is_counted and (runs or _job_ended(row)) and (id not in first or first[id].end_time is None):
                # The platform keeps the end of the first run.
                recounted.samples.observe(DURATION, (row.job_type,), row.start_time, row.end_time, scale=1)
            failures = row.statistics is not None and row.statistics.failed > 0
            if is_new and failures and len(runs) <= 1 and len(row.task_ids) <= 1:
                new.add(id)
            elif (failures or len(runs) > 1) and (is_new or runs or not _job_ended(row)):
                recounted.at_least.add(HOST_FAILURES)
        await self._count_hosts(recounted, rows, new)
        return recounted

    async def _list(self) -> dict[int, Job]:
        least = min([(self._floor or 0) + 1, *(self._first or {})])
        rows: dict[int, Job] = {}
        number = 1
        while True:
            page = await self.api.job_list(bk_biz_id=self.biz, page=number, pagesize=PAGE, deadline=self.deadline())
            jobs = [job for job in page.rows if job is not None]
            rows |= {job.id: job for job in jobs}
            if len(page.rows) < PAGE or number * PAGE >= page.total or any(job.id < least for job in jobs):
                return rows
            number += 1

    async def _look_up(self, ids: Sequence[int]) -> dict[int, Job]:
        rows: dict[int, Job] = {}
        if self.api.lists_jobs:
            for start in range(0, len(ids), PAGE):
                page = await self.api.job_list(
                    job_ids=ids[start : start + PAGE], pagesize=PAGE, deadline=self.deadline()
                )
                rows |= {job.id: job for job in page.rows if job and self._is_ours(job)}
            return rows
        for id in ids:
            try:
                rows[id] = (await self.api.job_details(id, deadline=self.deadline())).job
            except ApiError as error:
                if error.reason != "not_found":
                    raise
        return rows

    def _is_ours(self, job: Job) -> bool:
        return not job.bk_biz_ids or self.biz in job.bk_biz_ids

    def _count(
        self, recounted: Recounted, row: Job, runs: Sequence[FinishedRun], *, is_counted: bool, now: float
    ) -> None:
        if row.status not in NODEMAN_STATUSES:
            recounted.unknown.add(("nodeman_job.status", row.status))
        earlier = [run.status for run in runs]
        if _job_ended(row) and (is_counted or runs):
            status = row.status if row.status in NODEMAN_STATUSES else UNKNOWN
            if runs and runs[-1].status == REVOKED:
                # The platform shows a revoked job as failed some time later; it has ended once.
                status = REVOKED
            recounted.runs[row.id] = status
            earlier = [*earlier[:-1], status]
        for status in earlier:
            recounted.samples.add("blueking_nodeman_jobs_finished_total", (row.job_type, status))
        abandoned = row.end_time is None and row.start_time is not None and row.start_time < now - WEEK
        if not _job_ended(row) and not abandoned:
            status = row.status if row.status in NODEMAN_STATUSES else UNKNOWN
            recounted.samples.add("blueking_nodeman_jobs_unfinished", (row.job_type, status))
        recent = not _job_ended(row) or bool(runs) or (row.end_time or now) >= now - self.config.max_finished_age
        if row.statistics is not None and recent and not abandoned:
            names = ("pending", "running", "success", "failed", "ignored")
            numbers = {name: getattr(row.statistics, name) for name in names}
            numbers["other"] = row.statistics.total - sum(numbers.values())
            for name, number in numbers.items():
                recounted.samples.add("blueking_nodeman_job_instances", (row.job_type, name), max(0, number))

    async def _count_hosts(self, recounted: Recounted, rows: Mapping[int, Job], new: Set[int]) -> None:
        """The failed hosts of the `new` jobs, and the hosts that fail now, by the results of all jobs."""
        recounted.samples.expect(HOST_FAILURES)
        results = HostResults()
        failed = [job for job in rows.values() if _is_readable(job) and job.statistics and job.statistics.failed > 0]
        pages = await gather_bounded((self._read_hosts(job.id, "failed") for job in failed), CONCURRENCY)
        for job, hosts in zip(failed, pages, strict=True):
            for host in self._own(hosts):
                if host.status == "failed" and job.id in new:
                    recounted.samples.add(HOST_FAILURES, _labels(job, host.step(job)))
            self._add(results, job, hosts)
        shown = {(job.id, _instance(row)) for job, hosts in zip(failed, pages, strict=True) for row in hosts}
        for id in self._hosts.keys() & rows:
            for name, seen in self._hosts[id].items():
                # The newest one is the one that has been read again.
                self._add(results, rows[id], seen[:-1] if (id, name) in shown else seen)
        for id in self._missed.keys() & rows:
            for instance in self._missed[id]:
                if instance.host and instance.bk_biz_id in (None, self.biz) and instance.status == "failed":
                    end = instance.finish_time or rows[id].end_time
                    results.add(instance.host, id, end, _labels(rows[id], instance.failure[1]))
        first = min((streak[0].end for streak in results.failing()), default=None)
        if first is not None:
            succeeded = [job for job in rows.values() if _may_clear(job, first)]
            pages = await gather_bounded((self._read_hosts(job.id, "success") for job in succeeded), CONCURRENCY)
            for job, hosts in zip(succeeded, pages, strict=True):
                self._add(results, job, hosts)
        failing = results.failing(self.clock.platform() - self.config.failing_host_ttl)
        count_failing(recounted, "blueking_nodeman", results, failing, self.config.max_failing_hosts)

    def _add(self, results: HostResults, job: Job, hosts: Iterable[HostRow]) -> None:
        """Add the results of the hosts of this business."""
        for row in self._own(hosts):
            if row.host and row.status in ("failed", "success"):
                labels = _labels(job, row.step(job)) if row.status == "failed" else None
                results.add(row.host, job.id, row.end_time or job.end_time, labels)

    def _own(self, hosts: Iterable[HostRow]) -> list[HostRow]:
        return [row for row in hosts if row.bk_biz_id in (None, self.biz)]

    async def _read_hosts(self, id: int, status: str) -> list[HostRow]:
        hosts: dict[str, HostRow] = {}
        number, total = 1, 1
        while (number - 1) * PAGE < total:
            page = await self.api.job_details(
                id, statuses=(status,), page=number, pagesize=PAGE, deadline=self.deadline()
            )
            hosts |= {_instance(row): row for row in page.hosts if not row.filtered}
            number, total = number + 1, page.total
        return list(hosts.values())


def _instance(row: HostRow) -> str:
    return row.instance_id or str(row.host)


def _labels(job: Job, step: str) -> Labels:
    return ("nodeman_job", job.job_type, step, "")


def _is_readable(job: Job) -> bool:
    """Whether reading the details changes nothing on the platform."""
    return _job_ended(job) or (job.status != "pending" and len(job.task_ids) <= 1)


def _may_clear(job: Job, first: float) -> bool:
    """Whether a host may have succeeded in this job after the first failure. After a retry the job keeps the end of the
    first run."""
    late = job.end_time is None or len(job.task_ids) > 1 or job.end_time >= first
    return _job_ended(job) and late and job.statistics is not None and job.statistics.success > 0


def _job_ended(row: Job) -> bool:
    return row.end_time is not None if row.status not in NODEMAN_STATUSES else row.status not in NODEMAN_UNFINISHED


class SubscriptionRecount(Recount[NodemanSubscriptionConfig, NodemanApi]):
    """`Recount` of NodeMan subscriptions: the counter of each, and the instances that have failed."""

    what = "subscription"

    async def read(self, finished: Finished) -> Recounted:
        recounted = Recounted()
        recounted.samples.expect("blueking_nodeman_subscription_instances")
        hosts = LatestResults()
        for id in self.config.subscription_ids:
            try:
                counter = (await self.api.task_result(id, deadline=self.deadline())).counter
            except ApiError as error:
                raise error.named(f"subscription {id}") from None
            if counter is None:
                recounted.notes.append(f"subscription {id}: the platform gives no counter, so nothing is compared")
                recounted.samples.pop("blueking_nodeman_subscription_instances", None)
                return recounted
            for status, number in counter.items():
                if status not in NODEMAN_STATUSES:
                    recounted.unknown.add(("nodeman_subscription.status", status))
                label = status if status in NODEMAN_STATUSES else UNKNOWN
                recounted.samples.add("blueking_nodeman_subscription_instances", (str(id), label), max(0, number))
            for row in await self._read_failed(id) if counter.get("failed") else ():
                if row.host and row.status == "failed" and row.bk_biz_id in (None, self.biz):
                    hosts.add(row.host, row.finish_time, ("nodeman_subscription", *row.failure, ""))
        hosts.count(recounted, self.clock.platform() - self.config.failing_host_ttl)
        return recounted

    async def _read_failed(self, id: int) -> list[Instance]:
        rows: dict[str, Instance] = {}
        number, total = 1, 1
        while (number - 1) * PAGE < total:
            page = await self.api.task_result(
                id, statuses=("failed",), page=number, pagesize=PAGE,
                with_steps=lambda instance: True, deadline=self.deadline(),
            )  # fmt: skip
            rows |= {row.instance_id: row for row in page.instances}
            number, total = number + 1, page.total or 0
        return list(rows.values())


class TaskRecount(Recount[NodemanTaskConfig, NodemanLegacyApi]):
    """`Recount` of NodeMan 1.x tasks: the hosts of each, by status and by system."""

    what = "task"

    async def read(self, finished: Finished) -> Recounted:
        recounted, hosts = Recounted(), LatestResults()
        for id in self.config.job_ids:
            try:
                task = await self.api.get_task_info(self.biz, id, deadline=self.deadline())
            except ApiError as error:
                raise error.named(f"task {id}") from None
            for status, number in task.status_count.items():
                recounted.samples.add("blueking_nodeman_task_hosts", (str(id), task.job_type, status), max(0, number))
            for system, number in task.os_count.items():
                recounted.samples.add(
                    "blueking_nodeman_task_hosts_by_os", (str(id), task.job_type, system), max(0, number)
                )
            for host in task.hosts:
                if host.status not in NODEMAN_STATUSES:
                    recounted.unknown.add(("nodeman_task.status", host.status))
                if host.host and host.status in ("failed", "success"):
                    labels = ("nodeman_task", task.job_type, host.step, host.err_code)
                    hosts.add(host.host, task.end_time, labels if host.status == "failed" else None)
        hosts.count(recounted, self.clock.platform() - self.config.failing_host_ttl)
        return recounted


class LatestResults:
    """The newest result of each host in each of several subscriptions or tasks, which do not show earlier ones."""

    def __init__(self) -> None:
        self._results: dict[str, list[tuple[int | None, Labels | None]]] = {}

    def add(self, host: Host, end: int | None, labels: Labels | None) -> None:
        """Add a result; `labels`: of a failure, None for a success."""
        self._results.setdefault(host.identity, []).append((end, labels))

    def count(self, recounted: Recounted, since: float) -> None:
        """Count the hosts that have failed after `since`, unless it depends on the order of results. A poller may show
        more: hosts that run again, or that have left, after they failed."""
        failed = [of for of in self._results.values() if any(labels is not None for _, labels in of)]
        several = sum(len(of) > 1 for of in failed)
        if several:
            recounted.notes.append(f"{several} hosts have several results: the hosts that fail are not compared")
            return
        recounted.samples.expect(HOSTS_FAILING)
        recounted.at_least.add(HOSTS_FAILING)
        for ((end, labels),) in failed:
            if labels is not None and (end is None or end >= since):
                recounted.samples.add(HOSTS_FAILING, labels)
