"""NodeMan subscriptions: how many instances are in which status, which hosts fail at which step (task_result).

The newest record with the counter of all statuses is one row: that is the poll of a subscription in which nothing
moves. Other rows are asked for by status or by instance, in pages, never all at once: ten thousand instances are 25 MB.
A run of an instance is its record and finish. Times are unix seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from exporter.blueking.nodeman import PAGE_SIZE, Instance, NodemanApi
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Collector, FailedExecution, Observed, Platforms
from exporter.collectors.failing_hosts import HostResult
from exporter.collectors.nodeman import (
    FAMILIES,
    FUTURE,
    NodemanCollector,
    NodemanState,
    NodemanView,
    count_failure,
    ended,
    is_news,
    known_end,
    name_of,
    read_pages,
    status_label,
)
from exporter.config.schema import NodemanSubscriptionConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.family import Family, Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED

STEP_DURATION = "blueking_nodeman_step_duration_seconds"
STEP_BUCKETS = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

LOOK_AGAIN = 300.0
"""Seconds after which the failed instances are read again although no counter has moved: one may have failed anew. More
of them than fit on a page are read less often."""
FEW = 10
"""Failed instances that are read in every poll: so few cost less than a count that is missing."""
NEWEST = 100
"""Instances of the newest records that are read for the newest finish."""

MOVED = ("success", *NODEMAN_UNFINISHED, "removed", "filtered", "ignored", "terminated")
"""What an instance that had failed may have become."""

Run = tuple[int, float]
"""Record and finish of an instance's run: retrying a node keeps the record and its start."""


