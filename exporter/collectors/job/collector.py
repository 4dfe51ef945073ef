"""JOB: executions counted exactly once, hosts that fail, watched jobs (get_job_instance_list, get_job_instance_status).

A run is (id, end time). state.py compares a row with what is known of its execution: `fetch`, here, then decides which
executions to examine, and fold.py counts. Times are ms since the epoch as the platform gives them; on /metrics
(metrics.py) they are seconds.

One execution never blocks its scope. Each call that is made because of one execution goes through `_ask_each`: after a
final error, or after it has failed five polls, the poll goes on without its answer.
"""

from __future__ import annotations

import heapq
from collections import ChainMap
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import ClassVar, TypeVar

import msgspec

from exporter.blueking.job import Execution, ExecutionPage, ExecutionStatus, JobApi
from exporter.blueking.links import job_execution
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import (
    LEAST_CATCHUP,
    WITHOUT_HOSTS,
    FailedCall,
    FailedExecution,
    Observed,
    Platforms,
    Trial,
    fold,
)
from exporter.collectors.calls import Attempts, gather_bounded
from exporter.collectors.failing_hosts import FailingHosts, Run
from exporter.collectors.job.fold import Fold, host_results
from exporter.collectors.job.history import MOST_ROWS, SLICE_ROWS, Keep, TooMany, Window, by_id, read_slice, read_window
from exporter.collectors.job.metrics import FAILURE_LABELS, FAMILIES, JobView
from exporter.collectors.job.state import (
    RESUMABLE,
    JobRecords,
    JobState,
    Odd,
    Tracked,
    end_order,
    group,
    ms,
    must_forget,
    news,
    seconds,
    selects,
    transition,
)
from exporter.config.schema import JobConfig, ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family
from exporter.model import JOB_STATUSES, Scope, job_outcome, job_status_slug

UNFINISHED_STATUSES = (2, 1, 15, 7, 10, 2)
"""The order in which a baseline asks for unfinished executions. Running comes first and last, so that an execution
whose status changes from or to running in between is still seen."""
RETRIED_STATUSES = (4, 9, *sorted(RESUMABLE))
"""Ended statuses from which an execution may run again."""
FAILING_CHECK = 120_000
"""ms: a retry that lets a failing host succeed is noticed at the latest after this time."""
CHECKS = 100
"""How many times within `reopen_window` an execution that may run again is looked for."""
CONCURRENCY = 4
"""Calls of one poll that run at once: fewer than the process may have, so that a slow scope leaves room for others."""

MOST_GROWTH = 8
"""How many times longer than the slice before it a slice may be. After a pause in which nothing was created, the rest
of the history may be as dense as before."""
PROBED = 3
"""Executions that `probe` tries to read before it calls the status API refused."""

SUCCESS = 3
NEVER_FAILED = frozenset(status for status, known in JOB_STATUSES.items() if known.outcome != "failure")
"""Statuses that are no failure whatever the rest of the row says."""
CONTAINERS_IN_V3 = "1240002"
"""v3 fails as a whole on a container target when it is asked for host results."""

