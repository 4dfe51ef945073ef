"""JOB: executions counted exactly once, hosts that fail, watched jobs (get_job_instance_list, get_job_instance_status).

A run is (id, end time). `turn` decides what a row means for what is known of its execution; `fetch` uses it to know
which executions to examine, `observe` to count. Times are ms since the epoch as the platform gives them, on /metrics
seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import ClassVar, Literal

import msgspec

from exporter.blueking.job import Execution, ExecutionPage, ExecutionStatus, JobApi, Step
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors import failing_hosts
from exporter.collectors.base import (
    GAP,
    TRUNCATED,
    Attempts,
    CollectorState,
    FailedExecution,
    Observed,
    Platforms,
    fold,
    gather_bounded,
)
from exporter.collectors.failing_hosts import FailingHosts, HostResult
from exporter.collectors.job_history import Window, read_slice, read_window
from exporter.config.schema import JobConfig, ScopeConfig, Watch
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import HOST_LABELS, Counts, Family, Labels
from exporter.model import (
    HOST_ALREADY_SUCCEEDED,
    HOST_CODES,
    HOST_SUCCESS,
    HOST_WAITING,
    JOB_STATUSES,
    LAUNCH_MODES,
    STEP_TYPES,
    TASK_TYPES,
    UNKNOWN,
    UNKNOWN_CODE,
    Outcome,
    Scope,
    host_reason,
    job_outcome,
    job_status_slug,
)

CREATED = "blueking_job_executions_created_total"
FINISHED = "blueking_job_executions_finished_total"
REOPENED = "blueking_job_executions_reopened_total"
LOST = "blueking_job_executions_lost_total"
DURATION = "blueking_job_execution_duration_seconds"
STEP_FAILURES = "blueking_job_step_failures_total"
HOST_RESULTS = "blueking_job_host_results_total"
HOST_FAILURES = "blueking_job_host_failures_total"
EXIT_CODES = "blueking_job_host_exit_codes_total"

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
DISTINCT_CODES = 64
"""Values of one label that the platform's scripts choose freely; what comes later is `other`."""
FUTURE = 86_400_000
"""ms: an end further ahead of the platform's own clock is a broken number, not a time."""


class Tracked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one execution. `counted`: its present run has been counted as finished. `timed`: it has had
    its first end. `prior_end`: end of the run before this one. `steps`: step → execute_count whose results have been
    counted."""

    create_time: int
    status: int
    end_time: int | None
    counted: bool
    timed: bool
    task_type: int
    launch_mode: int
    plan_id: int
    name: str
    prior_end: int | None = None
    steps: dict[int, int] | None = None

    @property
    def outcome(self) -> Outcome | None:
        return job_outcome(self.status, self.end_time is not None)

    @property
    def deferred(self) -> bool:
        """It has ended and waits to be examined, to be counted then."""
        return not self.counted and self.outcome is not None


class Watched(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The newest ends of the executions that one `watch` entry matches (ms by outcome), and the newest duration
    (ms)."""

    last_finished: dict[str, int] = {}
    measured_at: int = 0
    duration: int | None = None


class JobState(CollectorState, frozen=True, kw_only=True):
    """`begin`: what was created before it has been seen, and is forgotten unless it may still change; ms. `newest`: the
    highest id that was seen. `unreadable`: milliseconds since `begin` that the platform could not give completely."""

    begin: int
    newest: int = 0
    unreadable: frozenset[int] = frozenset()
    executions: dict[int, Tracked]
    hosts: FailingHosts
    last_finished: dict[str, int]
    watched: dict[str, Watched]
    looked: int
    looked_holders: int


class JobRecords(msgspec.Struct, frozen=True):
    """What one poll brought. `rows`: those that say something new; `examined`: status answers by id; `unexamined`:
    finished ones whose status cannot be had; `deferred`: finished ones that are examined by a later poll; `gone`:
    tracked ids that the platform no longer knows."""

    begin: int
    end: int
    now: int
    rows: dict[int, Execution]
    gap: float = 0.0
    unreadable: frozenset[int] = frozenset()
    truncated: int = 0
    gone: frozenset[int] = frozenset()
    examined: dict[int, ExecutionStatus] = {}
    unexamined: frozenset[int] = frozenset()
    deferred: frozenset[int] = frozenset()
    errors: tuple[str, ...] = ()
    looked: bool = False
    looked_holders: bool = False
    more: bool = False

    @property
    def size(self) -> int:
        """See `Records`."""
        return len(self.rows) + sum(len(step.results) for answer in self.examined.values() for step in answer.steps)