class Subscription(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a subscription. `born`: when it was first asked for, a run that ended before is not counted;
    `looked`: when all failed instances were last read, 0 before it has answered; `newest`: the newest record.
    `runs`: the newest finished run of the failed instances, and of the others that were read last; `failed`: whose
    run has failed. `action`: of any instance, for those that have no steps."""

    counter: dict[str, int] = {}
    born: float = 0.0
    looked: float = 0.0
    newest: int = 0
    runs: dict[str, Run] = {}
    failed: frozenset[str] = frozenset()
    last_finished: float | None = None
    action: str = ""


class SubscriptionState(NodemanState, frozen=True, kw_only=True):
    """By subscription id."""

    subscriptions: dict[int, Subscription]


class Answer(msgspec.Struct, frozen=True):
    """What one subscription answered. `newest`: the newest record. `instances`: rows that are news, with their steps
    where they show a run that is not known; `complete`: all failed ones are among them, so that one that is not no
    longer exists; `renewed`: so are the newest ones."""

    counter: dict[str, int]
    newest: int
    instances: tuple[Instance, ...] = ()
    complete: bool = False
    renewed: bool = False


class SubscriptionRecords(msgspec.Struct, frozen=True):
    """What one poll, begun at `watermark`, brought by subscription id; `errors` of those that are missing in it."""

    now: float
    watermark: float
    answers: dict[int, Answer]
    errors: tuple[str, ...]

    @property
    def size(self) -> int:
        """See `Records`."""
        return sum(len(answer.instances) for answer in self.answers.values())


class NodemanSubscriptionCollector(NodemanCollector[NodemanSubscriptionConfig, NodemanApi]):
    """See `Collector`."""

    name: ClassVar[str] = "nodeman_subscription"
    state_type: ClassVar[type[SubscriptionState]] = SubscriptionState
    families: ClassVar[tuple[Family, ...]]

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock, hold: float) -> Collector | None:
        if platforms.nodeman is None or not config.collectors.nodeman_subscription.enabled:
            return None
        return cls(config.scope, config.collectors.nodeman_subscription, platforms.nodeman, clock, hold)

    # Fetch

    async def fetch(self, state: SubscriptionState | None, deadline: Deadline) -> SubscriptionRecords:
        """Every configured subscription. One that is not ready is left out; so is one that cannot be had for good,
        as long as another one can. Raises `ApiError`."""
        begun = self._clock.platform()
        known = state.subscriptions if state else {}
        answers, errors = await self.ask_each(
            self.config.subscription_ids, lambda id: self._ask(id, known.get(id), deadline)
        )
        now = self._clock.platform()
        return SubscriptionRecords(now, min(begun, now), answers, errors)

    async def _ask(self, id: int, known: Subscription | None, deadline: Deadline) -> Answer:
        # Rows are cut by ascending record: the last page of one row is the newest one.
        size = sum(known.counter.values()) if known else 0
        summary = await self._api.task_result(id, page=max(1, size), pagesize=min(1, size), deadline=deadline)
        if summary.counter is None:
            raise ApiError("decode", "task_result tells no status_counter", api="task_result")
        counter = summary.counter
        newest = max((row.record_id or 0 for row in summary.instances), default=0)
        moving = is_moving(counter)
        # At most a page per LOOK_AGAIN, on average.
        pages = max(1.0, len(known.failed) / PAGE_SIZE) if known and len(known.failed) > FEW else 0.0
        due = known is None or self._clock.platform() - known.looked >= LOOK_AGAIN * pages
        same = known is not None and (counter, newest) == (known.counter, known.newest)
        if known is not None and same and not (due and (moving or known.failed)):
            return Answer(counter, newest)
        now, runs = self._clock.platform(), known.runs if known else {}

        def is_new(row: Instance) -> bool:
            return self.is_ours(row) and run_of(row, now) not in (None, runs.get(row.instance_id))

        read = functools.partial(self._api.task_result, id, with_steps=is_new, deadline=deadline)
        instances: dict[str, Instance] = {}
        if summary.total and not same:
            page = await read(page=-(-summary.total // NEWEST), pagesize=NEWEST)
            instances |= {row.instance_id: row for row in page.instances}
            newest = max((row.record_id or 0 for row in page.instances), default=0)
        complete = known is None or due or newest != known.newest or is_moving(known.counter) != moving
        before = sorted(known.failed) if known else []

        async def failed(number: int) -> tuple[Sequence[Instance], int]:
            but = () if complete else before
            page = await read(statuses=("failed",), but=but, page=number, pagesize=PAGE_SIZE)
            return page.instances, page.total

        if counter.get("failed"):
            instances |= await read_pages("task_result", failed, lambda row: row.instance_id)
        # What had failed and is in none of these has moved on, or belongs to an earlier task.
        missing = [instance for instance in before if instance not in instances]
        for begin in range(0, len(missing), PAGE_SIZE):
            some = missing[begin : begin + PAGE_SIZE]
            page = await read(instance_ids=some, statuses=() if complete else MOVED, pagesize=len(some))
            instances |= {row.instance_id: row for row in page.instances}
        return Answer(counter, newest, tuple(instances.values()), complete, not same)

    def is_ours(self, row: Instance) -> bool:
        """Whether it is of this business, as far as it says of which it is."""
        return row.bk_biz_id in (None, self.biz)

    # Observe

    def observe(
        self, state: SubscriptionState | None, records: SubscriptionRecords, now: float
    ) -> Observed[SubscriptionState]:
        """Fold the records of a poll; `now` is the wall clock."""
        return _Fold(self, state, records, now).result()

    # What others read

    async def probe(self, state: SubscriptionState, deadline: Deadline) -> float:
        """One call per subscription and interval."""
        return len(self.config.subscription_ids) * 86400.0 / self.interval

    def failed_executions(self, state: SubscriptionState) -> list[FailedExecution]:
        """None: a subscription does not end."""
        return []


class _Fold:
    """One application of records to a state; see `exporter.collectors.job.collector`."""

    def __init__(
        self,
        collector: NodemanSubscriptionCollector,
        state: SubscriptionState | None,
        records: SubscriptionRecords,
        now: float,
    ) -> None:
        self.collector = collector
        self.state = state
        self.records = records
        self.now = now
        self.tally = collector.tally(state, now)
        self.results: list[HostResult] = []
        self.unknown: list[tuple[str, str]] = []

    def result(self) -> Observed[SubscriptionState]:
        before = self.state.subscriptions if self.state else {}
        # Of one that gave no answer nothing is shown, but what happens from now on is news once it answers.
        subscriptions = {
            id: msgspec.structs.replace(before.get(id) or Subscription(born=self.records.watermark), counter={})
            for id in self.collector.config.subscription_ids
        }
        for id, answer in self.records.answers.items():
            subscriptions[id] = self._subscription(id, before.get(id), answer)
        hosts = self.collector.fold_hosts(self.state, self.results, self.records.now, settled=LOOK_AGAIN)
        return Observed(
            SubscriptionState(
                counts=self.tally.freeze(),
                last_success=self.now,
                watermark=self.records.watermark,
                hosts=hosts,
                subscriptions=subscriptions,
            ),
            unknown=tuple(self.unknown),
            errors=self.records.errors,
        )

    def _subscription(self, id: int, known: Subscription | None, answer: Answer) -> Subscription:
        now = self.records.now
        self.unknown += [
            ("nodeman_subscription.status", status)
            for status in answer.counter
            if status not in NODEMAN_STATUSES and (known is None or status not in known.counter)
        ]
        known = known or Subscription(born=now)
        first = not known.looked
        if not answer.instances and not answer.complete:
            return msgspec.structs.replace(known, counter=answer.counter, newest=answer.newest)
        action = next((row.job_type for row in answer.instances if row.job_type), known.action)
        runs: dict[str, Run] = {}
        failed = set() if answer.complete else set(known.failed)
        last = known.last_finished
        for row in answer.instances:
            if not self.collector.is_ours(row):
                continue
            name, finish = row.instance_id, known_end(row.finish_time, now)
            if finish is not None and ended(row.status, finish):
                last = max(finish, last or finish)
            # One that runs again has not succeeded yet.
            if row.status == "failed" or (name in known.failed and row.status in NODEMAN_UNFINISHED):
                failed.add(name)
            else:
                failed.discard(name)
            run, before = run_of(row, now), known.runs.get(name)
            # Whether it is new is what `fetch` read the steps by.
            if run and row.steps is not None:
                news = finish is not None and finish >= int(known.born) if first else is_news(finish, known.born)
                self._take(id, row, action, before, counts=news)
                runs[name] = run
            elif run and before:
                runs[name] = before
        kept = {name: run for name, run in known.runs.items() if name in failed or not answer.renewed}
        return Subscription(
            answer.counter,
            known.born,
            now if answer.complete else known.looked,
            answer.newest,
            kept | runs,
            frozenset(failed),
            last,
            action,
        )

    def _take(self, id: int, row: Instance, action: str, before: Run | None, *, counts: bool) -> None:
        """Count a finished run that is not known, and learn who fails and who does no longer."""
        labels = (self.collector.name, row.job_type or action, row.failed_step, "")
        if counts:
            self._observe_steps(row, since=before[1] if before and before[0] == row.record_id else 0.0)
            if row.status == "failed":
                count_failure(self.tally, labels)
        if (host := row.host) is not None:
            end = known_end(row.finish_time, self.records.now) or self.records.now
            failure = labels if row.status == "failed" else None
            self.results.append(HostResult(host, row.record_id or id, "", end, failure, name_of(host)))

    def _observe_steps(self, row: Instance, since: float) -> None:
        """Sub-steps that finished after `since`: retrying a node shows those before it again."""
        for step in row.steps or ():
            if step.start_time is None or step.finish_time is None or step.finish_time <= since:
                continue
            if step.finish_time < step.start_time or step.finish_time > self.records.now + FUTURE:
                self.unknown.append(("nodeman_subscription.finish_time", str(step.finish_time)))
                continue
            self.tally.observe(
                STEP_DURATION, (row.job_type, step.step), step.finish_time - step.start_time, STEP_BUCKETS
            )


def run_of(row: Instance, now: float) -> Run | None:
    """The run that a row shows, None while it has not ended."""
    if row.status not in ("failed", "success"):
        return None
    return row.record_id or 0, known_end(row.finish_time, now) or row.start_time or 0.0


def is_moving(counter: Mapping[str, int]) -> bool:
    return any(count and status in NODEMAN_UNFINISHED for status, count in counter.items())


def instances(view: NodemanView) -> Mapping[Labels, float]:
    """Counted by label, since several unknown words share one."""
    counted: dict[Labels, float] = {}
    for id, known in view.state.subscriptions.items():
        for status, count in known.counter.items() if id in view.config.subscription_ids else ():
            labels = (str(id), status_label(status))
            counted[labels] = counted.get(labels, 0.0) + count
    return counted


def last_finished(view: NodemanView) -> Mapping[Labels, float]:
    return {
        (str(id),): known.last_finished
        for id, known in view.state.subscriptions.items()
        if known.last_finished is not None and id in view.config.subscription_ids
    }


NodemanSubscriptionCollector.families = (
    Family(
        "blueking_nodeman_subscription_instances",
        "gauge",
        ("subscription_id", "status"),
        "Instances of a subscription by status.",
        "订阅的实例数，按状态统计。",
        gauge=instances,
    ),
    Family(
        "blueking_nodeman_subscription_last_finished_timestamp_seconds",
        "gauge",
        ("subscription_id",),
        "Newest finish among the newest instances of a subscription.",
        "订阅最新实例中最近一次完成的时间。",
        gauge=last_finished,
    ),
    Family(
        STEP_DURATION,
        "histogram",
        ("job_type", "step"),
        "Sub-steps of finished hosts, of the rows that were read.",
        "已完成主机的子步骤耗时（仅限读取到的记录）。",
    ),
    *FAMILIES,
)
