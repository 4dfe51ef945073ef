"""One locked `apply` starts, changes and stops all pollers, for a configuration and for an assignment."""

from __future__ import annotations

import asyncio
import gc
import itertools
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import yaml

import exporter
from exporter.clock import Clock
from exporter.collectors.job.state import JobState
from exporter.config.load import load
from exporter.config.schema import Config
from exporter.errors import StateError, StateTaken
from exporter.exposed import page_families
from exporter.fleet import BEGIN_EVERY, LOADED, QUEUED, Fleet
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.model import Key, Scope
from exporter.poller import Services
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, target
from exporter.state.base import Stored
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry
from tests.support.parsers import parse

SCOPES = [Scope("biz", str(number)) for number in range(2, 12)]
GONE = SCOPES[3:7]
INTERVAL = 30.0
EPOCH = 1_795_000_000.0

OWN_CODE = [
    tracemalloc.Filter(True, f"{Path(exporter.__file__).parent}/*"),
    tracemalloc.Filter(False, "*/simulator/*"),
]

pytestmark = pytest.mark.looptime


class Store(MemoryStore):
    """A store that fails to load the state of these scopes, and takes a while for the others. It counts commits by
    scope, refuses them while it is `full`, and checks and commits while it is `gone`."""

    broken: frozenset[Scope] = frozenset()
    full = gone = False

    def __init__(self) -> None:
        super().__init__()
        self.commits: Counter[str] = Counter()

    async def commit(self, key: Key, payload: bytes) -> None:
        if self.full or self.gone:
            raise StateError("no space left")
        self.commits[str(key.scope)] += 1
        await super().commit(key, payload)

    async def check(self) -> bool:
        if self.gone:
            raise StateError("no such directory")
        return await super().check()

    async def load(self, key: Key) -> Stored | None:
        await asyncio.sleep(0.01)
        if key.scope in self.broken:
            raise StateError("broken")
        return await super().load(key)


