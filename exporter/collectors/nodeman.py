"""What the collectors of NodeMan share: the calls of a poll, pages, the fold of their hosts, the families of hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import msgspec

from exporter.blueking.nodeman import PAGE_SIZE
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors import failing_hosts
from exporter.collectors.base import (
    GAP,
    TRUNCATED,
    WITHOUT_HOSTS,
    CollectorState,
    FailedCall,
    FailedExecution,
    FinishedRun,
    Observed,
    Platforms,
)
from exporter.collectors.calls import Attempts, gather_bounded, parts
from exporter.collectors.failing_hosts import FailingHosts, HostResult, Run
from exporter.config.schema import ScopeConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family, Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED, UNKNOWN, Host, Scope

HOST_FAILURES = "blueking_nodeman_host_failures_total"
FAILURE_LABELS = ("collector", "job_type", "step", "code")
FUTURE = 86400.0
"""Seconds: an end further ahead of the platform's clock is no time."""
DURATION_BUCKETS = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)
"""Seconds; bounds of the durations of jobs and workflows."""
LATE = 300.0
"""Seconds by which the platform may be late to report that a host has failed."""
CONCURRENCY = 4
"""Calls of one poll that run at once."""
MOST_EXAMINED = 200
"""Runs whose hosts one poll reads; the next polls, which follow at once, read the others."""


class HostsConfig(Protocol):
    """The settings that every collector with failing hosts has."""

    @property
    def interval(self) -> float: ...
    @property
    def max_failing_hosts(self) -> int: ...
    @property
    def failing_host_ttl(self) -> float: ...


class NodemanState(CollectorState, frozen=True, kw_only=True):
    """A state with failing hosts."""

    hosts: FailingHosts


A = TypeVar("A")
C = TypeVar("C", bound=HostsConfig)
H = TypeVar("H")
K = TypeVar("K", int, str)
R = TypeVar("R")
S = TypeVar("S", bound=NodemanState)


class RunRecords(msgspec.Struct, Generic[K, R, H]):
    """What one poll of a list of runs brought, by the id of the run; `fetch` fills it in.

    `watermark`: unix seconds. `hosts`: what the hosts of a run did, where that was asked for. `unexamined`: runs whose
    hosts cannot be had. `deferred`: runs whose hosts a later poll reads. `gone`: runs that no longer exist.
    """

    watermark: float = 0.0
    rows: dict[K, R] = {}
    hosts: dict[K, tuple[H, ...]] = {}
    unexamined: set[K] = set()
    deferred: set[K] = set()
    gone: set[K] = set()
    errors: list[FailedCall] = []

    @property
    def size(self) -> int:
        """See `Records`."""
        return len(self.rows) + sum(map(len, self.hosts.values()))


class NodemanView(msgspec.Struct, Generic[S, C], frozen=True):
    """A state as the gauges read it, with the settings of its scope."""

    state: S
    config: C


class NodemanFold(Generic[S, C, R]):
    """One application of records to a state: the mutable side of `observe`, thrown away after `result`."""

    def __init__(self, config: C, biz: int, state: S | None, records: R, tally: Tally) -> None:
        self.config: C = config
        self.biz = biz
        self.state = state
        self.records: R = records
        self.tally = tally
        self.truncated = 0
        self.results: list[HostResult] = []
        self.finished: list[FinishedRun] = []
        self.unknown: list[tuple[str, str]] = []
        for family in (GAP, TRUNCATED):
            tally.zero(family)

    def result(self) -> Observed[S]:
        """The next state."""
        raise NotImplementedError

    def count_failure(self, labels: Labels) -> None:
        """Count one failed host result, by `FAILURE_LABELS`."""
        self.tally.inc(HOST_FAILURES, labels)

    def fold_hosts(self, now: float, *, settled: float) -> FailingHosts:
        """The failing hosts after all `results`; see `FailingHosts.fold`. `settled`: seconds before `now`."""
        before = self.state.hosts if self.state else FailingHosts()
        return before.fold(self.results, now=now, ttl=self.config.failing_host_ttl, settled=now - settled)