T = TypeVar("T")


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
        self._look_ups = Attempts()
        self._examinations = Attempts()
        self._span: int | None = None

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> JobCollector | None:
        if platforms.job is None or not config.collectors.job.enabled:
            return None
        return cls(config.scope, config.collectors.job, platforms.job, clock)

    @property
    def commits_later(self) -> bool:
        return self.config.max_catchup >= LEAST_CATCHUP

    # Fetch

    async def fetch(self, state: JobState | None, deadline: Deadline) -> JobRecords:
        """The history since the state, or what a baseline needs. Raises `ApiError`."""
        return await (self._baseline(deadline) if state is None else self._poll(state, deadline))

    async def _baseline(self, deadline: Deadline) -> JobRecords:
        read = Window({}, 0)
        wanted = [(status, self.config.max_unfinished_age) for status in UNFINISHED_STATUSES]
        wanted += [(status, self.config.reopen_window) for status in RETRIED_STATUSES]
        for status, age in wanted:
            now = self._now()
            read = read.with_newer(await self._read(now - ms(age), now, deadline, status))
        # Now the platform's clock is known, whatever this machine's says.
        now = self._now()
        begin = now - ms(self.config.lookback)
        read = read.with_newer(await self._read(begin, now, deadline))
        rows, odd = news(None, read.rows.values(), now)
        return JobRecords(begin, now, now, rows, _values(odd), unreadable=read.unreadable, without_id=read.without_id)

    async def _poll(self, state: JobState, deadline: Deadline) -> JobRecords:
        started = self._clock.monotonic()
        now = self._now()
        watermark = ms(state.watermark or 0.0)
        if now - watermark > ms(self.config.max_catchup):
            # Only the platform's clock decides which history is too old, and its first answer brings that clock.
            await self._api.list(self.scope, now, now + 1, deadline=deadline, length=1)
            now = self._now()
        floor = now - ms(self.config.max_catchup)
        gap = max(0.0, (floor - watermark) / 1000)
        # A clock that was ahead of the platform's, and no longer is, has moved `begin` too far.
        begin = floor if gap else min(state.begin, now - ms(self.config.lookback))
        end = max(now, begin)
        page_news = _News(state, self._now)
        # A slice commits the whole state, so slices grow with it: else commits would be most of the work.
        rows = max(SLICE_ROWS, min(len(state.ended_executions) // 4, MOST_ROWS))
        asked = now
        first, window = await self._read_news(begin, end, max(watermark, begin), rows, deadline, page_news)
        more = window.end < end
        now = self._now()
        # With a clock ahead of the platform's the window reached into the future, of which nothing is known yet; with
        # one behind it, what had been counted before stays counted.
        end = min(max(window.end, watermark), now)
        if first <= begin:
            # A row may have been listed while later pages were read: `lookback` counts from the beginning.
            begin = max(begin, state.begin, min(end, min(asked, now) - ms(self.config.lookback)))
        self._span = (end - watermark) * rows // max(rows // MOST_GROWTH, len(window.rows)) if more else None
        records = JobRecords(
            *(begin, end, now, window.rows, _values(page_news.odd, window.rows)),
            *(gap, window.unreadable, window.without_id),
            more=more,
        )
        if not more:
            records = await self._follow(state, records, page_news.seen, deadline)
        return await self._examine(state, records, deadline, started)

    async def _follow(self, state: JobState, records: JobRecords, seen: Set[int], deadline: Deadline) -> JobRecords:
        """Look again at tracked executions that the window does not show, `seen` being those it does: unfinished ones
        and those whose end time is awaited always, those that may run again from time to time."""
        if not state.executions and not state.resumable_executions:
            self._look_ups.retain(())
            return records
        now, window = records.now, ms(self.config.reopen_window)
        slack = ms(self.interval)
        check = now - state.checked + slack > window / CHECKS
        check_failing = check or now - state.checked_failing + slack > min(FAILING_CHECK, window / CHECKS)
        resumable = state.resumable_executions
        tracked: ChainMap[int, Tracked] = ChainMap(state.executions, resumable)
        self._look_ups.retain(tracked)
        wanted = {
            id: known
            for id, known in state.executions.items()
            if not known.counted or known.end_awaited is not None or (check and known.may_run_again)
        }
        if check:
            wanted |= resumable
        elif check_failing:
            wanted |= {id: resumable[id] for id in resumable.keys() & state.hosts.runs()}
        wanted = {id: known for id, known in wanted.items() if id not in seen and not self._look_ups.rests(id)}
        found = await self._find_together(state, wanted, deadline)
        pages, refused = await self._ask_each(
            self._look_ups,
            wanted.keys() - found.keys(),
            lambda id: self._list_one(id, wanted[id].create_time, deadline),
        )
        self._look_ups.rest(refused)
        found |= {row.id: row for page in pages.values() for row in page.rows}
        found = {id: row for id, row in found.items() if id in wanted and row.create_time == wanted[id].create_time}
        rows, odd = news(state, found.values(), now)
        return msgspec.structs.replace(
            records,
            rows=records.rows | rows,
            odd=records.odd + _values(odd),
            gone=frozenset(pages.keys() - found.keys()),
            errors=tuple(FailedCall.of(error, f"execution {id}", "still tracked") for id, error in refused.items()),
            checked=check,
            checked_failing=check_failing,
        )

    async def _find_together(
        self, state: JobState, wanted: Mapping[int, Tracked], deadline: Deadline
    ) -> dict[int, Execution]:
        """Those of the `wanted` executions that one call finds with others of their status."""
        by_status: dict[int, list[int]] = {}
        for id, known in wanted.items():
            by_status.setdefault(known.status, []).append(id)
        found: dict[int, Execution] = {}
        for status, ids in by_status.items():
            # The call shows others between them that are known as well: does it cost less than one call each?
            times = [wanted[id].create_time for id in ids]
            begin, end = min(times), max(times)
            among = sum(known.status == status and begin <= known.create_time <= end for _, known in state.tracked())
            if status not in JOB_STATUSES or 1 + among // self._api.page_size >= len(ids):
                continue
            try:
                found |= (await self._read(begin, end, deadline, status)).rows
            except ApiError as error:
                if not all(self._look_ups.exhausted(id, error) for id in ids):
                    self._look_ups.charge(ids)
                    raise
                # One call for each of them.
        return found

    async def _examine(self, state: JobState, records: JobRecords, deadline: Deadline, started: float) -> JobRecords:
        """Ask for the steps and hosts of executions that have just finished, if `host_results` selects them, and of
        executions that had finished earlier while a step or host was still running."""
        if not records.rows and not state.executions and not state.resumable_executions:
            return records
        wanted, rows = self.config.host_results, records.rows.values()
        if wanted == "none" or (wanted == "failed" and NEVER_FAILED.issuperset([row.status for row in rows])):
            # Nobody asks for the hosts of a success unless hosts fail.
            rows = rows if wanted == "failed" and state.hosts.groups() else {}.values()
        finished = [
            row for row in sorted(rows, key=end_order) if transition(state.known(row), row) in ("finished", "again")
        ]
        selected = {
            row.id: row for row in finished if selects(wanted, job_outcome(row.status, row.end_time is not None))
        }
        to_ask_again = [] if records.more else _to_ask_again(state, records.rows)
        if not finished and not to_ask_again:
            return records
        examined: dict[int, ExecutionStatus] = {}
        failed: dict[int, FailedCall] = {}
        deferred: set[int] = set()
        asked = 0
        # Queueing for the rate budget does not use up a deadline, so a flood of failures is bounded by time, not by
        # errors.
        patience = max(self.interval, deadline.remaining() / 2)

        async def status(id: int) -> tuple[ExecutionStatus, ApiError | None] | None:
            nonlocal asked
            if asked and self._clock.monotonic() - started > patience:
                return None
            try:
                return await self._status(id, deadline)
            finally:
                asked += 1

        async def examine(ids: Iterable[int]) -> None:
            answers, refused = await self._ask_each(self._examinations, ids, status)
            for id, answer in answers.items():
                if answer is None:
                    deferred.add(id)
                    continue
                examined[id], incomplete = answer
                if incomplete is not None and id not in to_ask_again:
                    refused[id] = incomplete
            failed.update((id, FailedCall.of(error, f"execution {id}", WITHOUT_HOSTS)) for id, error in refused.items())

        await examine([*selected, *to_ask_again])
        if self.config.host_results == "failed":
            runs: list[tuple[int, Execution | Tracked]] = [(id, state.executions[id]) for id in to_ask_again]
            failing = set(state.hosts.groups())
            failing |= {group(of) for id, of in (*runs, *selected.items()) if id in examined}
            runs = [(id, of) for id, of in runs if id in examined]
            hosts = state.hosts
            # In the order of time, for a success is worth a call only while a host fails for its plan or name.
            for row in finished if failing else ():
                if row.status == SUCCESS and (of := group(row)) in failing:
                    hosts, runs = await self._fold_hosts(hosts, runs, examined, records.now), []
                    if (row.end_time or records.now) / 1000 >= hosts.groups().get(of, float("inf")):
                        await examine([row.id])
                if row.id in examined:
                    runs.append((row.id, row))
        self._examinations.forget(failed)
        return msgspec.structs.replace(
            records,
            examined=examined,
            unexamined=frozenset(failed),
            deferred=frozenset(deferred.difference(to_ask_again)),
            errors=(*records.errors, *failed.values()),
            more=records.more or bool(deferred.difference(to_ask_again)),
        )

    async def _fold_hosts(
        self,
        hosts: FailingHosts,
        runs: Sequence[tuple[int, Execution | Tracked]],
        examined: Mapping[int, ExecutionStatus],
        now: int,
    ) -> FailingHosts:
        """The failing hosts after these runs, of which `examined` has the answers."""
        size = sum(len(step.results) for id, _ in runs for step in examined[id].steps)

        def work() -> FailingHosts:
            results = (result for id, of in runs for result in host_results(examined[id], id, of, now))
            return hosts.fold(results, now=now / 1000, ttl=self.config.failing_host_ttl, settled=0.0)

        return await fold(size, work)

    async def _ask_each(
        self, attempts: Attempts, ids: Iterable[int], ask: Callable[[int], Awaitable[T]]
    ) -> tuple[dict[int, T], dict[int, ApiError]]:
        """The answer of `ask` for each of `ids`, and the errors of those that the poll goes on without.

        Raises `ApiError` while it is worth waiting for an answer. One outage counts as a failed poll for every id that
        waits; otherwise each id in turn would fail five polls.
        """
        asked = list(ids)
        answers: dict[int, T] = {}
        refused: dict[int, ApiError] = {}

        async def one(id: int) -> None:
            try:
                answers[id] = await ask(id)
            except ApiError as error:
                if not attempts.exhausted(id, error):
                    raise
                refused[id] = error

        try:
            await gather_bounded(map(one, asked), CONCURRENCY)
        except ApiError:
            attempts.charge(id for id in asked if id not in answers and id not in refused)
            raise
        attempts.forget(answers)
        return answers, refused

    async def _status(self, id: int, deadline: Deadline) -> tuple[ExecutionStatus, ApiError | None]:
        """The status of an execution; with the error where the platform cannot give its host results."""
        try:
            return await self._api.status(self.scope, id, host_results=True, deadline=deadline), None
        except ApiError as error:
            if error.code != CONTAINERS_IN_V3:
                raise
            incomplete = error
        return await self._api.status(self.scope, id, host_results=False, deadline=deadline), incomplete

    async def _read_news(
        self, begin: int, end: int, unread: int, rows: int, deadline: Deadline, news: _News
    ) -> tuple[int, Window]:
        """[begin, end], or the oldest part of [unread, end] where more than about `rows` would come at once; with its
        begin."""
        span, behind = self._span, end - unread
        far_behind = behind > ms(self.config.lookback)
        if span is None and not far_behind:
            # A scope that is never behind reads every window whole, however many rows it has.
            at_most = 2 * rows if behind > 2 * ms(self.interval) else None
            try:
                return begin, await self._read(begin, end, deadline, keep=news, at_most=at_most)
            except TooMany as error:
                span = (end - begin) * rows // error.rows
        first = begin if far_behind else unread
        # A slice does not overlap with the one before it: the poll after the last one reads everything from `begin` on.
        _, last = next(self._windows(first, end))
        floor = min(last, unread + 1000)
        if span is not None:
            last = min(last, max(floor, unread + span))
        # If the platform takes too long for this slice, the next poll reads a shorter one.
        self._span = (last - unread) // 2
        return first, await read_slice(self._history(deadline), first, last, floor, rows, news)

    async def _read(
        self,
        begin: int,
        end: int,
        deadline: Deadline,
        status: int | None = None,
        *,
        keep: Keep = by_id,
        at_most: int | None = None,
    ) -> Window:
        """[begin, end] completely, in as many windows as the dialect wants."""
        read: Window | None = None
        for first, last in self._windows(begin, end):
            history = self._history(deadline, status)
            window = await read_window(history, first, last, keep=keep, at_most=at_most)
            read = read.with_newer(window) if read else window
        assert read is not None, "there is a window, however short"
        return read

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

    def unchanged(self, state: JobState, records: JobRecords, now: float) -> JobState | None:
        """None also where an execution is followed: then it depends on its age what becomes of it."""
        begin, at = records.begin, records.now
        if (
            not records.nothing_new
            or state.executions
            or state.resumable_executions
            or state.unreadable
            or must_forget(state.ended_executions, begin)
            or state.hosts.fold((), now=at / 1000, ttl=self.config.failing_host_ttl, settled=0.0) is not state.hosts
        ):
            return None
        return msgspec.structs.replace(
            state,
            last_success=now,
            watermark=records.end / 1000,
            begin=begin,
            checked=at if records.checked else state.checked,
            checked_failing=at if records.checked_failing else state.checked_failing,
        )

    # What others read

    async def probe(self, state: JobState, deadline: Deadline) -> Trial:
        """One call per interval, one per failed execution as often as they failed within `reopen_window`, and the
        checks for retries."""
        notes: tuple[str, ...] = ()
        if self.config.host_results != "none":
            await self._probe_status(state, deadline)
            if not _all_ids(state):
                notes = ("there is no execution to read: whether view_history is granted cannot be told",)
        tracked = [known for _, known in state.tracked()]
        failed = sum(known.outcome == "failure" for known in tracked)
        retried = any(known.may_run_again for known in tracked)
        day = 86400.0
        calls = day / self.interval + (failed + CHECKS * retried) * day / max(self.config.reopen_window, 1.0)
        return Trial(calls, notes)

    async def _probe_status(self, state: JobState, deadline: Deadline) -> None:
        """Ask for the status of one of the newest executions. Raises `ApiError` if none of them can be read: the
        error of one execution says nothing about the others."""
        refused: list[ApiError] = []
        for id in heapq.nlargest(PROBED, _all_ids(state)):
            try:
                await self._status(id, deadline)
                return
            except ApiError as error:
                if error.transient:
                    raise
                refused.append(error)
        if refused:
            raise refused[0]

    def view(self, state: JobState) -> JobView:
        unfinished = [known for known in state.executions.values() if not known.counted and not known.deferred]
        return JobView(state, self.config, unfinished)

    def failing_hosts(self, state: JobState) -> FailingHosts:
        return state.hosts

    def url(self, run: Run) -> str:
        return job_execution(self._api.web_url, run)

    def failed_executions(self, state: JobState) -> list[FailedExecution]:
        failed = [
            FailedExecution(id, known.name, job_status_slug(known.status), seconds(known.end_time))
            for id, known in state.tracked()
            if known.counted and known.outcome == "failure"
        ]
        return sorted(failed, key=lambda execution: (execution.end or 0.0, execution.id), reverse=True)


def _all_ids(state: JobState) -> Collection[int]:
    return {*state.executions, *state.resumable_executions, *state.ended_executions}


def _to_ask_again(state: JobState, rows: Mapping[int, Execution]) -> list[int]:
    """Executions that had ended while a step of theirs was still running, and that have not run again."""
    return [
        id
        for id, known in state.executions.items()
        if known.asked_while_running and (id not in rows or transition(known, rows[id]) == "none")
    ]


def _values(odd: Mapping[int, Sequence[Odd]], ids: Iterable[int] | None = None) -> tuple[Odd, ...]:
    """The odd values in the rows with these ids, or in all rows."""
    return tuple(one for id in (odd if ids is None else ids) for one in odd.get(id, ())) if odd else ()


class _News:
    """Keeps the rows with something new; see `history.Keep`. `odd`: values in them that cannot be used, by id; `seen`:
    the tracked executions among all rows."""

    def __init__(self, state: JobState, now: Callable[[], int]) -> None:
        self.odd: dict[int, list[Odd]] = {}
        self.seen: set[int] = set()
        self._state = state
        self._now = now

    def __call__(self, rows: Sequence[Execution]) -> Mapping[int, Execution]:
        if not rows:
            return {}
        for place in (self._state.executions, self._state.resumable_executions):
            if place:
                self.seen |= place.keys() & {row.id for row in rows}
        found, odd = news(self._state, rows, self._now())
        self.odd |= odd
        return found


class _History:
    """The executions of a scope, those in `status` where one is given; see `history.History`."""

    def __init__(self, api: JobApi, scope: Scope, deadline: Deadline, status: int | None) -> None:
        self.page_size, self.max_offset = api.page_size, api.max_offset
        self._api, self._scope, self._deadline, self._status = api, scope, deadline, status

    async def ask(self, begin: int, end: int, offset: int) -> ExecutionPage:
        while True:
            try:
                return await self._api.list(
                    self._scope,
                    begin,
                    max(end, begin + 1),
                    deadline=self._deadline,
                    status=self._status,
                    offset=offset,
                    length=self.page_size,
                )
            except ApiError as error:
                if error.reason != "too_large" or self.page_size == 1:
                    raise
                self.page_size = max(1, self.page_size // 4)
