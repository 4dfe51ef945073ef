"""F20: a scope that is refused is polled at growing intervals, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar

import pytest

from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import CollectorState, FailedExecution, Observed, Platforms, Trial
from exporter.collectors.failing_hosts import FailingHosts
from exporter.config.schema import ScopeConfig
from exporter.errors import ApiError, ApiReason
from exporter.exposed import COLLECTOR_FAMILIES
from exporter.metrics.counts import Tally
from exporter.metrics.family import Family
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.model import Scope
from exporter.poller import Poller, Services, Settings
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry

SCOPE = Scope("biz", "2")
SETTINGS = Settings(hold=0.0, stale_after=5, request_timeout=30.0)


class Records:
    size = 0


class Scripted:
    """A collector whose polls end as `reasons` say, the last one for ever; None is a success."""

    name: ClassVar[str] = "scripted"
    families: ClassVar[tuple[Family, ...]] = ()
    state_type: ClassVar[type[Any]] = CollectorState
    failure_labels: ClassVar[tuple[str, ...]] = ()
    run_id: ClassVar[str] = ""

    def __init__(self, *reasons: ApiReason | None, interval: float = 30.0) -> None:
        self.scope = SCOPE
        self.interval = interval
        self.reasons = list(reasons)
        self.asked: list[float] = []

    @classmethod
    def build(cls, config: ScopeConfig, platforms: Platforms, clock: Clock) -> Scripted | None:
        raise NotImplementedError

    @property
    def commits_later(self) -> bool:
        return True

    async def fetch(self, state: CollectorState | None, deadline: Deadline) -> Records:
        self.asked.append(asyncio.get_running_loop().time())
        reason = self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0]
        if reason:
            raise ApiError(reason, "refused")
        return Records()

    def observe(self, state: CollectorState | None, records: Records, tally: Tally) -> Observed[CollectorState]:
        return Observed(CollectorState(counts=tally.freeze(), last_success=tally.now))

    def unchanged(self, state: CollectorState, records: Records, now: float) -> CollectorState | None:
        return None

    async def probe(self, state: CollectorState, deadline: Deadline) -> Trial:
        raise NotImplementedError

    def view(self, state: CollectorState) -> None:
        return None

    def failing_hosts(self, state: CollectorState) -> FailingHosts:
        return FailingHosts()

    def url(self, run: int | str) -> str:
        return ""

    def failed_executions(self, state: CollectorState) -> list[FailedExecution]:
        return []


class Watched:
    """A poller that runs for as long as the test sleeps."""

    def __init__(self, collector: Scripted) -> None:
        loop = asyncio.get_running_loop()
        clock = Clock(wall=lambda: 1_789_000_000 + loop.time(), monotonic=loop.time)
        self.page = Page(COLLECTOR_FAMILIES)
        self.poller = Poller(collector, SETTINGS, Services(MemoryStore(), self.page, Telemetry(), clock))

    async def __aenter__(self) -> Watched:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self.poller.start(lambda one: one.begin(self._tasks))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.poller.stop()
        await self._tasks.__aexit__(None, None, None)
        self.poller.close()

    @property
    def circuit_open(self) -> int:
        lines = b"".join(self.page.exposition(Format.TEXT)).decode().splitlines()
        (line,) = [line for line in lines if line.startswith("blueking_exporter_api_circuit_open{")]
        return int(line.rpartition(" ")[2])


def distances(times: Iterable[float]) -> list[float]:
    """Seconds between polls; the first is left out, since it depends on the phase of the poller."""
    return [round(after - before, 3) for before, after in pairwise(times)][1:]


@pytest.mark.looptime
@pytest.mark.parametrize("reason", ["auth", "permission"])
async def test_F20_a_refused_scope_is_asked_at_growing_intervals(reason: ApiReason) -> None:
    """Two refusals in a row: interval x 2, 4, 8, then every 5 minutes, and the metric says so."""
    collector = Scripted(None, None, reason)
    async with Watched(collector) as watched:
        await asyncio.sleep(65)
        assert watched.circuit_open == 0
        await asyncio.sleep(1800)
        assert watched.circuit_open == 1
    assert distances(collector.asked)[:8] == [30, 30, 60, 120, 240, 300, 300, 300]


@pytest.mark.looptime
async def test_F20_a_good_answer_closes_the_circuit() -> None:
    """The first complete poll restores the interval; a single refusal does not change it."""
    collector = Scripted(None, None, "auth", "auth", "auth", None, "permission", None)
    async with Watched(collector) as watched:
        await asyncio.sleep(30 * 15)
        assert watched.circuit_open == 0
    assert distances(collector.asked)[:8] == [30, 30, 60, 120, 30, 30, 30, 30]


@pytest.mark.looptime
async def test_F20_other_failures_keep_the_rhythm() -> None:
    """A platform that is down is polled in every interval, so that its recovery is noticed at once."""
    collector = Scripted("http_5xx", "timeout", "rate_limited", "api_error", "connect", "http_5xx")
    async with Watched(collector) as watched:
        await asyncio.sleep(600)
        assert watched.circuit_open == 0
    assert set(distances(collector.asked)) == {30}


@pytest.mark.looptime
async def test_F20_a_long_interval_is_not_shortened() -> None:
    """The limit of five minutes applies to shorter intervals only."""
    collector = Scripted("permission", interval=1000.0)
    async with Watched(collector):
        await asyncio.sleep(5500)
    assert set(distances(collector.asked)) == {1000}


@pytest.mark.looptime
async def test_F20_a_reload_asks_at_once() -> None:
    """A reload and a changed secret call this. After a new refusal the intervals grow again."""
    collector = Scripted("auth")
    async with Watched(collector) as watched:
        await asyncio.sleep(1800.5)
        before = len(collector.asked)
        watched.poller.reconfigure(collector, SETTINGS)
        await asyncio.sleep(0.1)
        assert len(collector.asked) == before + 1
        assert watched.circuit_open == 0
        await asyncio.sleep(65)
        assert watched.circuit_open == 1
