"""NodeMan V3: node and plugin workflows of a business, counted once per end, and the hosts that fail in them.

The lists are ordered by the start of a workflow, and a retry keeps it. So each poll reads what began since the
watermark, what runs now whenever it began, and the unfinished and failed workflows that neither of these shows, by id.
Operations are read of workflows that have just ended: the failed ones always, the successful ones where they may clear
a host. state.py says what a row means after what is known, fold.py counts by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from exporter.blueking.links import nodemgr_workflow
from exporter.blueking.nodemgr import DOMAINS, PAGE_SIZE, Domain, HostOperation, NodemgrApi, Workflow, WorkflowPage
from exporter.blueking.pacing import Deadline
from exporter.collectors.base import LEAST_CATCHUP, FailedCall, FailedExecution, Trial
from exporter.collectors.failing_hosts import Run
from exporter.collectors.nodeman import NodemanCollector, read_pages
from exporter.collectors.nodemgr.fold import Fold
from exporter.collectors.nodemgr.metrics import FAMILIES
from exporter.collectors.nodemgr.state import (
    FAILED_STATES,
    NAME,
    UNFINISHED_STATES,
    NodemgrRecords,
    NodemgrState,
    has_ended,
    is_new_end,
    key_of,
    known_times,
    parts_of,
    status_label,
)
from exporter.config.schema import NodemgrConfig
from exporter.errors import ApiError
from exporter.metrics.family import Family

OVERLAP = 60.0
"""Seconds that are read again at least: rows may become visible late."""
SLICE_ROWS = 2_000
"""Rows that one poll reads of a long history, about."""
ROUNDS = 32
"""Readings of a second with more rows than a page: each may come in another order."""


class NodemgrCollector(NodemanCollector[NodemgrState, NodemgrConfig, NodemgrApi, NodemgrRecords]):
    """See `Collector`."""

    name: ClassVar[str] = NAME
    state_type: ClassVar[type[NodemgrState]] = NodemgrState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    fold: ClassVar[type[Fold]] = Fold
    run_id: ClassVar[str] = "workflow_id"

    @property
    def commits_later(self) -> bool:
        return self.config.max_catchup >= LEAST_CATCHUP

    # Fetch

    async def fetch(self, state: NodemgrState | None, deadline: Deadline) -> NodemgrRecords:
        """What is new since the state, or what a baseline needs, and operations of what ended. Raises `ApiError`."""
        records = await (self._baseline(deadline) if state is None else self._poll(state, deadline))
        records.rows = {key: known_times(row, records.now) for key, row in records.rows.items()}
        await self._examine(state, records, deadline)
        self._attempts.forget(records.hosts)
        return records

    async def _baseline(self, deadline: Deadline) -> NodemgrRecords:
        """What runs, as old as it may get, and what has ended recently enough for a retry or a failing host."""
        records = NodemgrRecords()
        now = self._clock.platform()
        records.rows |= await self._running(now, deadline)
        # From here on the platform's clock is known.
        now = self._clock.platform()
        recent = max(self._overlap, self.config.reopen_window, self.config.failing_host_ttl)
        records.rows |= await self._window(now - recent, now, deadline)
        records.now = _ms(self._clock.platform())
        records.watermark = now
        records.begin = _ms(now - self._overlap)
        return records

    async def _poll(self, state: NodemgrState, deadline: Deadline) -> NodemgrRecords:
        records = NodemgrRecords()
        mark = state.watermark or 0.0
        now = self._clock.platform()
        if now - mark > self._overlap:
            # History is given up and cut in slices by the platform's clock only, and its first answer tells that.
            await self._total(mark, mark + 1, deadline)
            now = self._clock.platform()
        floor = now - self.config.max_catchup
        records.gap = max(0.0, floor - mark)
        # A clock that was ahead of the platform's, and no longer is, has moved `begin` too far.
        begin = floor if records.gap else min(state.begin / 1000, now - self._overlap)
        end = max(now, begin)
        if end - max(mark, begin) > self._overlap:
            end = await self._end_of_slice(begin, end, max(mark, begin) + 1, deadline)
        records.more = end < now
        records.rows |= await self._window(begin, end, deadline)
        if not records.more:
            records.rows |= await self._running(now, deadline)
            await self._look_up(state, records, deadline)
        later = self._clock.platform()
        records.now = _ms(later)
        records.watermark = min(max(end, mark), later)
        records.begin = max(_ms(begin), state.begin, _ms(min(records.watermark, later - self._overlap)))
        return records

    @property
    def _overlap(self) -> float:
        return max(OVERLAP, self.config.lookback)

    async def _end_of_slice(self, begin: float, end: float, floor: float, deadline: Deadline) -> float:
        """The end of the oldest part of [begin, end] that holds about `SLICE_ROWS` rows; `floor` or later."""
        while end > floor and await self._total(begin, end, deadline) > SLICE_ROWS:
            end = max(floor, begin + (end - begin) / 2)
        return end

    async def _total(self, begin: float, end: float, deadline: Deadline) -> int:
        """How many workflows began in [begin, end]."""
        pages = [await self._page(domain, begin, end, deadline, limit=1) for domain in DOMAINS]
        return sum(total for _, total in pages)

    async def _running(self, now: float, deadline: Deadline) -> dict[str, Workflow]:
        """What runs now, old ones and every retry among it, as old as it may get."""
        return await self._window(now - self.config.max_unfinished_age, now, deadline, ("running",))

    async def _window(
        self, begin: float, end: float, deadline: Deadline, statuses: Sequence[str] = ()
    ) -> dict[str, Workflow]:
        """Every workflow of both domains that began in [begin, end], unix seconds."""
        rows: dict[str, Workflow] = {}
        for domain in DOMAINS:
            found = await self._window_of(domain, math.floor(begin), math.ceil(end), deadline, statuses)
            rows |= {key_of(domain, row.id): row for row in found.values()}
        return rows

    async def _window_of(
        self, domain: Domain, begin: int, end: int, deadline: Deadline, statuses: Sequence[str]
    ) -> dict[str, Workflow]:
        """Page by page, each of what began up to the oldest row of the one before.

        New workflows and the missing order of those of one time shift offsets; the end of a window does not move.
        """
        rows: dict[str, Workflow] = {}
        while True:
            size = self._page_size.at(0, PAGE_SIZE)
            page, _ = await self._page(domain, begin, end, deadline, statuses, limit=size)
            rows |= {row.id: row for row in page}
            if len(page) < size:
                return rows
            times = [row.operate_time for row in page if row.operate_time is not None]
            if not times:
                text = f"{domain}_workflow_list gives workflows without operate_time"
                raise ApiError("decode", text, api=f"{domain}_workflow_list")
            oldest = math.ceil(min(times) / 1000)
            if oldest >= end:
                rows |= await self._second(domain, end - 1, end, deadline, statuses, size)
                oldest = end - 1
            if oldest <= begin:
                if oldest == begin:
                    rows |= await self._second(domain, begin, begin, deadline, statuses, size)
                return rows
            end = oldest

    async def _second(
        self, domain: Domain, begin: int, end: int, deadline: Deadline, statuses: Sequence[str], size: int
    ) -> dict[str, Workflow]:
        """A second that fills a page, by offsets, until no position can hide a row."""
        rows: dict[str, Workflow] = {}
        for _ in range(ROUNDS):
            offset = 0
            while True:
                page, _ = await self._page(domain, begin, end, deadline, statuses, offset=offset, limit=size)
                rows |= {row.id: row for row in page}
                offset += len(page)
                if len(page) < size:
                    break
            if len(rows) >= offset:
                return rows
        text = f"{domain}_workflow_list gives other rows at each reading of one second"
        raise ApiError("decode", text, api=f"{domain}_workflow_list")

    async def _page(
        self,
        domain: Domain,
        begin: float,
        end: float,
        deadline: Deadline,
        statuses: Sequence[str] = (),
        *,
        offset: int = 0,
        limit: int,
    ) -> tuple[Sequence[Workflow], int]:
        """One page and the number of all rows. Fewer rows are asked for in the next poll after too large an answer."""
        try:
            page = await self._api.workflows(
                domain,
                self.biz,
                begin=math.floor(begin),
                end=math.ceil(end),
                statuses=statuses,
                node_roles=self.config.node_roles,
                offset=offset,
                limit=limit,
                deadline=deadline,
            )
        except ApiError as error:
            if error.reason == "too_large" and limit > 1:
                self._page_size.remember(self._page_size.below(limit, 0))
            raise
        return page.rows, page.total

    async def _look_up(self, state: NodemgrState, records: NodemgrRecords, deadline: Deadline) -> None:
        """Read the workflows that are not among the rows and may have changed, many with one call.

        A retry that begins and ends between two polls shows in its finish time only.
        """
        wanted: dict[Domain, list[str]] = {domain: [] for domain in DOMAINS}
        for key, known in state.workflows.items():
            if key not in records.rows and (not known.counted or known.failed or known.unread):
                wanted[parts_of(key)[0]].append(key)
        for domain, keys in wanted.items():

            async def ask(keys: Sequence[str], domain: Domain = domain) -> WorkflowPage:
                ids, roles = [parts_of(key)[1] for key in keys], self.config.node_roles
                return await self._api.workflows(domain, self.biz, ids=ids, node_roles=roles, deadline=deadline)

            answers, refused = await self.ask_for_many(keys, ask)
            for some, page in answers:
                self._attempts.forget(some)
                found = {key_of(domain, row.id): row for row in page.rows}
                records.rows |= found
                records.gone |= set(some) - found.keys()
            for some, error in refused:
                about = f"workflow {parts_of(some[0])[1]} and {len(some) - 1} others"
                records.errors.append(FailedCall.of(error, about, "still tracked"))

    async def _examine(self, state: NodemgrState | None, records: NodemgrRecords, deadline: Deadline) -> None:
        """Read the operations of the workflows that have ended and failed, or that may clear a host that fails."""
        wanted = self._wanted(state, records)
        order = sorted(
            wanted, key=lambda key: (FAILED_STATES[0] not in wanted[key], records.rows[key].finish_time or 0)
        )

        async def read(key: str) -> tuple[HostOperation, ...]:
            return await self._operations(key, wanted[key], deadline)

        await self.examine(order, records, read, lambda key: f"workflow {parts_of(key)[1]}", deadline)
        records.more = records.more or bool(records.deferred)

    def _wanted(self, state: NodemgrState | None, records: NodemgrRecords) -> Mapping[str, tuple[str, ...]]:
        """The workflows whose operations are to be read, and in which states."""
        horizon = records.now - self.config.failing_host_ttl * 1000
        ended = {
            key: row
            for key, row in records.rows.items()
            if self._is_to_be_read(state, key, row) and (row.finish_time or records.now) >= horizon
        }
        failed = {key for key, row in ended.items() if row.status != "success"}
        begun = [row.operate_time or 0 for key, row in ended.items() if key in failed]
        # A success before all failures clears nothing.
        first = 0 if state and state.hosts.streaks else min(begun, default=None)

        def states(key: str, row: Workflow) -> tuple[str, ...]:
            # A host has one operation in a node workflow, and one per plugin in the others.
            alone = key.startswith("node/") and failed == {key} and not (state and state.hosts.streaks)
            clears = first is not None and not alone and (row.finish_time or records.now) >= first
            return (
                *((*FAILED_STATES, *UNFINISHED_STATES) if key in failed else ()),
                *(("success",) if clears and row.status != "failed" else ()),
            )

        return {key: wanted for key, row in ended.items() if (wanted := states(key, row))}

    def _is_to_be_read(self, state: NodemgrState | None, key: str, row: Workflow) -> bool:
        known = state.workflows.get(key) if state else None
        if known is None and state is not None and (row.operate_time or 0) < state.begin:
            return False  # counted and forgotten
        return is_new_end(known, row) or (known is not None and known.unread and has_ended(row))

    async def _operations(self, key: str, states: Sequence[str], deadline: Deadline) -> tuple[HostOperation, ...]:
        domain, id = parts_of(key)

        async def ask(page: int, size: int) -> tuple[Sequence[HostOperation], None]:
            offset = (page - 1) * size
            rows = await self._api.operations(domain, id, states=states, offset=offset, limit=size, deadline=deadline)
            return rows, None  # the total counts hosts of today, not operations

        pages = await read_pages(f"{domain}_operation_list", ask, lambda one: one.id, self._page_size)
        return tuple(pages.rows.values())

    # What others read

    async def probe(self, state: NodemgrState, deadline: Deadline) -> Trial:
        """Four calls per interval, up to two more while failed workflows are watched; operations of one as a trial.

        The lists refuse nobody, so that empty ones tell nothing.
        """
        newest = max(state.workflows, key=lambda key: state.workflows[key].operate_time, default=None)
        notes: tuple[str, ...] = ()
        if newest is None:
            notes = (
                f"the lists are empty: a forbidden business {self.biz} cannot be told apart from an idle one, and an "
                "account with rights on agents only sees nothing without node_roles: [agent, blank]",
            )
        else:
            domain, id = parts_of(newest)
            await self._api.operations(domain, id, limit=1, deadline=deadline)
        watched = {parts_of(key)[0] for key, known in state.workflows.items() if known.failed}
        calls = (2 * len(DOMAINS) + len(watched)) * 86400.0 / self.interval
        return Trial(calls, notes, newest is not None)

    def url(self, run: Run) -> str:
        return nodemgr_workflow(self._api.web_url, *parts_of(str(run)))

    def failed_executions(self, state: NodemgrState) -> list[FailedExecution]:
        failed = [
            FailedExecution(key, known.type, status_label(known.status), _seconds(known.finish_time))
            for key, known in state.workflows.items()
            if known.failed
        ]
        return sorted(failed, key=lambda one: (one.end or 0.0, str(one.id)), reverse=True)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