Turn = Literal["none", "running", "finished", "again"]
"""What a row is for an execution: nothing new, (still or again) unfinished, its run has ended, another run has begun
and ended."""


def turn(known: Tracked | None, row: Execution) -> Turn:
    """What `row` means after what is known of its execution."""
    ended = job_outcome(row.status, row.end_time is not None) is not None
    if not ended:
        # What was counted without having ended was given up: it stays lost.
        return "none" if known and known.counted and known.outcome is None else "running"
    if known is None or not known.counted:
        return "finished"
    changed = known.end_time is not None and row.end_time is not None and row.end_time != known.end_time
    return "again" if changed else "none"


def is_news(state: JobState, row: Execution) -> bool:
    """Whether `row` says something that is not known. Most rows of a poll do not: windows overlap."""
    known = state.executions.get(row.id)
    if known is None:
        # What was created before `begin` and is not tracked has been counted and forgotten, unless its id is new.
        return row.create_time >= state.begin or row.id > state.newest
    return known.status != row.status or known.end_time != row.end_time or known.deferred


def group(plan_id: int, name: str) -> str:
    """What a success must share with a failure to be worth asking for its hosts: the plan, or the name of an ad-hoc
    run."""
    return f"plan:{plan_id}" if plan_id > 0 else f"name:{name}"


class JobCollector:
    """See `Collector`."""

    name: ClassVar[str] = "job"
    state_type: ClassVar[type[JobState]] = JobState
    families: ClassVar[tuple[Family, ...]]
    failure_labels: ClassVar[tuple[str, ...]] = ("code", "reason")

    def __init__(self, scope: Scope, config: JobConfig, api: JobApi, clock: Clock, hold: float) -> None:
        self.scope = scope
        self.config = config
        self.interval = config.interval
        self._api = api
        self._clock = clock
        self._hold = hold
        self._attempts = Attempts()
        self._span: int | None = None

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock, hold: float) -> JobCollector | None:
        if platforms.job is None or not config.collectors.job.enabled:
            return None
        return cls(config.scope, config.collectors.job, platforms.job, clock, hold)

    # Fetch

    async def fetch(self, state: JobState | None, deadline: Deadline) -> JobRecords:
        """The history since the state, or what a baseline needs. Raises `ApiError`."""
        return await (self._baseline(deadline) if state is None else self._poll(state, deadline))

    async def _baseline(self, deadline: Deadline) -> JobRecords:
        rows: dict[int, Execution] = {}
        unreadable: frozenset[int] = frozenset()
        wanted = [(status, self.config.max_unfinished_age) for status in UNFINISHED_STATUSES]
        wanted += [(status, self.config.reopen_window) for status in FAILED_STATUSES]
        for status, age in wanted:
            now = self._now()
            window = await self._read(now - ms(age), now, deadline, status)
            rows |= window.rows
            unreadable |= window.unreadable
        # Now the platform's clock is known, whatever this machine's says.
        now = self._now()
        window = await self._read(now - ms(self.config.lookback), now, deadline)
        begin = now - ms(self.config.lookback)
        return JobRecords(begin, now, now, rows | window.rows, unreadable=unreadable | window.unreadable)

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
        records = JobRecords(begin, end, now, news, gap, window.unreadable, more=more)
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
        selected = {row.id: row for row in finished if self._selects(row)}
        examined: dict[int, ExecutionStatus] = {}
        unexamined: set[int] = set()
        deferred: set[int] = set()
        errors: list[str] = []
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
                errors.append(error.reason)
                unexamined.add(row.id)
            else:
                examined[row.id] = answer
                if not complete:
                    errors.append("api_error")
                    unexamined.add(row.id)

        try:
            await gather_bounded((examine(row) for row in sorted(selected.values(), key=_end_order)), CONCURRENCY)
        except ApiError:
            # One outage is held against all that it keeps waiting, or each of them would fail as many polls by itself.
            self._attempts.charge(selected.keys() - examined.keys() - unexamined)
            raise
        if self.config.host_results == "failed":
            failing = set(state.hosts.groups()) | {group(selected[id].plan_id, selected[id].name) for id in examined}
            hosts = state.hosts
            news: list[Execution] = []
            # In the order of time, for a success is worth a call only while a host fails for its plan or name.
            for row in sorted(finished, key=_end_order) if failing else ():
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
        rows: dict[int, Execution] = {}
        unreadable: frozenset[int] = frozenset()
        for first, last in self._windows(begin, end):
            window = await read_window(self._history(deadline, status), first, last)
            rows |= window.rows
            unreadable |= window.unreadable
        return Window(rows, end, unreadable)

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

    def _selects(self, row: Execution) -> bool:
        if self.config.host_results == "all":
            return True
        outcome = job_outcome(row.status, row.end_time is not None)
        return self.config.host_results == "failed" and outcome == "failure"

    def _now(self) -> int:
        return ms(self._clock.platform())

    # Observe

    def observe(self, state: JobState | None, records: JobRecords, now: float) -> Observed[JobState]:
        """Fold the records of a poll; `now` is the wall clock."""
        return _Fold(self, state, records, now).result()

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


