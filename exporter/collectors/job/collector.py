"""JOB: executions counted exactly once, hosts that fail, watched jobs (get_job_instance_list, get_job_instance_status).

A run is (id, end time). What a row means for what is known of its execution stands in job_state.py: `fetch`, here, uses
it to know which executions to examine; `observe`, in job_fold.py, to count. Times are ms since the epoch as the
platform gives them, on /metrics (job_metrics.py) seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import ClassVar

import msgspec

from exporter.blueking.job import Execution, ExecutionPage, ExecutionStatus, JobApi
from exporter.blueking.links import job_execution
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import (
    WITHOUT_HOSTS,
    FailedCall,
    FailedExecution,
    Observed,
    Platforms,
    fold,
)
from exporter.collectors.calls import Attempts, gather_bounded
from exporter.collectors.failing_hosts import FailingHosts
from exporter.collectors.job.fold import Fold, host_results
from exporter.collectors.job.history import Window, read_slice, read_window
from exporter.collectors.job.metrics import FAILURE_LABELS, FAMILIES, JobView
from exporter.collectors.job.state import (
    JobRecords,
    JobState,
    end_order,
    group,
    is_news,
    ms,
    seconds,
    selects,
    turn,
)
from exporter.config.schema import JobConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family
from exporter.model import JOB_STATUSES, Scope, job_status_slug

UNFINISHED_STATUSES = (2, 1, 15, 7, 10, 2)
"""The order in which a baseline asks for what has not ended. Running comes first and last: whatever moves from or to it
meanwhile is seen on one side."""
FAILED_STATUSES = (4, 9)
HOLDER_LOOK = 120_000
"""ms: at most this long until a retry that lets a failing host succeed is noticed."""
LOOKS = 100
"""How many times within `reopen_window` a failed execution is looked at."""
CONCURRENCY = 4
"""Calls of one poll under way at once: less than the process may have, so that a slow scope leaves room for others."""


class JobCollector:
    """See `Collector`."""

    name: ClassVar[str] = "job"
    state_type: ClassVar[type[JobState]] = JobState
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    failure_labels: ClassVar[tuple[str, ...]] = FAILURE_LABELS
    run_id: ClassVar[str] = "job_instance_id"

    def __init__(self, scope: Scope, config: JobConfig, api: JobApi, clock: Clock) -> None:
        self.scope = scope
        self.config = config
        self.interval = config.interval
        self._api = api
        self._clock = clock
        self._attempts = Attempts()
        self._span: int | None = None

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> JobCollector | None:
        if platforms.job is None or not config.collectors.job.enabled:
            return None
        return cls(config.scope, config.collectors.job, platforms.job, clock)

    # Fetch

    async def fetch(self, state: JobState | None, deadline: Deadline) -> JobRecords:
        """The history since the state, or what a baseline needs. Raises `ApiError`."""
        return await (self._baseline(deadline) if state is None else self._poll(state, deadline))

    async def _baseline(self, deadline: Deadline) -> JobRecords:
        rows: dict[int, Execution] = {}
        unreadable: frozenset[int] = frozenset()
        without_id: frozenset[int] = frozenset()
        wanted = [(status, self.config.max_unfinished_age) for status in UNFINISHED_STATUSES]
        wanted += [(status, self.config.reopen_window) for status in FAILED_STATUSES]
        for status, age in wanted:
            now = self._now()
            window = await self._read(now - ms(age), now, deadline, status)
            rows |= window.rows
            unreadable |= window.unreadable
            without_id |= window.without_id
        # Now the platform's clock is known, whatever this machine's says.
        now = self._now()
        window = await self._read(now - ms(self.config.lookback), now, deadline)
        begin = now - ms(self.config.lookback)
        return JobRecords(
            begin,
            now,
            now,
            rows | window.rows,
            unreadable=unreadable | window.unreadable,
            without_id=without_id | window.without_id,
        )

    async def _poll(self, state: JobState, deadline: Deadline) -> JobRecords:
        started = self._clock.monotonic()
        now = self._now()
        watermark = ms(state.watermark or 0.0)
        if now - watermark > ms(self.config.max_catchup):
            # History is given up by the platform's clock only, and its first answer tells that.
            await self._api.list(self.scope, watermark, watermark + 1, deadline=deadline, length=1)
            now = self._now()
        floor = now - ms(self.config.max_catchup)
        gap = max(0.0, (floor - watermark) / 1000)
        # A clock that was ahead of the platform's, and no longer is, has moved `begin` too far.
        begin = floor if gap else min(state.begin, now - ms(self.config.lookback))
        end = max(now, begin)
        if end - max(watermark, begin) > ms(self.config.lookback):
            window = await self._read_slice(begin, end, watermark, deadline)
        else:
            window = await self._read(begin, end, deadline)
        more = window.end < end
        news = {id: row for id, row in window.rows.items() if is_news(state, row)}
        now = self._now()
        # With a clock ahead of the platform's the window reached into the future, of which nothing is known yet; with
        # one behind it, what had been counted before stays counted.
        end = min(max(window.end, watermark), now)
        begin = max(begin, state.begin, min(end, now - ms(self.config.lookback)))
        self._span = end - watermark if more else None
        records = JobRecords(begin, end, now, news, gap, window.unreadable, window.without_id, more=more)
        if not more:
            records = await self._follow(state, records, window.rows.keys(), deadline)
        return await self._examine(state, records, deadline, started)

    async def _follow(self, state: JobState, records: JobRecords, seen: Set[int], deadline: Deadline) -> JobRecords:
        """Look again at executions that the window does not show, `seen` being those it does: unfinished ones always,
        failed ones from time to time."""
        now, window = records.now, ms(self.config.reopen_window)
        slack = ms(self.interval)
        watch = now - state.looked + slack > window / LOOKS
        watch_holders = now - state.looked_holders + slack > min(HOLDER_LOOK, window / LOOKS)
        unseen = {id: known for id, known in state.executions.items() if id not in seen}
        failed = {id: known for id, known in unseen.items() if known.counted and known.outcome == "failure"}
        holders = {streak.run for streak in state.hosts.streaks.values()} if watch_holders or watch else frozenset()
        wanted = {id: known for id, known in unseen.items() if not known.counted}
        wanted |= failed if watch else {id: failed[id] for id in holders & failed.keys()}

        by_status: dict[int, list[int]] = {}
        for id, known in wanted.items():
            by_status.setdefault(known.status, []).append(id)
        found: dict[int, Execution] = {}
        for status, ids in by_status.items():
            # One list call shows them all, and others between them that are known as well: is that less than one
            # call each?
            times = [wanted[id].create_time for id in ids]
            begin, end = min(times), max(times)
            among = sum(
                known.status == status and begin <= known.create_time <= end for known in state.executions.values()
            )
            if (
                status in JOB_STATUSES
                and JOB_STATUSES[status].outcome in (None, "failure")
                and (1 + among // self._api.page_size < len(ids))
            ):
                found |= (await self._read(begin, end, deadline, status)).rows
        missing = [id for id in wanted if id not in found]
        pages = await gather_bounded(
            (self._list_one(id, wanted[id].create_time, deadline) for id in missing), CONCURRENCY
        )
        gone = set()
        for id, page in zip(missing, pages, strict=True):
            row = next((row for row in page.rows if row.id == id), None)
            if row is None:
                gone.add(id)
            else:
                found[id] = row
        return msgspec.structs.replace(
            records,
            rows=records.rows | {id: row for id, row in found.items() if id in state.executions},
            gone=frozenset(gone),
            looked=watch,
            looked_holders=watch_holders or watch,
        )

    async def _examine(self, state: JobState, records: JobRecords, deadline: Deadline, started: float) -> JobRecords:
        """Ask for the steps and hosts of what has just finished, as far as `host_results` wants them."""
        finished = [
            row for row in records.rows.values() if turn(state.executions.get(row.id), row) in ("finished", "again")
        ]
        selected = {row.id: row for row in finished if selects(self.config.host_results, row)}
        examined: dict[int, ExecutionStatus] = {}
        unexamined: set[int] = set()
        deferred: set[int] = set()
        errors: list[FailedCall] = []
        # Queueing for the rate budget does not use up a deadline, so a flood of failures is bounded by time, not by
        # errors.
        patience = max(self.interval, deadline.remaining() / 2)

        async def examine(row: Execution) -> None:
            if (examined or unexamined) and self._clock.monotonic() - started > patience:
                deferred.add(row.id)
                return
            try:
                answer, complete = await self._status(row.id, deadline)
            except ApiError as error:
                if not self._attempts.exhausted(row.id, error):
                    raise
                errors.append(FailedCall.of(error, f"execution {row.id}", WITHOUT_HOSTS))
                unexamined.add(row.id)
            else:
                examined[row.id] = answer
                if not complete:
                    errors.append(FailedCall("api_error", f"execution {row.id}", WITHOUT_HOSTS, "code 1240002"))
                    unexamined.add(row.id)

        try:
            await gather_bounded((examine(row) for row in sorted(selected.values(), key=end_order)), CONCURRENCY)
        except ApiError:
            # One outage is held against all that it keeps waiting, or each of them would fail as many polls by itself.
            self._attempts.charge(selected.keys() - examined.keys() - unexamined)
            raise
        if self.config.host_results == "failed":
            failing = set(state.hosts.groups()) | {group(selected[id].plan_id, selected[id].name) for id in examined}
            hosts = state.hosts
            news: list[Execution] = []
            # In the order of time, for a success is worth a call only while a host fails for its plan or name.
            for row in sorted(finished, key=end_order) if failing else ():
                if row.status == 3 and (of := group(row.plan_id, row.name)) in failing:
                    hosts = await self._folded(hosts, news, examined, records.now)
                    news = []
                    if (row.end_time or records.now) / 1000 >= hosts.groups().get(of, float("inf")):
                        await examine(row)
                if row.id in examined:
                    news.append(row)
        self._attempts.forget((*examined, *unexamined))
        return msgspec.structs.replace(
            records,
            examined=examined,
            unexamined=frozenset(unexamined),
            deferred=frozenset(deferred),
            errors=tuple(errors),
            truncated=records.truncated + len(unexamined),
            more=records.more or bool(deferred),
        )

    async def _folded(
        self, hosts: FailingHosts, news: Sequence[Execution], examined: Mapping[int, ExecutionStatus], now: int
    ) -> FailingHosts:
        """The failing hosts after `news`, of which `examined` has the answers."""
        size = sum(len(step.results) for row in news for step in examined[row.id].steps)

        def work() -> FailingHosts:
            results = [result for row in news for result in host_results(examined[row.id], row, now)]
            return hosts.fold(results, now=now / 1000, ttl=self.config.failing_host_ttl, settled=0.0)

        return await fold(size, work)

    async def _status(self, id: int, deadline: Deadline) -> tuple[ExecutionStatus, bool]:
        """The status of an execution, and whether its host results are in it."""
        try:
            return await self._api.status(self.scope, id, host_results=True, deadline=deadline), True
        except ApiError as error:
            # v3 fails as a whole on a container target when it is asked for host results.
            if error.code != "1240002":
                raise
        return await self._api.status(self.scope, id, host_results=False, deadline=deadline), False

    async def _read(self, begin: int, end: int, deadline: Deadline, status: int | None = None) -> Window:
        """[begin, end] completely, in as many windows as the dialect wants."""
        read = Window({}, end)
        for first, last in self._windows(begin, end):
            window = await read_window(self._history(deadline, status), first, last)
            read = Window(
                read.rows | window.rows, end, read.unreadable | window.unreadable, read.without_id | window.without_id
            )
        return read

    async def _read_slice(self, begin: int, end: int, watermark: int, deadline: Deadline) -> Window:
        _, last = next(self._windows(begin, end))
        floor = min(last, max(watermark, begin) + 1000)
        return await read_slice(self._history(deadline), begin, last, floor, self._span)

    def _windows(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        longest = self._api.max_window or max(1, end - begin)
        while True:
            # v3 wants an end after its begin.
            last = max(begin + 1, min(end, begin + longest))
            yield begin, last
            if last >= end:
                return
            begin = last

    def _history(self, deadline: Deadline, status: int | None = None) -> _History:
        return _History(self._api, self.scope, deadline, status)

    async def _list_one(self, id: int, create_time: int, deadline: Deadline) -> ExecutionPage:
        try:
            return await self._api.list(
                self.scope, create_time, create_time + 1, deadline=deadline, job_instance_id=id, length=1
            )
        except ApiError as error:
            if error.reason != "not_found":
                raise
            return ExecutionPage((), None)

    def _now(self) -> int:
        return ms(self._clock.platform())

    # Observe

    def observe(self, state: JobState | None, records: JobRecords, tally: Tally) -> Observed[JobState]:
        """Fold the records of a poll."""
        return Fold(self.config, state, records, tally).result()

    # What others read

    async def probe(self, state: JobState, deadline: Deadline) -> float:
        """One call per interval, one per failed execution as often as they failed within `reopen_window`, and its
        watch."""
        window = self.config.reopen_window
        failed = [id for id, known in state.executions.items() if known.outcome == "failure"]
        if state.executions and self.config.host_results != "none":
            await self._status(max(state.executions), deadline)
        day = 86400.0
        return day / self.interval + (len(failed) + LOOKS * bool(failed)) * day / max(window, 1.0)

    def view(self, state: JobState) -> JobView:
        unfinished = [known for known in state.executions.values() if not known.counted and not known.deferred]
        return JobView(state, self.config, unfinished)

    def failing_hosts(self, state: JobState) -> FailingHosts:
        return state.hosts

    def url(self, run: int) -> str:
        return job_execution(self._api.web_url, run)

    def failed_executions(self, state: JobState) -> list[FailedExecution]:
        failed = [
            FailedExecution(id, known.name, job_status_slug(known.status), seconds(known.end_time))
            for id, known in state.executions.items()
            if known.counted and known.outcome == "failure"
        ]
        return sorted(failed, key=lambda execution: (execution.end or 0.0, execution.id), reverse=True)


class _History:
    """The executions of a scope, those in `status` where one is given; see `job_history.History`."""

    def __init__(self, api: JobApi, scope: Scope, deadline: Deadline, status: int | None) -> None:
        self.page_size, self.max_offset = api.page_size, api.max_offset
        self._api, self._scope, self._deadline, self._status = api, scope, deadline, status

    async def ask(self, begin: int, end: int, offset: int) -> ExecutionPage:
        return await self._api.list(
            self._scope, begin, max(end, begin + 1), deadline=self._deadline, status=self._status, offset=offset
        )