class NodemanCollector(Generic[S, C, A, R]):
    """What the collectors have in common. `S` is their state, `C` the settings of their scope, `A` the API, `R` the
    records of a poll."""

    name: ClassVar[str]
    fold: ClassVar[type[NodemanFold[Any, Any, Any]]]
    failure_labels: ClassVar[tuple[str, ...]] = FAILURE_LABELS
    run_id: ClassVar[str] = "job_id"

    def __init__(self, scope: Scope, config: C, api: A, clock: Clock) -> None:
        self.scope = scope
        self.config: C = config
        self.interval = config.interval
        self.biz = int(scope.bk_scope_id)
        self._api: A = api
        self._clock = clock
        self._attempts = Attempts()
        self._page_size = PageSize(clock)

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Self | None:
        settings = getattr(config.collectors, cls.name)
        api = getattr(platforms, settings.platform)
        return cls(config.scope, settings, api, clock) if settings.enabled and api is not None else None

    def observe(self, state: S | None, records: R, tally: Tally) -> Observed[S]:
        return self.fold(self.config, self.biz, state, records, tally).result()

    def unchanged(self, state: S, records: R, now: float) -> S | None:
        return None

    @property
    def commits_later(self) -> bool:
        return True

    async def ask_each(
        self, what: str, ids: Iterable[int], ask: Callable[[int], Awaitable[H]]
    ) -> tuple[dict[int, H], tuple[FailedCall, ...]]:
        """The answer of `ask` for each of `ids`, and the calls that failed. `what` is what the ids name.

        An id is left out when its answer is not ready, or, as long as another id has an answer, when it is refused for
        good. Raises `ApiError`.
        """
        found: dict[int, H] = {}
        errors: dict[int, ApiError] = {}
        for id in ids:
            try:
                found[id] = await ask(id)
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                errors[id] = error
        fatal = [error.named(f"{what} {id}") for id, error in errors.items() if error.reason != "not_ready"]
        if fatal and not found:
            raise fatal[0]
        self._attempts.forget(found)
        failed = [FailedCall.of(error, f"{what} {id}", "not shown", configured=True) for id, error in errors.items()]
        return found, tuple(failed)

    async def ask_for_many(
        self, ids: Sequence[K], ask: Callable[[Sequence[K]], Awaitable[H]]
    ) -> tuple[list[tuple[Sequence[K], H]], list[tuple[Sequence[K], ApiError]]]:
        """The answers of `ask`, each with the ids it was asked for, and the ids that cannot be had, with the error.

        If an answer is too large or cannot be decoded, its ids are asked for in two halves. Raises `ApiError` for
        transient errors only, and at most for five polls because of the same ids.
        """
        answers: list[tuple[Sequence[K], H]] = []
        refused: list[tuple[Sequence[K], ApiError]] = []
        size = self._page_size.at(0, PAGE_SIZE)
        waiting: list[Sequence[K]] = list(parts(ids, size))
        while waiting:
            some = waiting.pop()
            try:
                answers.append((some, await ask(some)))
            except ApiError as error:
                if not all(self._attempts.exhausted(id, error) for id in some):
                    self._attempts.charge(some)
                    raise
                if len(some) == 1 or error.reason not in ("too_large", "decode"):
                    refused.append((some, error))
                    continue
                half = len(some) // 2
                waiting += [some[:half], some[half:]]
                if error.reason == "too_large":
                    self._page_size.remember(half)
        return answers, refused

    async def examine(
        self,
        order: Sequence[K],
        records: RunRecords[K, Any, H],
        read: Callable[[K], Awaitable[tuple[H, ...]]],
        about: Callable[[K], str],
        deadline: Deadline,
    ) -> None:
        """Read the hosts of these runs into `records`, in half of the time that is left at most. `about`: what an id is
        called in the log. Raises `ApiError` for transient errors only, and for five polls because of the same run."""
        records.deferred |= set(order[MOST_EXAMINED:])
        patience = deadline.remaining() / 2

        async def examine(id: K) -> None:
            if records.hosts and deadline.remaining() < patience:
                records.deferred.add(id)
                return
            try:
                records.hosts[id] = await read(id)
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                records.errors.append(FailedCall.of(error, about(id), WITHOUT_HOSTS))
                records.unexamined.add(id)

        await gather_bounded((examine(id) for id in order[:MOST_EXAMINED]), CONCURRENCY)

    def view(self, state: S) -> NodemanView[S, C]:
        return NodemanView(state, self.config)

    def failing_hosts(self, state: S) -> FailingHosts:
        return state.hosts

    def url(self, run: Run) -> str:
        """None: the platform has no page of a run."""
        return ""

    def failed_executions(self, state: S) -> list[FailedExecution]:
        """None: what is watched does not end."""
        return []


class Pages(msgspec.Struct, Generic[K, R]):
    """The rows of some pages by their key. `unreadable`: how many rows cannot be read, by the key of the row after
    them, None at the end of the list."""

    rows: dict[K, R]
    unreadable: dict[K | None, int]


class PageSize:
    """Most rows per page; fewer for an hour after an answer was too large."""

    STEPS = (PAGE_SIZE, 100, 20, 5, 1)
    """Each divides the one before it, so that pages of a smaller size continue pages of a larger one."""
    REMEMBERED = 20
    """The least size that is remembered. Smaller pages are for a few rows that are very large."""
    FOR = 3600.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._limit = PAGE_SIZE
        self._until = 0.0

    def at(self, offset: int, wanted: int) -> int:
        """The size of the page that begins at this offset, at most `wanted`."""
        limit = min(wanted, self._limit if self._clock.monotonic() < self._until else PAGE_SIZE)
        return limit if offset % limit == 0 else self.below(limit + 1, offset)

    def below(self, size: int, offset: int) -> int:
        """The next smaller size of a page that begins at this offset."""
        return next(step for step in self.STEPS if step < size and offset % step == 0)

    def remember(self, size: int) -> None:
        """A page of this size was small enough, and a larger one was not."""
        self._limit = max(size, self.REMEMBERED)
        self._until = self._clock.monotonic() + self.FOR