class _Fold:
    """One application of records to a state: the mutable side of `observe`, thrown away after `result`."""

    def __init__(self, collector: JobCollector, state: JobState | None, records: JobRecords, now: float) -> None:
        self.collector = collector
        self.config = collector.config
        self.state = state
        self.records = records
        self.now = now
        self.tally = Tally(state.counts if state else Counts(), now, collector._hold)
        self.executions = dict(state.executions) if state else {}
        self.last_finished = dict(state.last_finished) if state else {}
        self.watched = dict(state.watched) if state else {}
        self.hosts: list[HostResult] = []
        self.unknown: list[tuple[str, str]] = []

    def result(self) -> Observed[JobState]:
        self._born_at_zero()
        for row in sorted(self.records.rows.values(), key=_end_order):
            if self.state is None:
                self._register(row)
            else:
                self._count(row)
        for id in self.records.gone:
            known = self.executions.pop(id)
            if known.deferred:
                self._count_deferred(known)
            elif not known.counted:
                self.tally.inc(LOST)
        records, state = self.records, self.state
        hosts = (state.hosts if state else FailingHosts()).fold(
            self.hosts, now=records.now / 1000, ttl=self.config.failing_host_ttl, settled=self._settled() / 1000
        )
        self._forget({streak.run for streak in hosts.streaks.values()})
        known_unreadable = state.unreadable if state else frozenset()
        if records.gap:
            self.tally.inc(GAP, by=records.gap)
        if truncated := records.truncated + len(records.unreadable - known_unreadable):
            self.tally.inc(TRUNCATED, by=truncated)
        self.tally.rebucket(DURATION, self.config.duration_buckets)
        return Observed(
            JobState(
                counts=self.tally.freeze(),
                last_success=self.now,
                watermark=records.end / 1000,
                begin=records.begin,
                newest=max(records.rows, default=0) if state is None else max(state.newest, *records.rows, 0),
                unreadable=frozenset(at for at in known_unreadable | records.unreadable if at >= records.begin),
                executions=self.executions,
                hosts=hosts,
                last_finished=self.last_finished,
                watched=self.watched,
                looked=records.now if state is None or records.looked else state.looked,
                looked_holders=records.now if state is None or records.looked_holders else state.looked_holders,
            ),
            unknown=tuple(self.unknown),
            errors=records.errors,
            more=records.more,
        )

    def _settled(self) -> int:
        """Results from before it are all known: one that is still to come may be as old as its execution."""
        open_ended = (
            known.create_time for known in self.executions.values() if not known.counted or known.outcome == "failure"
        )
        return min([self.records.begin, *open_ended])

    def _born_at_zero(self) -> None:
        for family in (REOPENED, LOST, HOST_RESULTS, GAP, TRUNCATED):
            self.tally.zero(family)
        for task_type in TASK_TYPES.values():
            for launch_mode in LAUNCH_MODES.values():
                self.tally.zero(CREATED, (task_type, launch_mode))
                for status in ("success", "failed"):
                    self.tally.zero(FINISHED, (task_type, launch_mode, status))

    def _register(self, row: Execution) -> None:
        """A baseline: what has finished is known, and not counted."""
        ended = turn(None, row) == "finished"
        self.executions[row.id] = self._tracked(row, counted=ended, timed=ended)
        if ended:
            self._mark_finished(row, first=True)

    def _count(self, row: Execution) -> None:
        known = self.executions.get(row.id)
        if known is None:
            self._count_created(row)
        elif known.deferred:
            known = self._without_deferred(known, row)
        what = turn(known, row)
        if row.status not in JOB_STATUSES and what != "none" and (known is None or known.status != row.status):
            self.unknown.append(("job.status", str(row.status)))
        if what == "running" or row.id in self.records.deferred:
            if known and known.counted:
                self.tally.inc(REOPENED)
                known = msgspec.structs.replace(known, prior_end=known.end_time or known.prior_end)
            # Whatever ends next is not the first end, even if that was never told.
            timed = bool(known and (known.timed or known.counted))
            self.executions[row.id] = self._tracked(row, known, counted=False, timed=timed)
        elif what == "none":
            assert known is not None
            self._fill_in_end(known, row)
        else:
            if known and known.counted:
                self.tally.inc(REOPENED)
                known = msgspec.structs.replace(known, prior_end=known.end_time)
            self._finish(known, row)

    def _count_created(self, row: Execution) -> None:
        if row.task_type not in TASK_TYPES:
            self.unknown.append(("job.type", str(row.task_type)))
        if row.launch_mode not in LAUNCH_MODES:
            self.unknown.append(("job.launch_mode", str(row.launch_mode)))
        self.tally.inc(CREATED, _created_labels(row.task_type, row.launch_mode))

    def _without_deferred(self, known: Tracked, row: Execution) -> Tracked:
        """A run that ended, waited to be examined, and was run again before: counted as it is."""
        counted = msgspec.structs.replace(known, counted=True)
        if turn(counted, row) == "none":
            return known
        self._count_deferred(known)
        return counted

    def _count_deferred(self, known: Tracked) -> None:
        self.tally.inc(FINISHED, _finished_labels(known.task_type, known.launch_mode, known.status))
        self.tally.inc(TRUNCATED)

    def _finish(self, known: Tracked | None, row: Execution) -> None:
        self.tally.inc(FINISHED, _finished_labels(row.task_type, row.launch_mode, row.status))
        timed = bool(known and known.timed)
        if not timed and row.end_time is not None:
            self._observe_duration(row)
        self._mark_finished(row, first=not timed)
        steps = self._fold_status(known, row)
        self.executions[row.id] = self._tracked(
            row, known, counted=True, timed=timed or row.end_time is not None, steps=steps
        )

    def _fill_in_end(self, known: Tracked, row: Execution) -> None:
        """The same run; an end time that was null at first may be there now."""
        if known.end_time is None and row.end_time is not None:
            if not known.timed:
                self._observe_duration(row)
            self._mark_finished(row, first=not known.timed)
            self.executions[row.id] = msgspec.structs.replace(known, end_time=row.end_time, timed=True)

    def _observe_duration(self, row: Execution) -> None:
        """From start to end, unless one of them is missing or they contradict each other."""
        start, end = row.start_time, row.end_time
        if start is None or end is None:
            return
        if start <= end <= self.records.now + FUTURE:
            labels, value = (task_type_slug(row.task_type),), (end - start) / 1000
            self.tally.observe(DURATION, labels, value, self.config.duration_buckets, row.id)
        else:
            self.unknown.append(("job.end_time", str(end)))

    def _mark_finished(self, row: Execution, *, first: bool) -> None:
        outcome = job_outcome(row.status, row.end_time is not None)
        end = known_end(row.end_time, self.records.now)
        if outcome is None or end is None:
            return
        if end > self.last_finished.get(outcome, -1):
            self.last_finished[outcome] = end
        for entry in self.config.watch:
            if not matches(entry, row.plan_id, row.name):
                continue
            old = self.watched.get(entry.job_name, Watched())
            ends = old.last_finished | {outcome: max(end, old.last_finished.get(outcome, end))}
            measured_at, duration = old.measured_at, old.duration
            if first and row.start_time is not None and row.start_time <= end and end >= measured_at:
                measured_at, duration = end, end - row.start_time
            self.watched[entry.job_name] = Watched(ends, measured_at, duration)

    def _fold_status(self, known: Tracked | None, row: Execution) -> dict[int, int] | None:
        """Count the steps and hosts of an examined execution that have not been counted; what has been by now."""
        answer = self.records.examined.get(row.id)
        if answer is None:
            return known.steps if known else None
        steps = dict(known.steps or {}) if known else {}
        if self.collector._selects(row):
            for step in answer.steps:
                if self._is_new(step, steps, known):
                    self._count_step(step, row)
                    steps[step.id] = step.execute_count
        self.hosts += host_results(answer, row, self.records.now)
        return steps or None

    def _is_new(self, step: Step, steps: Mapping[int, int], known: Tracked | None) -> bool:
        if job_outcome(step.status, step.end_time is not None) is None:
            return False
        if step.id in steps:
            return step.execute_count > steps[step.id]
        # A run before the first one that was examined (a baseline's, say) is not this run's to count.
        before = known.prior_end if known and known.steps is None else None
        return before is None or step.end_time is None or step.end_time > before

    def _count_step(self, step: Step, row: Execution) -> None:
        step_type = STEP_TYPES.get(step.step_type, UNKNOWN)
        if step_type == UNKNOWN:
            self.unknown.append(("job.step.type", str(step.step_type)))
        if step.status not in JOB_STATUSES:
            self.unknown.append(("job.step.status", str(step.status)))
        if job_outcome(step.status, step.end_time is not None) == "failure":
            self.tally.inc(STEP_FAILURES, (step_type,))
        for result in step.results:
            if result.status not in HOST_WAITING:
                self.tally.inc(HOST_RESULTS)
            if not is_failure(result.status):
                continue
            self.tally.inc(HOST_FAILURES, self._code_labels(result.status), exemplar=row.id)
            if step_type == "script" and result.exit_code is not None:
                code = self._bounded(EXIT_CODES, 0, str(result.exit_code))
                self.tally.inc(EXIT_CODES, (code,))

    def _code_labels(self, code: int) -> Labels:
        reason = host_reason(code)
        if reason != UNKNOWN_CODE:
            return (str(code), reason)
        self.unknown.append(("job.host.status", str(code)))
        return (self._bounded(HOST_FAILURES, 0, str(code), reason), reason)

    def _bounded(self, family: str, position: int, value: str, *others: str) -> str:
        """`value`, or `other` when its label already has as many values as it may have."""
        if self.tally.has(family, (value, *others)):
            return value
        values = {labels[position] for labels in self.tally.series(family) if labels[1:] == others}
        return value if len(values) < DISTINCT_CODES else "other"

    def _tracked(
        self,
        row: Execution,
        known: Tracked | None = None,
        *,
        counted: bool,
        timed: bool,
        steps: dict[int, int] | None = None,
    ) -> Tracked:
        ended = job_outcome(row.status, row.end_time is not None)
        return Tracked(
            row.create_time,
            row.status,
            row.end_time if ended else None,
            counted,
            timed,
            row.task_type,
            row.launch_mode,
            row.plan_id,
            "" if ended == "success" else row.name,
            known.prior_end if known else None,
            steps if steps is not None or known is None else known.steps,
        )

    def _forget(self, holders: Set[int]) -> None:
        """Keep what can still be listed, what has not ended, and what may be retried: failed executions for a time, and
        those of the failing hosts as long as these fail."""
        now, begin = self.records.now, self.records.begin
        reopen, age = ms(self.config.reopen_window), ms(self.config.max_unfinished_age)
        kept: dict[int, Tracked] = {}
        for id, known in self.executions.items():
            if known.counted and known.create_time >= begin:
                kept[id] = known
                continue
            old = now - known.create_time > age
            # During a catch-up nobody has looked whether it has ended.
            if old and not (known.counted or known.deferred or self.records.more):
                self.tally.inc(LOST)
                known = msgspec.structs.replace(known, counted=True, timed=True)
                retry = False
            else:
                recent = now - (known.end_time or known.create_time) < reopen
                retry = known.counted and known.outcome == "failure" and (recent or id in holders)
            if not known.counted or retry or known.create_time >= begin:
                kept[id] = known
        self.executions = kept


