"""NodeMan subscriptions: how many instances are in which status, which hosts fail at which step (task_result).

The newest record with the counter of all statuses is one row: that is the poll of a subscription in which nothing
moves. Other rows are asked for by status or by instance, in pages, never all at once: ten thousand instances are 25 MB.
A run of an instance is its record and finish. Times are unix seconds.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import msgspec

from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_subscriptions import Instance, TaskResult
from exporter.blueking.pacing import Deadline
from exporter.collectors.base import FailedCall, Trial
from exporter.collectors.calls import parts
from exporter.collectors.nodeman import NodemanCollector, is_ours, read_pages
from exporter.collectors.nodeman_subscription.fold import Fold
from exporter.collectors.nodeman_subscription.metrics import FAMILIES
from exporter.collectors.nodeman_subscription.state import (
    CHECK_AGAIN,
    NAME,
    Answer,
    Subscription,
    SubscriptionRecords,
    SubscriptionState,
    is_moving,
    run_of,
)
from exporter.config.schema import NodemanSubscriptionConfig
from exporter.errors import ApiError
from exporter.metrics.family import Family
from exporter.model import NODEMAN_UNFINISHED

FEW = 10
"""Failed instances that are read in every poll: so few cost less than a count that is missing."""
NEWEST = 100
"""Instances of the newest records that are read for the newest finish."""

CREATION_FAILED = "3800014"
"""Code of a subscription whose newest task could not be created."""
UNEXPECTED = "3800500"
"""Code of an answer that the platform could not make."""

MOVED = ("success", *NODEMAN_UNFINISHED, "removed", "filtered", "ignored", "terminated")
"""What an instance that had failed may have become."""


class NodemanSubscriptionCollector(
    NodemanCollector[SubscriptionState, NodemanSubscriptionConfig, NodemanApi, SubscriptionRecords]
):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[SubscriptionState]] = SubscriptionState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    fold: ClassVar[type[Fold]] = Fold
    run_id: ClassVar[str] = ""

    # Fetch

    async def fetch(self, state: SubscriptionState | None, deadline: Deadline) -> SubscriptionRecords:
        """Every configured subscription. One that is not ready is left out; so is one that is refused for good, as long
        as another one answers. Raises `ApiError`."""
        begun = self._clock.platform()
        known = state.subscriptions if state else {}
        answers, errors = await self.ask_each(
            "subscription", self.config.subscription_ids, lambda id: self._ask(id, known.get(id), deadline)
        )
        now = self._clock.platform()
        partly = tuple(answer.failure for answer in answers.values() if answer.failure)
        return SubscriptionRecords(now, min(begun, now), answers, (*errors, *partly))

    async def _ask(self, id: int, known: Subscription | None, deadline: Deadline) -> Answer:
        """The answer of a subscription; only a part of it when its newest task does not exist or the platform cannot
        produce its rows."""
        try:
            return await self._read(id, known, deadline)
        except ApiError as error:
            if error.code == CREATION_FAILED:
                answer = await self._read(id, known, deadline, all_tasks=True)
                consequence = "shown as of its earlier tasks"
            elif error.code == UNEXPECTED:
                # The pipeline of a task is missing: it has a counter, but no rows.
                summary = await self._api.task_result(id, deadline=deadline)
                if summary.counter is None:
                    raise
                answer = Answer(summary.counter, known.newest if known else 0, unread=True)
                consequence = "counter shown, hosts left as they were"
            else:
                raise
            return msgspec.structs.replace(answer, failure=FailedCall.of(error, f"subscription {id}", consequence))

    async def _read(
        self, id: int, known: Subscription | None, deadline: Deadline, *, all_tasks: bool = False
    ) -> Answer:
        # Rows are cut by ascending record: the last page of one row is the newest one.
        size = sum(map(abs, known.counter.values())) if known else 0
        now, runs = self._clock.platform(), known.runs if known else {}

        def is_new(row: Instance) -> bool:
            return is_ours(row, self.biz) and run_of(row, now) not in (None, runs.get(row.instance_id))

        read = functools.partial(self._api.task_result, id, all_tasks=all_tasks, with_steps=is_new, deadline=deadline)
        summary = await read(page=max(1, size), pagesize=min(1, size))
        if summary.counter is None:
            return await self._read_all(summary, read)
        counter = summary.counter
        newest = max((row.record_id or 0 for row in summary.instances), default=0)
        moving = is_moving(counter)
        # At most a page per CHECK_AGAIN, on average.
        pages = max(1.0, len(known.failed) / PAGE_SIZE) if known and len(known.failed) > FEW else 0.0
        due = known is None or known.unread or now - known.last_checked >= CHECK_AGAIN * pages
        same = known is not None and not known.unread and (counter, newest) == (known.counter, known.newest)
        if known is not None and same and not (due and (moving or known.failed)):
            return Answer(counter, newest)
        instances: dict[str, Instance] = {}
        if summary.total and not same:
            page = await read(page=-(-summary.total // NEWEST), pagesize=NEWEST)
            instances |= {row.instance_id: row for row in page.instances}
            newest = max((row.record_id or 0 for row in page.instances), default=0)
        complete = known is None or due or newest != known.newest or is_moving(known.counter) != moving
        before = sorted(known.failed) if known else []

        async def failed(page: int, size: int) -> tuple[Sequence[Instance], int | None]:
            but = () if complete else before
            answer = await read(statuses=("failed",), but=but, page=page, pagesize=size)
            return answer.instances, answer.total

        still_running: frozenset[str] = frozenset()
        if counter.get("failed"):
            found = await read_pages("task_result", failed, lambda row: row.instance_id, self._page_size)
            instances |= found.rows
            still_running = frozenset(name for name, row in found.rows.items() if row.status in NODEMAN_UNFINISHED)
        # What had failed and is in none of these has moved on, or belongs to an earlier task.
        missing = [instance for instance in before if instance not in instances]
        for some in parts(missing, PAGE_SIZE):
            page = await read(instance_ids=some, statuses=() if complete else MOVED, pagesize=len(some), all_tasks=True)
            instances |= {row.instance_id: row for row in page.instances}
        return Answer(counter, newest, tuple(instances.values()), complete, not same, still_running)

    async def _read_all(self, summary: TaskResult, read: Callable[..., Awaitable[TaskResult]]) -> Answer:
        """All rows of a platform that gives no counter, counted. Some answer a bare list of them whatever is asked."""

        async def ask(page: int, size: int) -> tuple[Sequence[Instance], int | None]:
            answer = await read(page=page, pagesize=size)
            return answer.instances, answer.total

        if summary.total is None and len(summary.instances) > 1:
            rows = {row.instance_id: row for row in summary.instances}
        else:
            rows = (await read_pages("task_result", ask, lambda row: row.instance_id, self._page_size)).rows
        counter = Counter(row.status for row in rows.values())
        newest = max((row.record_id or 0 for row in rows.values()), default=0)
        return Answer(dict(counter), newest, tuple(rows.values()), complete=True, renewed=True)

    # What others read

    async def probe(self, state: SubscriptionState, deadline: Deadline) -> Trial:
        """One call per subscription and interval. The platform does not say whether the business exists."""
        notes = []
        for id, known in state.subscriptions.items():
            if sum(known.counter.values()) > 0:
                page = await self._api.task_result(id, page=1, pagesize=NEWEST, deadline=deadline)
                if page.instances and not any(is_ours(row, self.biz) for row in page.instances):
                    notes.append(f"subscription {id} has no instance of business {self.biz} among the first {NEWEST}")
        return Trial(len(self.config.subscription_ids) * 86400.0 / self.interval, tuple(notes), not notes)