END_OF_LIST = "3800500"
"""Code of a page after the last one of job_list."""


async def read_pages(
    api: str,
    ask: Callable[[int, int], Awaitable[tuple[Sequence[R | None], int | None]]],
    key: Callable[[R], K],
    page_size: PageSize,
    *,
    size: int = PAGE_SIZE,
    until: Callable[[Sequence[R]], bool] = lambda page: False,
    pass_over: bool = False,
) -> Pages[K, R]:
    """Rows by their `key`, page by page, up to a page that is not full or for which `until` is true.

    `ask` takes the number of a page, from 1 on, and its size. It returns the rows, None for one that cannot be read,
    and the number of all rows, None if that is unknown. After an answer that is too large, fewer rows are asked for,
    down to one. With `pass_over` a single row that is too large is left out. Raises `ApiError`, also when a page
    contains no new row.
    """
    pages: Pages[K, R] = Pages({}, {})
    rows, offset, before, unreadable = pages.rows, 0, 0, 0
    smaller: int | None = None
    while True:
        count = smaller or page_size.at(offset, size)
        try:
            page, total = await ask(offset // count + 1, count)
        except ApiError as error:
            if before and error.code == END_OF_LIST:
                break
            if error.reason != "too_large" or (count == 1 and not pass_over):
                raise
            if count > 1:
                smaller = page_size.below(count, offset)
            else:
                smaller, before, unreadable, offset = None, before + 1, unreadable + 1, offset + 1
            continue
        if smaller:
            page_size.remember(smaller)
            smaller = None
        offset += len(page)
        known = len(rows)
        for row in page:
            if row is None:
                before, unreadable = before + 1, unreadable + 1
                continue
            name = key(row)
            rows[name] = row
            if before:
                pages.unreadable[name] = before
                before = 0
        if len(page) != count or (total is not None and len(rows) + unreadable >= total):
            break
        if until([row for row in page if row is not None]):
            return pages
        if len(rows) == known:
            if total is None:
                break  # the answer contains all rows, whatever page is asked for
            raise ApiError("decode", f"{api} repeats a page", api=api)
    if before:
        pages.unreadable[None] = before
    return pages


class OfBusiness(Protocol):
    """A row that may name its business."""

    @property
    def bk_biz_id(self) -> int | None: ...


def is_ours(row: OfBusiness, biz: int) -> bool:
    """Whether a row is of this business, as far as it names one."""
    return row.bk_biz_id in (None, biz)


def ended(status: str, end: float | None) -> bool:
    """Whether a job or instance has ended; one with an unknown status has, as soon as it has an end time."""
    return end is not None if status not in NODEMAN_STATUSES else status not in NODEMAN_UNFINISHED


def known_end(end: int | None, now: float) -> float | None:
    """An end time, None if it lies in a future that the platform cannot know."""
    return None if end is None or end > now + FUTURE else float(end)


def status_label(status: str) -> str:
    return status if status in NODEMAN_STATUSES else UNKNOWN


def name_of(host: Host) -> str:
    """A name that is the same before and after the host is registered and has an id: its address if it has one."""
    return f"{host.bk_cloud_id}:{host.ip}" if host.ip else host.identity


def is_after_baseline(end: float | None, born: float) -> bool:
    """Whether a new failure is counted. It is not if it ended just before the baseline (`born`) and was reported late.

    The platform gives whole seconds. An end that lies further back is not reliable; a wrong zone gives such ends.
    """
    return end is None or not born - LATE <= end < int(born)


def _by_labels(view: NodemanView[NodemanState, HostsConfig]) -> Mapping[Labels, float]:
    return view.state.hosts.by_labels()


def _since(view: NodemanView[NodemanState, HostsConfig]) -> Mapping[Labels, float]:
    return failing_hosts.since(view.state.hosts, view.config.max_failing_hosts)


_HOSTS_FAILING, _FAILING_SINCE = failing_hosts.families("blueking_nodeman", FAILURE_LABELS, "NodeMan", "节点管理任务")

FAMILIES = (
    Family(
        HOST_FAILURES,
        "counter",
        FAILURE_LABELS,
        "Failed host results, once per host and run, by the first failed sub-step.",
        "失败的主机结果数，每台主机每次运行只计一次，按首个失败的子步骤统计。",
    ),
    msgspec.structs.replace(_HOSTS_FAILING, gauge=_by_labels),
    msgspec.structs.replace(_FAILING_SINCE, gauge=_since),
)
"""Families that all collectors of NodeMan show; the label `collector` tells them apart."""