class JobView(msgspec.Struct, frozen=True):
    """A state as the gauges read it, with what has not ended."""

    state: JobState
    config: JobConfig
    unfinished: Sequence[Tracked]


def unfinished(view: JobView) -> Mapping[Labels, float]:
    counted: dict[Labels, float] = {}
    for known in view.unfinished:
        labels = (task_type_slug(known.task_type), job_status_slug(known.status))
        counted[labels] = counted.get(labels, 0.0) + 1.0
    return counted


def oldest_unfinished(view: JobView) -> Mapping[Labels, float]:
    oldest: dict[Labels, float] = {}
    for known in view.unfinished:
        labels = (job_status_slug(known.status),)
        oldest[labels] = min(known.create_time / 1000, oldest.get(labels, float("inf")))
    return oldest


def last_finished(view: JobView) -> Mapping[Labels, float]:
    return {(outcome,): end / 1000 for outcome, end in view.state.last_finished.items()}


def watched_last_finished(view: JobView) -> Mapping[Labels, float]:
    return {
        (entry.job_name, outcome): end / 1000
        for entry in view.config.watch
        for outcome, end in view.state.watched.get(entry.job_name, Watched()).last_finished.items()
    }


def watched_last_duration(view: JobView) -> Mapping[Labels, float]:
    return {
        (name,): known.duration / 1000
        for name, known in view.state.watched.items()
        if known.duration is not None and any(entry.job_name == name for entry in view.config.watch)
    }


