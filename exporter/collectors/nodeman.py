"""What the collectors of NodeMan share: pages, failed hosts counted once per host and run, the families of hosts."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

import msgspec

from exporter.blueking.nodeman import PAGE_SIZE
from exporter.clock import Clock
from exporter.collectors import failing_hosts
from exporter.collectors.base import GAP, TRUNCATED, CollectorState, FailedCall
from exporter.collectors.calls import Attempts
from exporter.collectors.failing_hosts import FailingHosts, HostResult
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family, Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED, UNKNOWN, Host, Scope

HOST_FAILURES = "blueking_nodeman_host_failures_total"
FAILURE_LABELS = ("collector", "job_type", "step", "code")
FUTURE = 86400.0
"""Seconds: an end further ahead of the platform's clock is no time."""
LATE = 300.0
"""Seconds by which the platform may be late to report that a host has failed."""


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
K = TypeVar("K")
R = TypeVar("R")
S = TypeVar("S", bound=NodemanState)


class NodemanView(msgspec.Struct, Generic[S, C], frozen=True):
    """A state as the gauges read it, with the settings of its scope."""

    state: S
    config: C


class NodemanCollector(Generic[S, C, A]):
    """What the collectors have in common. `S` is their state, `C` the settings of their scope, `A` the API."""

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

    async def ask_each(
        self, what: str, ids: Iterable[int], ask: Callable[[int], Awaitable[R]]
    ) -> tuple[dict[int, R], tuple[FailedCall, ...]]:
        """The answer of `ask` for each of `ids`, and the calls that failed. `what` is what the ids name.

        An id is left out when its answer is not ready, or, as long as another id has an answer, when it is refused for
        good. Raises `ApiError`.
        """
        found: dict[int, R] = {}
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
        return found, tuple(FailedCall.of(error, f"{what} {id}", "not shown") for id, error in errors.items())

    def view(self, state: S) -> NodemanView[S, C]:
        return NodemanView(state, self.config)

    def failing_hosts(self, state: S) -> FailingHosts:
        return state.hosts


async def read_pages(
    api: str,
    ask: Callable[[int], Awaitable[tuple[Sequence[R], int]]],
    key: Callable[[R], K],
    *,
    size: int = PAGE_SIZE,
    until: Callable[[Sequence[R]], bool] = lambda page: False,
) -> dict[K, R]:
    """Rows by their `key`, page by page, up to a page that is not full or for which `until` is true.

    `ask` returns the rows of a page, counted from 1, and the number of all rows. Raises `ApiError` when a page contains
    no new row.
    """
    rows: dict[K, R] = {}
    for number in itertools.count(1):
        page, total = await ask(number)
        known = len(rows)
        rows |= {key(row): row for row in page}
        if len(page) < size or len(rows) >= total or until(page):
            break
        if len(rows) == known:
            raise ApiError("decode", f"{api} repeats a page", api=api)
    return rows


def born_at_zero(tally: Tally) -> None:
    """Let the counters exist that are exposed from the first poll on."""
    for family in (GAP, TRUNCATED):
        tally.zero(family)


def fold_hosts(
    state: NodemanState | None, results: Sequence[HostResult], config: HostsConfig, now: float, *, settled: float
) -> FailingHosts:
    """The failing hosts after these results; see `FailingHosts.fold`. `settled`: seconds before `now`."""
    before = state.hosts if state else FailingHosts()
    return before.fold(results, now=now, ttl=config.failing_host_ttl, settled=now - settled)


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


def is_news(end: float | None, born: float) -> bool:
    """Whether a failure that was not known before counts: not if it ended just before the baseline and was reported
    late.

    The platform gives whole seconds. An end that lies further back is not reliable; a wrong zone gives such ends.
    """
    return end is None or not born - LATE <= end < int(born)


def count_failure(tally: Tally, labels: Labels) -> None:
    """Count one failed host result, by `FAILURE_LABELS`."""
    tally.inc(HOST_FAILURES, labels)


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
