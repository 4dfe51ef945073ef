"""What the three NodeMan collectors share: pages, hosts that failed, counted once per host and run, who fails now."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from exporter.blueking.nodeman import PAGE_SIZE, NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.clock import Clock
from exporter.collectors import failing_hosts
from exporter.collectors.base import GAP, TRUNCATED, Attempts, CollectorState
from exporter.collectors.failing_hosts import FailingHosts, HostResult
from exporter.config.schema import NodemanJobConfig, NodemanSubscriptionConfig, NodemanTaskConfig
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts, Family, Labels
from exporter.model import NODEMAN_STATUSES, NODEMAN_UNFINISHED, UNKNOWN, Host, Scope

HOST_FAILURES = "blueking_nodeman_host_failures_total"
FAILURE_LABELS = ("collector", "job_type", "step", "code")


C = TypeVar("C", NodemanJobConfig, NodemanSubscriptionConfig, NodemanTaskConfig)
K = TypeVar("K")
R = TypeVar("R")
A = TypeVar("A", NodemanApi, NodemanLegacyApi)


async def read_pages(
    api: str,
    ask: Callable[[int], Awaitable[tuple[Sequence[R], int]]],
    key: Callable[[R], K],
    *,
    size: int = PAGE_SIZE,
    until: Callable[[Sequence[R]], bool] = lambda page: False,
) -> dict[K, R]:
    """The rows by their `key`, page by page, up to one that is not full or that `until` recognises as the last.

    `ask` gives the rows of a page, the first is 1, and how many there are in all. Raises `ApiError` where a page brings
    nothing new.
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


class NodemanState(CollectorState, frozen=True, kw_only=True):
    """A state with failing hosts."""

    hosts: FailingHosts


class NodemanCollector(Generic[C, A]):
    """What the collectors have in common: the settings `C` of their scope, the platform's calls `A`."""

    name: ClassVar[str]
    failure_labels: ClassVar[tuple[str, ...]] = FAILURE_LABELS

    def __init__(self, scope: Scope, config: C, api: A, clock: Clock, hold: float) -> None:
        self.scope = scope
        self.config: C = config
        self.interval = config.interval
        self.biz = int(scope.bk_scope_id)
        self.hold = hold
        self._api: A = api
        self._clock = clock
        self._attempts = Attempts()

    async def ask_each(
        self, ids: Iterable[int], ask: Callable[[int], Awaitable[R]]
    ) -> tuple[dict[int, R], tuple[str, ...]]:
        """What `ask` gives of each of `ids`, and the reasons of those that are left out: what is not ready, and, as
        long as there is another one, what cannot be had for good. Raises `ApiError`."""
        found: dict[int, R] = {}
        errors: list[ApiError] = []
        for id in ids:
            try:
                found[id] = await ask(id)
            except ApiError as error:
                if not self._attempts.give_up(id, error):
                    raise
                errors.append(error)
        fatal = [error for error in errors if error.reason != "not_ready"]
        if fatal and not found:
            raise fatal[0]
        self._attempts.forget(found)
        return found, tuple(error.reason for error in errors)

    def tally(self, state: NodemanState | None, now: float) -> Tally:
        """What has been counted, to be counted on; `now` is the wall clock."""
        tally = Tally(state.counts if state else Counts(), now, self.hold)
        for family in (GAP, TRUNCATED):
            tally.zero(family)
        return tally

    def fold_hosts(
        self, state: NodemanState | None, results: Sequence[HostResult], now: float, *, settled: float
    ) -> FailingHosts:
        """Who fails after these results; see `FailingHosts.fold`, but `settled` in seconds before `now`."""
        before = state.hosts if state else FailingHosts()
        return before.fold(results, now=now, ttl=self.config.failing_host_ttl, settled=now - settled)

    def view(self, state: NodemanState) -> NodemanView:
        return NodemanView(state, self.config)

    def failing_hosts(self, state: NodemanState) -> FailingHosts:
        return state.hosts


class NodemanView(msgspec.Struct, frozen=True):
    """A state as the gauges read it: `state` and `config` are the collector's own types."""

    state: Any
    config: Any


def ended(status: str, end: float | None) -> bool:
    """Whether a job or instance has ended; one with an unknown status has, as soon as it has an end time."""
    return end is not None if status not in NODEMAN_STATUSES else status not in NODEMAN_UNFINISHED


def known_end(end: int | None, now: float) -> float | None:
    """When something ended, unless that lies in a future that the platform cannot know of."""
    return None if end is None or end > now + FUTURE else float(end)


def status_label(status: str) -> str:
    return status if status in NODEMAN_STATUSES else UNKNOWN


def name_of(host: Host) -> str:
    """The same before and after the host has been registered and has an id: its address where it has one."""
    return f"{host.bk_cloud_id}:{host.ip}" if host.ip else host.identity


FUTURE = 86400.0
"""Seconds: an end further ahead of the platform's own clock is a broken number, not a time."""
LATE = 300.0
"""Seconds by which the platform may be late to tell that a host has failed."""


def is_news(end: float | None, born: float) -> bool:
    """Whether an end that has not been known counts: not if it came just before the baseline, told late.

    The platform gives whole seconds. One that lies further back is nothing to rely on, as in a wrong zone.
    """
    return end is None or not born - LATE <= end < int(born)


def count_failure(tally: Tally, labels: Labels) -> None:
    """One failed host result, by `FAILURE_LABELS`."""
    tally.inc(HOST_FAILURES, labels)


def by_labels(view: NodemanView) -> Mapping[Labels, float]:
    hosts: FailingHosts = view.state.hosts
    return hosts.by_labels()


def since(view: NodemanView) -> Mapping[Labels, float]:
    return failing_hosts.since(view.state.hosts, view.config.max_failing_hosts)


def _families() -> tuple[Family, ...]:
    gauges: tuple[Callable[[NodemanView], Mapping[Labels, float]], ...] = (by_labels, since)
    rows = failing_hosts.families("blueking_nodeman", FAILURE_LABELS, "NodeMan", "节点管理任务")
    return (
        Family(
            HOST_FAILURES,
            "counter",
            FAILURE_LABELS,
            "Failed host results, once per host and run, by the first failed sub-step.",
            "失败的主机结果数，每台主机每次运行只计一次，按首个失败的子步骤统计。",
        ),
        *(msgspec.structs.replace(row, gauge=gauge) for row, gauge in zip(rows, gauges, strict=True)),
    )


FAMILIES = _families()
"""Rows that all three show; the label `collector` tells them apart."""