class Taken(MemoryStore):
    """A store in which another replica takes over a key while it is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet: Fleet | None = None
        self.lost: Key | None = None

    async def commit(self, key: Key, payload: bytes) -> None:
        if key == self.lost and self.fleet is not None:
            self.fleet.drop(key)
            raise StateTaken(f"another replica has {key}")
        await super().commit(key, payload)


class Watched:
    """A fleet, the platform that it polls, and its page."""

    def __init__(
        self,
        folder: Path,
        url: str,
        platform: Platform,
        fleet: Fleet,
        page: Page,
        store: MemoryStore,
        telemetry: Telemetry,
    ) -> None:
        self.folder, self.url, self.platform = folder, url, platform
        self.fleet, self.page, self.store, self.telemetry = fleet, page, store, telemetry

    def config(
        self,
        scopes: Iterable[Scope] = SCOPES,
        *,
        interval: str = f"{INTERVAL:.0f}s",
        max_catchup: str = "7d",
        **blueking: object,
    ) -> Config:
        """A configuration of these scopes."""
        file = self.folder / "config.yaml"
        settings = {
            "blueking": {
                "job": {"url": f"{self.url}/api/bk-job/prod"},
                "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
                "requests_per_second": 1000,
                **blueking,
            },
            "collectors": {"job": {"interval": interval, "max_catchup": max_catchup}},
            "counter_birth_hold": "0s",
            "scopes": [{"bk_scope_type": one.bk_scope_type, "bk_scope_id": one.bk_scope_id} for one in scopes],
        }
        file.write_text(yaml.safe_dump(settings))
        return load(file).config

    async def calls_per_poll(self) -> Counter[str]:
        """Calls by scope within three intervals, once all baselines are over."""
        await asyncio.sleep(INTERVAL)
        self.platform.calls.clear()
        await asyncio.sleep(3 * INTERVAL)
        return Counter(call.scope for call in self.platform.calls)

    def known(self, key: Key) -> JobState:
        """The state in memory."""
        state = self.fleet.pollers[key].state
        assert isinstance(state, JobState)
        return state

    def shown(self, name: str) -> dict[str, int]:
        """The values of a metric on the page by scope; several series of a scope are added up."""
        found: Counter[str] = Counter()
        text = b"".join(self.page.exposition(Format.TEXT)).decode()
        for family in parse(text, Format.TEXT):
            for sample in family.samples:
                if sample.name == name:
                    found[f"{sample.labels['bk_scope_type']}/{sample.labels['bk_scope_id']}"] += int(sample.value)
        return dict(found)

    def finish(self, scope: Scope) -> None:
        """An execution that is over at once."""
        self.platform.job.start(scope, steps=[StepScript(duration=0.0, results={target(1): 9})])


@asynccontextmanager
async def watched(
    folder: Path,
    store: MemoryStore | None = None,
    *,
    shares_rate: bool = False,
    scopes: Sequence[Scope] = SCOPES,
) -> AsyncIterator[Watched]:
    loop = asyncio.get_running_loop()

    def now() -> float:
        return EPOCH + loop.time()

    looks = itertools.count()

    def monotonic() -> float:
        # A nanosecond for each look, or a loop that waits for a moment would never see it pass.
        return loop.time() + next(looks) * 1e-9

    platform = Platform(scopes=[*scopes], now=now)
    store, page, telemetry = store or Store(), Page(page_families()), Telemetry()
    services = Services(store, page, telemetry, Clock(now, monotonic))
    async with SimulatorServer(platform) as server, Fleet(services, shares_rate=shares_rate) as fleet:
        yield Watched(folder, server.url, platform, fleet, page, store, telemetry)


def names(scopes: Iterable[Scope]) -> set[str]:
    return {str(scope) for scope in scopes}


def times(calls: int, scopes: Iterable[Scope]) -> dict[str, int]:
    return dict.fromkeys(sorted(names(scopes)), calls)


async def test_F53_applies_at_the_same_time_leave_one_poller_per_key(tmp_path: Path) -> None:
    """Twenty changes of scopes and of the client at once: the last one holds, and each scope is asked once a poll."""
    async with watched(tmp_path) as one:
        changes = [one.config(SCOPES[: number % 10 + 1], max_concurrency=number % 3 + 1) for number in range(5)]
        await asyncio.gather(*(one.fleet.apply(config) for config in changes))
        await asyncio.gather(*(one.fleet.apply(one.config(SCOPES[:7])) for _ in range(20)))
        assert one.shown("blueking_scope_info").keys() == names(SCOPES[:7])
        assert dict(sorted((await one.calls_per_poll()).items())) == times(3, SCOPES[:7])
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(names(SCOPES[:7]), 1)


async def test_an_assignment_narrows_what_is_polled(tmp_path: Path) -> None:
    """Unassigned scopes are neither polled nor shown, also after a reload; scopes that come back continue counting."""
    finished = "blueking_job_executions_finished_total"
    async with watched(tmp_path) as one:
        await one.fleet.apply(one.config())
        await asyncio.sleep(INTERVAL)
        for scope in SCOPES:
            one.finish(scope)
        await asyncio.sleep(INTERVAL)
        assert one.shown(finished) == dict.fromkeys(names(SCOPES), 1)

        mine = SCOPES[:3]
        await one.fleet.apply(assigned=lambda key: key.scope in mine)
        assert one.shown("blueking_scope_info").keys() == one.shown(finished).keys() == names(mine)
        await one.fleet.apply(one.config(SCOPES[1:], max_concurrency=5))
        assert one.shown("blueking_scope_info").keys() == names(SCOPES[1:3])
        assert await one.calls_per_poll() == times(3, SCOPES[1:3])

        one.finish(SCOPES[5])
        await one.fleet.apply(assigned=lambda key: True)
        assert one.shown(finished) == dict.fromkeys(names(SCOPES[1:]), 1), "loaded counters are shown at once"
        await asyncio.sleep(INTERVAL)
        assert one.shown(finished) == dict.fromkeys(names(SCOPES[1:]), 1) | {str(SCOPES[5]): 2}


async def test_replicas_share_the_rate_by_what_they_own(tmp_path: Path) -> None:
    """With 3 of 10 scopes 3 of 10 requests per second, also after a reload that makes another client."""

    async def calls(seconds: float) -> int:
        one.platform.calls.clear()
        await asyncio.sleep(seconds)
        return len(one.platform.calls)

    async with watched(tmp_path, shares_rate=True) as one:
        mine = SCOPES[:3]
        rate = 0.2  # so little that polls always queue
        await one.fleet.apply(one.config(requests_per_second=rate), assigned=lambda key: key.scope in mine)
        share = rate * len(mine) / len(SCOPES)
        await asyncio.sleep(2 / share)
        assert await calls(20 / share) == pytest.approx(20, abs=1)
        await one.fleet.apply(one.config(requests_per_second=2 * rate))
        assert await calls(10 / share) == pytest.approx(20, abs=1)
        await one.fleet.apply(assigned=lambda key: key.scope in SCOPES[:6])
        assert await calls(10 / share) == pytest.approx(40, abs=2)


async def test_a_key_that_is_lost_while_it_is_committed_stays_off_the_page(tmp_path: Path) -> None:
    """The poll that finds it taken shows nothing any more, counts no failed write, and is the last one."""
    store = Taken()
    async with watched(tmp_path, store) as one:
        store.fleet = one.fleet
        await one.fleet.apply(one.config())
        await asyncio.sleep(INTERVAL)
        store.lost = Key("job", SCOPES[2])
        one.finish(SCOPES[2])
        await asyncio.sleep(2 * INTERVAL)
        left = names(scope for scope in SCOPES if scope != SCOPES[2])
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(left, 1)
        assert one.shown("blueking_scope_info").keys() == left
        assert SCOPES[2] not in {key.scope for key in one.fleet.pollers}
        assert "blueking_exporter_state_write_errors_total 0\n" in one.telemetry.render(openmetrics=False).decode()
        assert (await one.calls_per_poll()).keys() == left


@asynccontextmanager
async def quiet(folder: Path, store: Store) -> AsyncIterator[Watched]:
    """Ten scopes, as the daemon watches them, after their baselines."""
    async with watched(folder, store) as one:
        await one.fleet.apply(one.config())
        keeping = asyncio.create_task(one.fleet.keep_state())
        await asyncio.sleep(3 * INTERVAL)
        yield one
        keeping.cancel()


async def test_a_quiet_hour_commits_each_scope_once_a_minute(tmp_path: Path) -> None:
    """However often it is polled; so a state that can no longer be written is noticed, and `kill -9` costs a minute
    that is read again."""
    store = Store()
    async with quiet(tmp_path, store) as one:
        await one.fleet.apply(one.config(interval="10s"))
        await asyncio.sleep(10)
        store.commits.clear()
        one.platform.calls.clear()
        for _ in range(60):
            await asyncio.sleep(60)
            assert await age_of_states(one) <= 60 + 2 * 10
        assert len(one.platform.calls) == pytest.approx(360 * len(SCOPES), rel=0.02)
        assert set(store.commits) == names(SCOPES)
        assert max(store.commits.values()) <= 60
        assert "blueking_exporter_state_write_errors_total 0\n" in one.telemetry.render(openmetrics=False).decode()


async def age_of_states(one: Watched) -> float:
    """Seconds that the oldest last success in the store is behind that in memory."""
    found = await stored_states(one)
    return max(one.known(key).last_success - state.last_success for key, state in found.items())


async def stored_states(one: Watched) -> dict[Key, JobState]:
    """What the store holds of the pollers; it differs from what they hold in times at most."""
    found: dict[Key, JobState] = {}
    for key in one.fleet.pollers:
        stored = await one.store.load(key)
        assert stored is not None
        found[key] = msgspec.msgpack.decode(stored.payload, type=JobState)
        assert found[key].equals_except_times(one.known(key))
    return found


async def test_a_quiet_scope_is_small(tmp_path: Path) -> None:
    """Between two polls it has no task, and it takes some kB, its series and its state in the store included."""
    few = [Scope("biz", str(100 + number)) for number in range(5)]
    many = [Scope("biz", str(1000 + number)) for number in range(35)]
    async with watched(tmp_path, scopes=[*few, *many]) as one:
        sizes = []
        tracemalloc.start()
        try:
            for scopes in (few, many):
                await one.fleet.apply(one.config(scopes))
                await asyncio.sleep(1.2 * INTERVAL)
                assert one.page.snapshot(Format.TEXT).size
                assert one.page.snapshot(Format.OPENMETRICS).size
                gc.collect()
                traces = tracemalloc.take_snapshot().filter_traces(OWN_CODE)
                sizes.append(sum(trace.size for trace in traces.traces))
        finally:
            tracemalloc.stop()
        assert one.fleet.attempted
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("poll ")]
        assert len(one.fleet.pollers) == 35
        assert (sizes[1] - sizes[0]) / 30 < 14_000


async def test_all_states_are_read_at_once(tmp_path: Path) -> None:
    """A start asks the store once for hundreds of states, not for one after the other."""
    asked: list[int] = []

    class Counting(MemoryStore):
        async def load_many(self, keys: Sequence[Key]) -> Mapping[Key, Stored]:
            asked.append(len(keys))
            return await super().load_many(keys)

    scopes = [Scope("biz", str(100 + number)) for number in range(LOADED + 50)]
    async with watched(tmp_path, Counting(), scopes=scopes) as one:
        await one.fleet.apply(one.config(scopes))
        assert asked == [LOADED, 50]


async def test_a_start_queues_few_polls(tmp_path: Path) -> None:
    """Of many scopes only so many polls begin as calls can be queued: a poll that waits takes memory. All have their
    turn."""
    scopes = [Scope("biz", str(100 + number)) for number in range(4 * QUEUED)]
    async with watched(tmp_path, scopes=scopes) as one:
        await one.fleet.apply(one.config(scopes, interval="1h", requests_per_second=100))
        most = 0
        while not one.fleet.attempted:
            await asyncio.sleep(BEGIN_EVERY / 2)
            most = max(most, sum(task.get_name().startswith("poll ") for task in asyncio.all_tasks()))
        assert QUEUED <= most < 3 * QUEUED


async def test_a_start_ends_when_the_polls_are_more_than_may_be_sent(tmp_path: Path) -> None:
    """Every scope has its first poll before another one has its second, and what is too much waits without a task."""
    scopes = [Scope("biz", str(100 + number)) for number in range(2 * QUEUED)]
    async with watched(tmp_path, scopes=scopes) as one:
        await one.fleet.apply(one.config(scopes))
        await asyncio.sleep(INTERVAL)
        await one.fleet.apply(one.config(scopes[:1]))
        one.platform.calls.clear()
        await one.fleet.apply(one.config(scopes, interval="1s", requests_per_second=20))
        await asyncio.sleep(3 * len(scopes) / 20)
        calls = [str(call.scope) for call in one.platform.calls]
        assert len({*calls[: len(scopes)]}) == len(scopes)
        assert min(Counter(calls).values()) >= 2
        assert sum(task.get_name().startswith("poll ") for task in asyncio.all_tasks()) <= 2 * QUEUED


async def test_a_reload_touches_only_what_has_changed(tmp_path: Path) -> None:
    """The same scopes keep their collectors and leave the page as it is; one that is new, or another setting, does
    not."""
    async with watched(tmp_path) as one:
        await one.fleet.apply(one.config())
        await asyncio.sleep(1.5 * INTERVAL)
        collectors = {key: poller.collector for key, poller in one.fleet.pollers.items()}
        page = one.page.snapshot(Format.TEXT)
        await one.fleet.apply(one.config())
        assert one.page.snapshot(Format.TEXT) is page
        assert all(one.fleet.pollers[key].collector is collector for key, collector in collectors.items())
        await one.fleet.apply(one.config(SCOPES[1:]))
        assert one.fleet.pollers.keys() == collectors.keys() - {Key("job", SCOPES[0])}
        assert all(poller.collector is collectors[key] for key, poller in one.fleet.pollers.items())
        await one.fleet.apply(one.config(SCOPES[1:], max_catchup="6d"))
        assert not any(poller.collector is collectors[key] for key, poller in one.fleet.pollers.items())


@pytest.mark.parametrize("how", ["stop", "reload", "scopes removed", "handed over"])
async def test_what_stops_polling_commits_what_it_knows(tmp_path: Path, how: str) -> None:
    """The next process, or replica, continues where this one has ended."""
    async with quiet(tmp_path, Store()) as one:
        await asyncio.sleep(INTERVAL - 1)
        assert await age_of_states(one) > 1
        stopped = {key: one.known(key) for key in one.fleet.pollers if how in ("stop", "reload") or key.scope in GONE}
        if how == "stop":
            await one.fleet.stop()
        elif how == "reload":
            await one.fleet.apply(one.config(max_concurrency=3))
        elif how == "scopes removed":
            await one.fleet.apply(one.config([scope for scope in SCOPES if scope not in GONE]))
        else:
            await one.fleet.apply(assigned=lambda key: key.scope not in GONE)
        for key, state in stopped.items():
            stored = await one.store.load(key)
            assert stored is not None
            found = msgspec.msgpack.decode(stored.payload, type=JobState)
            assert found.equals_except_times(state)
            assert found.last_success >= state.last_success


async def test_F41_a_state_that_cannot_be_written_fails_quiet_polls_within_two_minutes(tmp_path: Path) -> None:
    """Each poll fails with reason `state` until there is space, and the page stands still; then all are committed."""
    store = Store()
    async with quiet(tmp_path, store) as one:
        store.full = True
        await asyncio.sleep(120)
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(names(SCOPES), 0)
        assert {poller.reason for poller in one.fleet.pollers.values()} == {"state"}
        marks = one.shown("blueking_exporter_collector_watermark_timestamp_seconds")
        errors = sum(one.shown("blueking_exporter_collector_errors_total").values())
        await asyncio.sleep(INTERVAL)
        assert one.shown("blueking_exporter_collector_watermark_timestamp_seconds") == marks
        assert sum(one.shown("blueking_exporter_collector_errors_total").values()) == errors + len(SCOPES)
        store.full = False
        store.commits.clear()
        await asyncio.sleep(INTERVAL)
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(names(SCOPES), 1)
        assert set(store.commits) == names(SCOPES)
        assert await age_of_states(one) == 0


async def test_F65_a_state_that_is_gone_fails_quiet_polls_after_the_next_check(tmp_path: Path) -> None:
    """Not only after a minute, when they would be committed."""
    store = Store()
    async with quiet(tmp_path, store) as one:
        await asyncio.sleep(60)
        store.gone = True
        await asyncio.sleep(10 + INTERVAL)
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(names(SCOPES), 0)
        assert {poller.reason for poller in one.fleet.pollers.values()} == {"state"}
        store.gone = False
        await asyncio.sleep(INTERVAL)
        assert one.shown("blueking_exporter_collector_success") == dict.fromkeys(names(SCOPES), 1)


async def test_a_short_catchup_is_committed_with_every_poll(tmp_path: Path) -> None:
    """A watermark of a minute ago would tell of a gap that is none, after `kill -9` and a pause of `max_catchup`."""
    store = Store()
    async with quiet(tmp_path, store) as one:
        await one.fleet.apply(one.config(max_catchup="599s"))
        await asyncio.sleep(INTERVAL)
        store.commits.clear()
        await asyncio.sleep(10 * INTERVAL)
        assert store.commits == times(10, SCOPES)


async def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    """A state that cannot be loaded: scopes, client and assignment stay as they were, and the next apply succeeds."""
    async with watched(tmp_path) as one:
        await one.fleet.apply(one.config(SCOPES[:4]), assigned=lambda key: key.scope in SCOPES[:2])
        assert isinstance(one.store, Store)
        one.store.broken = frozenset({SCOPES[3]})
        for change in (
            one.fleet.apply(assigned=lambda key: True),
            one.fleet.apply(one.config(max_concurrency=2), assigned=lambda key: key.scope in SCOPES[2:]),
        ):
            with pytest.raises(StateError):
                await change
            assert one.shown("blueking_scope_info").keys() == names(SCOPES[:2])
        assert await one.calls_per_poll() == times(3, SCOPES[:2])
        one.store.broken = frozenset()
        assert await one.fleet.apply(assigned=lambda key: True)
        assert one.shown("blueking_scope_info").keys() == names(SCOPES[:4])


async def test_a_stop_is_for_good(tmp_path: Path) -> None:
    """It ends all polls and leaves the page; an apply that waited for its turn starts nothing."""
    async with watched(tmp_path) as one:
        applied = [asyncio.create_task(one.fleet.apply(one.config(SCOPES[:n]))) for n in (3, 5)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(one.fleet.stop())
        applied.append(asyncio.create_task(one.fleet.apply(one.config())))
        await stopping
        assert await asyncio.gather(*applied) == [True, True, False]
        assert one.shown("blueking_scope_info").keys() == names(SCOPES[:5])
        assert await one.calls_per_poll() == {}
