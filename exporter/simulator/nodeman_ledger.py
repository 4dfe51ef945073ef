"""The truth: what happened in a simulated NodeMan, per business. Tests compare the exporter's counts with it.

The ledger reads the records of the world, not the answers of its API, and knows nothing about polls. `since` is
exclusive, `until` inclusive; both are unix seconds. The default of `until` is now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exporter.simulator.nodeman_world import UNFINISHED, Job, NodemanWorld, Record, Target

Collector = Literal["nodeman_job", "nodeman_subscription", "nodeman_task"]

COLLECTORS: tuple[Collector, ...] = ("nodeman_job", "nodeman_subscription", "nodeman_task")

NO_STEP = "other"
"""The step of a failure without a failed sub-step: a revoked run, a service instance, NodeMan 1.x, and the second step
of a subscription in the answers about a job."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one attempt on one host ended. `bk_host_id` as known then; `step` and `code` are empty after a success."""

    at: float
    target: Target
    bk_host_id: int | None
    job_type: str
    failed: bool
    step: str
    code: str


@dataclass(frozen=True, slots=True)
class Failing:
    """A host that fails now: its newest failure, and the first of its failures without a success after it."""

    newest: Result
    since: float
    streak: int


class NodemanLedger:
    """The truth about `world`. The first argument of each method is the business."""

    def __init__(self, world: NodemanWorld) -> None:
        self.world = world

    def jobs_finished(self, biz: int, since: float = 0.0, until: float | None = None) -> Counter[tuple[str, str]]:
        """Jobs by (job_type, status in lower case) that the platform showed as ended, once per run.

        A revoked job counts as terminated. Within 30 s the platform replaces this status by one computed from the
        hosts: a later reader sees failed, part_failed or success.
        """
        until = self._now(until)
        return Counter(
            (job.job_type, status.lower()) for job in self._jobs(biz) for at, status in job.ends if since < at <= until
        )

    def jobs_unfinished(self, biz: int) -> Counter[tuple[str, str]]:
        """Jobs by (job_type, status) that the platform shows as unfinished now."""
        self.world.advance()
        return Counter((job.job_type, job.status.lower()) for job in self._jobs(biz) if job.status in UNFINISHED)

    def job_instances(self, biz: int, max_finished_age: float = 86400.0) -> Counter[tuple[str, str]]:
        """`statistics` summed by (job_type, status) over the unfinished and the recently ended jobs; no zeros."""
        now = self._now(None)
        counts: Counter[tuple[str, str]] = Counter()
        for job in self._jobs(biz):
            if job.status in UNFINISHED or (job.end_time is not None and now - job.end_time <= max_finished_age):
                for name, count in job.statistics.items():
                    if name != "total_count":
                        counts[job.job_type, name.removesuffix("_count")] += max(0, count)
        return +counts

    def subscription_instances(self, subscription_id: int) -> Counter[str]:
        """Instances of the newest task by status. If the creation of the newest task has failed: of all tasks."""
        now = self._now(None)
        subscription = self.world.subscriptions[subscription_id]
        task = subscription.tasks[max(subscription.tasks)]
        newest = subscription.latest(subscription.tasks if task.err_msg else [task.id])
        return Counter(record.status(now).lower() for record in newest)

    def host_failures(
        self,
        biz: int,
        collector: Collector,
        since: float = 0.0,
        until: float | None = None,
        only: Collection[int] | None = None,
    ) -> Counter[tuple[str, str, str, str]]:
        """Failed attempts by (collector, job_type, step, code), once per host and run. `only`: job or subscription."""
        return Counter(
            (collector, result.job_type, result.step, result.code)
            for result in self.results(biz, collector, until, only)
            if result.failed and result.at > since
        )

    def hosts_failing(
        self, biz: int, collector: Collector, until: float | None = None, only: Collection[int] | None = None
    ) -> dict[Target, Failing]:
        """The hosts whose newest result is a failure. The platform shows whole seconds: of a failure and a success in
        the same second, the success counts as the newer one."""
        failing: dict[Target, Failing] = {}
        for result in sorted(
            self.results(biz, collector, until, only), key=lambda result: (int(result.at), not result.failed)
        ):
            before = failing.pop(result.target, None)
            if result.failed:
                since, streak = (before.since, before.streak) if before else (result.at, 0)
                failing[result.target] = Failing(result, since, streak + 1)
        return failing

    def results(
        self, biz: int, collector: Collector, until: float | None = None, only: Collection[int] | None = None
    ) -> list[Result]:
        """Every ended attempt on a host of the business that the collector can read, oldest first."""
        until = self._now(until)
        found = [r for r in self._results(biz, collector, only) if r.at <= until]
        return sorted(found, key=lambda result: result.at)

    def as_json(
        self, biz: int, subscription_ids: Collection[int], since: float = 0.0, until: float | None = None
    ) -> dict[str, object]:
        """The truth about a business as lists of {labels, "value"}, for tests in other processes. `subscription_ids`:
        the subscriptions to include, since each job has one too."""
        failures: Counter[tuple[str, ...]] = Counter()
        hosts: list[dict[str, object]] = []
        for collector in COLLECTORS:
            only = subscription_ids if collector == "nodeman_subscription" else None
            failures.update(self.host_failures(biz, collector, since, until, only))
            for target, failing in self.hosts_failing(biz, collector, until, only).items():
                newest = failing.newest
                hosts.append({
                    "collector": collector, "bk_cloud_id": str(target.bk_cloud_id),
                    "bk_host_id": str(newest.bk_host_id or ""), "ip": target.ip or target.ipv6,
                    "job_type": newest.job_type, "step": newest.step, "code": newest.code, "since": failing.since,
                })  # fmt: skip
        job = ("job_type", "status")
        return {
            "jobs_finished": rows(job, self.jobs_finished(biz, since, until)),
            "jobs_unfinished": rows(job, self.jobs_unfinished(biz)),
            "job_instances": rows(job, self.job_instances(biz)),
            "host_failures": rows(("collector", "job_type", "step", "code"), failures),
            "hosts_failing": hosts,
        }

    def _results(self, biz: int, collector: Collector, only: Collection[int] | None) -> Iterator[Result]:
        if collector == "nodeman_task":
            for task in self.world.legacy_tasks.values():
                if task.bk_biz_id == biz and (only is None or task.id in only):
                    for host in task.hosts:
                        step, code = (NO_STEP, host.err_code) if host.err_code else ("", "")
                        yield Result(host.end, host.target, None, task.job_type, bool(host.err_code), step, code)
            return
        for job_type, second, records in self._records(biz, collector, only):
            for record in records:
                if record.target.bk_biz_id == biz:
                    yield from _attempts(record, job_type, second)

    def _records(
        self, biz: int, collector: Collector, only: Collection[int] | None
    ) -> Iterator[tuple[str, str, Iterable[Record]]]:
        """Records with the job types of their first step and, if an answer shows it, of their second step."""
        if collector == "nodeman_job":
            for job in self._jobs(biz):
                if only is None or job.id in only:
                    for i in job.task_ids:
                        yield job.job_type, "", job.subscription.tasks[i].records
        else:
            for subscription in self.world.subscriptions.values():
                if only is None or subscription.id in only:
                    for task in subscription.tasks.values():
                        yield subscription.action, subscription.second, task.records

    def _jobs(self, biz: int) -> Iterator[Job]:
        return (job for job in self.world.jobs.values() if biz in job.bk_biz_scope)

    def _now(self, until: float | None) -> float:
        now = self.world.advance()
        return now if until is None else until


def rows(names: Sequence[str], counts: Mapping[Any, int]) -> list[dict[str, object]]:
    """Counts as a list of {labels, "value"}."""
    return [{**dict(zip(names, labels, strict=True)), "value": count} for labels, count in sorted(counts.items())]


def _attempts(record: Record, first: str, second: str) -> Iterator[Result]:
    if record.removed:
        return
    for run in record.runs:
        step, job_type = "", first
        if run.failed:
            step, last = NO_STEP, run.first + len(run.ends) - 1
            in_first = last < record.first_steps
            if run.ends and run.failed_step and record.target.service_id is None and (in_first or second):
                step = record.steps[last].code
                job_type = first if in_first else second
        yield Result(run.end, record.target, record.host_id(run.end), job_type, run.failed, step, "")