def watched_unfinished(view: JobView) -> Mapping[Labels, float]:
    return {
        (entry.job_name,): float(sum(matches(entry, known.plan_id, known.name) for known in view.unfinished))
        for entry in view.config.watch
    }


def watched_max_age(view: JobView) -> Mapping[Labels, float]:
    return {(entry.job_name,): entry.max_age for entry in view.config.watch if entry.max_age is not None}


def matches(entry: Watch, plan_id: int, name: str) -> bool:
    """Whether an execution belongs to a `watch` entry."""
    if entry.job_plan_id is not None:
        return plan_id == entry.job_plan_id
    return entry.name is not None and fnmatchcase(name, entry.name)


def host_results(answer: ExecutionStatus, row: Execution, now: int) -> list[HostResult]:
    """The result of each host of an execution in the last step that it takes part in. `now`: platform's time, ms."""
    newest: dict[str, HostResult | None] = {}
    of, labels = group(row.plan_id, row.name), _LabelsOfCode()
    for step in answer.steps:
        ends = (known_end(end, now) for end in (step.end_time, row.end_time, now))
        otherwise = next(end for end in ends if end is not None)
        for result in step.results:
            status = result.status
            host = None if status in HOST_WAITING else result.host
            if host is None:
                continue
            if status == HOST_ALREADY_SUCCEEDED:
                newest[host.identity] = None
            else:
                end = known_end(result.end_time, now)
                end = otherwise if end is None else end
                newest[host.identity] = HostResult(host, row.id, of, end / 1000, labels[status])
    return [result for result in newest.values() if result is not None]


