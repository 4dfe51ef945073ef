"""NodeMan subscriptions: how many instances are in which status, which hosts fail at which step (task_result).

The newest record with the counter of all statuses is one row: that is the poll of a subscription in which nothing
moves. Other rows are asked for by status or by instance, in pages, never all at once: ten thousand instances are 25 MB.
A run of an instance is its record and finish. Times are unix seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_subscriptions import Instance
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Collector, FailedExecution, Observed, Platforms
from exporter.collectors.nodeman import NodemanCollector, read_pages
from exporter.collectors.nodeman_subscription.fold import Fold
from exporter.collectors.nodeman_subscription.metrics import FAMILIES
from exporter.collectors.nodeman_subscription.state import (
    LOOK_AGAIN,
    NAME,
    Answer,
    Subscription,
    SubscriptionRecords,
    SubscriptionState,
    is_moving,
    is_ours,
    run_of,
)
from exporter.config.schema import NodemanSubscriptionConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family
from exporter.model import NODEMAN_UNFINISHED

FEW = 10
"""Failed instances that are read in every poll: so few cost less than a count that is missing."""
NEWEST = 100
"""Instances of the newest records that are read for the newest finish."""

MOVED = ("success", *NODEMAN_UNFINISHED, "removed", "filtered", "ignored", "terminated")
"""What an instance that had failed may have become."""


class NodemanSubscriptionCollector(NodemanCollector[SubscriptionState, NodemanSubscriptionConfig, NodemanApi]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[SubscriptionState]] = SubscriptionState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    run_id: ClassVar[str] = ""

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Collector | None:
        if platforms.nodeman is None or not config.collectors.nodeman_subscription.enabled:
            return None
        return cls(config.scope, config.collectors.nodeman_subscription, platforms.nodeman, clock)

    # Fetch

    async def fetch(self, state: SubscriptionState | None, deadline: Deadline) -> SubscriptionRecords:
        """Every configured subscription. One that is not ready is left out; so is one that cannot be had for good,
        as long as another one can. Raises `ApiError`."""
        begun = self._clock.platform()
        known = state.subscriptions if state else {}
        answers, errors = await self.ask_each(
            "subscription", self.config.subscription_ids, lambda id: self._ask(id, known.get(id), deadline)
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
            return is_ours(row, self.biz) and run_of(row, now) not in (None, runs.get(row.instance_id))

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

    # Observe

    def observe(
        self, state: SubscriptionState | None, records: SubscriptionRecords, tally: Tally
    ) -> Observed[SubscriptionState]:
        """Fold the records of a poll."""
        return Fold(self.config, self.biz, state, records, tally).result()

    # What others read

    async def probe(self, state: SubscriptionState, deadline: Deadline) -> float:
        """One call per subscription and interval."""
        return len(self.config.subscription_ids) * 86400.0 / self.interval

    def url(self, run: int) -> str:
        """None: the record of an instance leads to no job."""
        return ""

    def failed_executions(self, state: SubscriptionState) -> list[FailedExecution]:
        """None: a subscription does not end."""
        return []