class _LabelsOfCode(dict[int, Labels | None]):
    """The labels of a host status code, None for a success; one tuple per code, however many hosts have it."""

    def __missing__(self, code: int) -> Labels | None:
        self[code] = labels = (str(code), host_reason(code)) if is_failure(code) else None
        return labels


def known_end(end: int | None, now: int) -> int | None:
    """An end time, unless it is none: before the epoch, or in a future that the platform cannot know of."""
    return end if end is not None and 0 <= end <= now + FUTURE else None


def is_failure(code: int) -> bool:
    """Whether a host result is a failure, unknown codes included."""
    return code not in HOST_WAITING and code not in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)


def task_type_slug(number: int) -> str:
    return TASK_TYPES.get(number, UNKNOWN)


def launch_mode_slug(number: int) -> str:
    return LAUNCH_MODES.get(number, UNKNOWN)


def ms(value: float) -> int:
    return round(value * 1000)


def seconds(value: int | None) -> float | None:
    return None if value is None else value / 1000


# The same few come again and again, and three tables and a tuple cost as much as counting.


@lru_cache(maxsize=1024)
def _created_labels(task_type: int, launch_mode: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode))


@lru_cache(maxsize=1024)
def _finished_labels(task_type: int, launch_mode: int, status: int) -> Labels:
    return (task_type_slug(task_type), launch_mode_slug(launch_mode), job_status_slug(status))


def _end_order(row: Execution) -> tuple[int, int]:
    return (row.end_time or row.create_time, row.id)


def _limit(view: JobView) -> int:
    return view.config.max_failing_hosts


_HOSTS_FAILING, _FAILING_SINCE = failing_hosts.families(
    "blueking_job", JobCollector.failure_labels, "JOB", "作业平台执行"
)

JobCollector.families = (
    Family(
        CREATED,
        "counter",
        ("task_type", "launch_mode"),
        "Executions first seen.",
        "首次发现的作业执行数。",
    ),
    Family(
        FINISHED,
        "counter",
        ("task_type", "launch_mode", "status"),
        "Executions that reached a terminal status, once per run.",
        "进入终态的作业执行数，每次运行只计一次。",
    ),
    Family(REOPENED, "counter", (), "Finished executions that ran again.", "结束后又重新运行的作业执行数。"),
    Family(
        LOST,
        "counter",
        (),
        "Unfinished executions given up: too old, or gone from the platform.",
        "放弃跟踪的未完成作业执行数（过旧，或平台上已不存在）。",
    ),
    Family(
        "blueking_job_executions_unfinished",
        "gauge",
        ("task_type", "status"),
        "Executions now in a non-terminal status.",
        "当前处于非终态的作业执行数。",
        sticky=True,
        gauge=unfinished,
    ),
    Family(
        "blueking_job_oldest_unfinished_timestamp_seconds",
        "gauge",
        ("status",),
        "Creation of the oldest unfinished execution.",
        "最早的未完成作业执行的创建时间。",
        gauge=oldest_unfinished,
    ),
    Family(
        DURATION,
        "histogram",
        ("task_type",),
        "Start to first end of executions.",
        "作业执行从开始到首次结束的耗时。",
    ),
    Family(
        "blueking_job_last_finished_timestamp_seconds",
        "gauge",
        ("outcome",),
        "End of the newest execution with this outcome.",
        "该结果下最近一次作业执行的结束时间。",
        gauge=last_finished,
    ),
    Family(
        STEP_FAILURES,
        "counter",
        ("step_type",),
        "Failed steps of examined executions, once per step and attempt.",
        "被检查的作业执行中失败的步骤数，每个步骤的每次尝试只计一次。",
    ),
    Family(
        HOST_RESULTS,
        "counter",
        (),
        "Host results of the executions that host_results selects.",
        "host_results 所选作业执行中的主机结果数。",
    ),
    Family(
        HOST_FAILURES,
        "counter",
        ("code", "reason"),
        "Failed host results by failure code.",
        "按失败码统计的主机失败结果数。",
    ),
    Family(
        EXIT_CODES,
        "counter",
        ("exit_code",),
        f"Exit codes of failed host results in script steps; the first {DISTINCT_CODES} values of a scope, then other.",
        f"脚本步骤中失败主机结果的退出码；每个范围保留前 {DISTINCT_CODES} 个取值，其余记为 other。",
    ),
    msgspec.structs.replace(_HOSTS_FAILING, gauge=lambda view: view.state.hosts.by_labels()),
    msgspec.structs.replace(_FAILING_SINCE, gauge=lambda view: failing_hosts.since(view.state.hosts, _limit(view))),
    Family(
        "blueking_job_host_consecutive_failures",
        "gauge",
        HOST_LABELS,
        "Executions in a row that failed on a failing host.",
        "失败主机连续失败的作业执行次数。",
        detail=True,
        gauge=lambda view: failing_hosts.consecutive(view.state.hosts, _limit(view)),
    ),
    Family(
        "blueking_job_watched_last_finished_timestamp_seconds",
        "gauge",
        ("job_name", "outcome"),
        "End of the newest watched execution with this outcome.",
        "关注的作业在该结果下最近一次的结束时间。",
        detail=True,
        gauge=watched_last_finished,
    ),
    Family(
        "blueking_job_watched_last_duration_seconds",
        "gauge",
        ("job_name",),
        "Duration of the newest watched execution.",
        "关注的作业最近一次执行的耗时。",
        detail=True,
        gauge=watched_last_duration,
    ),
    Family(
        "blueking_job_watched_unfinished",
        "gauge",
        ("job_name",),
        "Watched executions that have not ended.",
        "关注的作业中尚未结束的执行数。",
        detail=True,
        gauge=watched_unfinished,
    ),
    Family(
        "blueking_job_watched_max_age_seconds",
        "gauge",
        ("job_name",),
        "How old the newest success of a watched job may be (max_age of the configuration).",
        "关注的作业最近一次成功允许的最大时间间隔（配置中的 max_age）。",
        detail=True,
        gauge=watched_max_age,
    ),
)

STATUS_CODE_INFO = Family(
    "blueking_job_status_code_info",
    "gauge",
    ("code", "reason", "category", "text_zh"),
    "The table of host status codes.",
    "主机状态码对照表。",
)
"""Has no scope: the composition root renders it once."""


def status_code_info() -> dict[Labels, float]:
    """Samples of `STATUS_CODE_INFO`."""
    return {(str(code), known.reason, known.category, known.text_zh): 1.0 for code, known in HOST_CODES.items()}
