"""Replicas on one store in virtual time, with faults at random: who polls and shows what, and what is never lost.

The server is the model that real servers are held against; what is tested here is `RedisStore`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from exporter.config.schema import State
from exporter.config.state_url import StateUrl
from exporter.errors import StateError
from exporter.model import Key, Scope
from exporter.state.redis import RedisStore
from exporter.telemetry import Telemetry
from tests.support.redis_model import ModelClient, Server

TTL = 3.0
BEAT = TTL / 10
TAKEOVER = TTL + 1.0
"""Seconds within which the scopes of a lost replica are shown again."""
SCOPES = tuple(Scope("biz", str(number)) for number in range(1, 13))
KEYS = {scope: Key("job", scope) for scope in SCOPES}
POLL = 1.0
STATE = State(url=StateUrl().parse("redis://127.0.0.1", Path("/")), lease_ttl=TTL)

Fault = Literal["kill", "freeze", "leave", "join", "cut", "lossy", "pause", "flush", "restart", "rewind"]


class Observer(Telemetry):
    def __init__(self) -> None:
        super().__init__()
        self.takeovers: dict[str, int] = {}
        self.fenced_keys = self.rollbacks = 0

    def takeover(self, cause: str) -> None:
        self.takeovers[cause] = self.takeovers.get(cause, 0) + 1

    def fenced(self) -> None:
        self.fenced_keys += 1

    def state_rollback(self) -> None:
        self.rollbacks += 1


class Replica:
    """A process in small: a store, what the fleet does with it, and polls that count up to the platform's time."""

    def __init__(self, server: Server, pod: str, chance: random.Random) -> None:
        self.loop = asyncio.get_running_loop()
        self.observer = Observer()
        self.client = ModelClient(server, chance, TTL / 5)
        self.store = RedisStore(
            STATE, pod=pod, telemetry=self.observer, boot=self.loop.time, client=self.client,
            wall=lambda: 1_795_000_000 + self.loop.time(),
        )  # fmt: skip
        self.shown: dict[Scope, int] = {}
        self.polls: dict[Key, asyncio.Task[None]] = {}
        self.tasks = [asyncio.create_task(self.store.send_heartbeats(self.lost)), asyncio.create_task(self.share())]
        self.frozen = asyncio.Event()

    def page(self) -> dict[Scope, int]:
        """What a scrape would see now; a frozen process answers nothing."""
        return dict(self.shown) if self.store.valid and self.client.going.is_set() else {}

    def lost(self, key: Key) -> None:
        self.shown.pop(key.scope, None)
        if task := self.polls.pop(key, None):
            task.cancel()

    async def share(self) -> None:
        while True:
            await self.store.next_heartbeat()
            mine = await self.store.assigned(SCOPES)
            if mine is None:
                continue
            give = [key for key in self.store.held if key.scope not in mine]
            for key in give:
                self.lost(key)
            with contextlib.suppress(StateError):
                await self.store.release(give)
            wanted = [KEYS[scope] for scope in SCOPES if scope in mine and KEYS[scope] not in self.polls]
            async for _ in self.store.claim(wanted):
                self.start_polls(mine)
            self.start_polls(mine)

    def start_polls(self, mine: frozenset[Scope]) -> None:
        for key in self.store.held:
            if key.scope in mine and key not in self.polls:
                self.polls[key] = asyncio.create_task(self.poll(key))

    async def poll(self, key: Key) -> None:
        stored = await self.store.load(key)
        count = int(stored.payload) if stored else -1
        if stored and stored.current:
            self.shown[key.scope] = count
        while True:
            try:
                self.store.ensure(key)
                await asyncio.sleep(0.05)  # the platform answers
                now = int(self.loop.time() * 10)
                assert now >= count, "nothing is counted that has not happened"
                await self.store.commit(key, b"%d" % now)
                count = self.shown[key.scope] = now
            except StateError:
                pass
            await asyncio.sleep(POLL)

    async def leave(self) -> None:
        await self.store.leave()
        self.tasks[1].cancel()
        for task in self.polls.values():
            task.cancel()
        await asyncio.sleep(1.5 * BEAT)
        keys = list(self.polls)
        self.shown.clear()
        with contextlib.suppress(StateError):
            await self.store.release(keys)
        await self.kill(close=True)

    async def kill(self, *, close: bool = False) -> None:
        tasks = [*self.tasks, *self.polls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self.shown.clear()
        if close:
            await self.store.close()
        await self.client.close()


class World:
    """All replicas of a run, and a scraper that looks at every page."""

    def __init__(self, seed: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.chance = random.Random(seed)
        self.server = Server()
        self.replicas: dict[str, Replica] = {}
        self.highest: dict[Scope, int] = {}
        self.seen_at: dict[Scope, float] = {}
        self.longest_gap = 0.0
        self.doubles: list[tuple[float, Scope]] = []
        self.falls: list[tuple[float, Scope, int, int]] = []
        self.scraping = asyncio.create_task(self.scrape())

    def join(self, pod: str) -> Replica:
        self.replicas[pod] = Replica(self.server, pod, self.chance)
        return self.replicas[pod]

    async def scrape(self) -> None:
        while True:
            now = self.loop.time()
            pages = [replica.page() for replica in self.replicas.values()]
            for scope in SCOPES:
                values = [page[scope] for page in pages if scope in page]
                if len(values) > 1:
                    self.doubles.append((now, scope))
                for value in values:
                    if value < self.highest.get(scope, -1):
                        self.falls.append((now, scope, self.highest[scope], value))
                    self.highest[scope] = max(value, self.highest.get(scope, -1))
                if values:
                    self.longest_gap = max(self.longest_gap, now - self.seen_at.get(scope, now))
                    self.seen_at[scope] = now
            await asyncio.sleep(0.02)

    def served(self) -> int:
        return len({scope for replica in self.replicas.values() for scope in replica.page()})

    async def all_served(self, within: float) -> float:
        """Wait until every scope is shown; seconds it took. AssertionError after `within`."""
        began = self.loop.time()
        while self.served() < len(SCOPES):
            await asyncio.sleep(0.01)
            assert self.loop.time() - began < within, f"{self.served()} of {len(SCOPES)} after {within} s"
        return self.loop.time() - began

    async def end(self) -> None:
        self.scraping.cancel()
        for replica in self.replicas.values():
            await replica.kill()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Jumps to the time at which something is due. Nothing outside of the process may be waited for: there a plain loop
    is enough, and several times faster than looptime, which these runs of minutes need."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is due any more"
        self._loop.jump(timeout)
        return super().select(0)


def run(story: Callable[[World], Coroutine[Any, Any, None]], seed: int = 0) -> World:
    """Tell `story` in virtual time."""
    loop = VirtualLoop()

    async def tell() -> World:
        world = World(seed)
        try:
            await story(world)
        finally:
            await world.end()
        return world

    try:
        return loop.run_until_complete(tell())
    finally:
        loop.close()


async def three(world: World) -> None:
    for pod in "abc":
        world.join(pod)
    await world.all_served(TTL * 1.2 + 1)


def exact(world: World) -> None:
    assert world.falls == []
    assert world.doubles == []


def test_the_first_start_takes_one_ttl() -> None:
    """A store without members: nobody can know whether it was emptied, so its scopes are free after one ttl."""

    async def story(world: World) -> None:
        for pod in "abc":
            world.join(pod)
        assert await world.all_served(TAKEOVER) > TTL
        await asyncio.sleep(5)
        assert all(replica.page() for replica in world.replicas.values()), "each has a share"

    exact(run(story))


def test_a_killed_replica_is_taken_over_within_ttl_and_a_second() -> None:
    """Its scopes are shown by the others, with the counts it had, at most ttl + 1 s later."""

    async def story(world: World) -> None:
        await three(world)
        await world.replicas.pop("a").kill()
        assert await world.all_served(TAKEOVER) > 0

    exact(run(story))


def test_a_restarted_replica_takes_over_what_it_had() -> None:
    """The same name again before the others have noticed: no slower than if it had stayed away."""

    async def story(world: World) -> None:
        await three(world)
        await world.replicas["a"].kill()
        await asyncio.sleep(TTL / 2)
        world.join("a")
        await world.all_served(TAKEOVER)
        await asyncio.sleep(1)
        assert world.replicas["a"].page()

    exact(run(story))


def test_a_replica_that_leaves_hands_over_within_a_second() -> None:
    """SIGTERM: released and taken, nobody waits for a ttl."""

    async def story(world: World) -> None:
        await three(world)
        await asyncio.sleep(2)
        world.longest_gap = 0.0
        await world.replicas.pop("a").leave()
        await world.all_served(1.0)
        assert world.longest_gap < 1.0

    exact(run(story))


def test_a_replica_that_joins_gets_its_share_without_a_gap() -> None:
    """Scopes that move are away for less than a second, those that stay are not."""

    async def story(world: World) -> None:
        await three(world)
        await asyncio.sleep(2)
        world.longest_gap = 0.0
        world.join("d")
        await asyncio.sleep(5)
        assert world.replicas["d"].page()
        assert world.longest_gap < 1.0

    exact(run(story))


def test_a_frozen_replica_wakes_and_shows_nothing_that_others_have() -> None:
    """SIGSTOP for longer than ttl, then SIGCONT: its scopes were taken, and it joins again under another name."""

    async def story(world: World) -> None:
        await three(world)
        frozen = world.replicas["a"]
        name = frozen.store.name
        frozen.client.going.clear()
        await asyncio.sleep(0.1)
        await world.all_served(TAKEOVER)
        await asyncio.sleep(2)
        frozen.client.going.set()
        await asyncio.sleep(5)
        assert frozen.observer.fenced_keys
        assert frozen.store.name != name
        assert frozen.page()

    exact(run(story))


@pytest.mark.parametrize("seconds", [TTL / 2, TTL * 2])
def test_a_store_that_stops_takes_nothing_with_it(seconds: float) -> None:
    """Shorter than ttl nobody sees it; longer, every page is empty until it answers again. Polls fail meanwhile, those
    too that would find nothing new and so have nothing to commit (F46)."""

    async def story(world: World) -> None:
        await three(world)
        await asyncio.sleep(1)
        world.longest_gap = 0.0
        world.server.going.clear()
        await asyncio.sleep(seconds)
        assert bool(world.served()) == (seconds < TTL)
        store = world.replicas["a"].store
        key = next(iter(store.held))
        with pytest.raises(StateError):
            store.ensure(key)
        world.server.going.set()
        await world.all_served(TAKEOVER)
        await asyncio.sleep(2 * BEAT)
        store.ensure(key)
        await asyncio.sleep(1)
        assert world.longest_gap < (0.1 if seconds < TTL else seconds - TTL + TAKEOVER)

    exact(run(story))


@pytest.mark.parametrize("how", ["flush", "restart", "rewind"])
def test_a_store_that_loses_writes_is_healed_from_memory(how: str) -> None:
    """FLUSHALL, and a restart with an old snapshot or none: no gap, no fall, within a few heartbeats all is back."""

    async def story(world: World) -> None:
        await three(world)
        if how == "rewind":
            world.server.save()
            world.join("d")
            await asyncio.sleep(4)
        await asyncio.sleep(2)
        world.longest_gap = 0.0
        if how == "flush":
            world.server.flush()
        else:
            world.server.restart(lose=True)
        await asyncio.sleep(5 * BEAT)
        keys = [name for name in world.server.model.data if ":s:" in name]
        assert len(keys) == len(SCOPES)
        owners = {world.server.model.data[name]["own"].decode() for name in keys}
        assert owners == {replica.store.name for replica in world.replicas.values()}
        assert all(replica.observer.rollbacks == 1 for replica in world.replicas.values())
        # Others kept in the older store what was theirs then already; what moved since is claimed again.
        healed = {pod for pod, replica in world.replicas.items() if "healed" in replica.observer.takeovers}
        assert healed == ({"d"} if how == "rewind" else {"a", "b", "c"})
        await asyncio.sleep(3)
        assert world.longest_gap < 0.1
        assert world.served() == len(SCOPES)

    exact(run(story))


def test_a_store_that_stops_for_long_and_loses_all_is_filled_from_memory() -> None:
    """All leases have expired and the store is empty: each replica stores its copy, nothing is lost."""

    async def story(world: World) -> None:
        await three(world)
        await asyncio.sleep(3)
        world.server.going.clear()
        await asyncio.sleep(2 * TTL)
        world.server.restart(lose=True)
        world.server.going.set()
        await world.all_served(TAKEOVER)
        takeovers = [replica.observer.takeovers for replica in world.replicas.values()]
        assert sum(found.get("released", 0) for found in takeovers) == len(SCOPES)

    exact(run(story))


def test_a_frozen_replica_that_wakes_beside_an_empty_store_heals_nothing() -> None:
    """What it holds is older than what the others have gone on from."""

    async def story(world: World) -> None:
        await three(world)
        frozen = world.replicas["a"]
        frozen.client.going.clear()
        await asyncio.sleep(2 * TTL)
        world.server.flush()
        frozen.client.going.set()
        await asyncio.sleep(4)
        assert "healed" not in frozen.observer.takeovers
        assert world.served() == len(SCOPES)

    exact(run(story))


def test_an_owner_that_dies_with_the_last_writes_is_continued_from_the_older_copy() -> None:
    """Store and owner lost together: counted again from an older state, shown only when it has caught up."""

    async def story(world: World) -> None:
        await three(world)
        world.server.save()
        await asyncio.sleep(2.5)
        await world.replicas.pop("a").kill()
        world.server.restart(lose=True)
        await world.all_served(TAKEOVER + BEAT)

    exact(run(story))


def test_replicas_of_one_name_share_the_work() -> None:
    """Two processes on one host: distinguished by what their names end in, each with a share."""

    async def story(world: World) -> None:
        world.join("host")
        world.replicas["host again"] = Replica(world.server, "host", world.chance)
        await world.all_served(TTL * 1.2 + 1)
        await asyncio.sleep(2)
        assert all(replica.page() for replica in world.replicas.values())

    exact(run(story))


def test_replicas_with_another_configuration_keep_what_they_have() -> None:
    """A rolling change: the new one takes nothing from those with the old configuration, and all when they leave."""

    async def story(world: World) -> None:
        await three(world)
        new = world.join("d")
        new.store.configure("other")
        await asyncio.sleep(5)
        assert new.page() == {}
        for pod in "abc":
            await world.replicas.pop(pod).leave()
        await world.all_served(1.5)
        assert len(new.page()) == len(SCOPES)

    exact(run(story))


FAULTS = st.lists(
    st.tuples(st.floats(0.0, 4.0), st.sampled_from(Fault.__args__), st.sampled_from("abcd"), st.floats(0.1, 8.0)),  # type: ignore[attr-defined]
    max_size=8,
)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(faults=FAULTS, seed=st.integers(0, 2**32))
def test_whatever_happens_nothing_falls_and_all_is_served_in_the_end(
    faults: list[tuple[float, Fault, str, float]], seed: int
) -> None:
    """Any faults, in any order: no shown count ever falls, and after the last one every scope is shown by one."""

    async def story(world: World) -> None:
        await three(world)
        helpers: set[asyncio.Task[None]] = set()
        rewound: list[float] = []

        def later(seconds: float, work: Callable[[], object]) -> None:
            world.loop.call_later(seconds, work)

        for wait, fault, pod, seconds in faults:
            await asyncio.sleep(wait)
            replica, server = world.replicas.get(pod), world.server
            if fault == "join" and replica is None:
                world.join(pod)
            elif fault in ("flush", "restart", "rewind"):
                rewound.append(world.loop.time())
                if fault == "flush":
                    server.flush()
                else:
                    server.restart(lose=fault == "rewind")
            elif fault == "pause":
                server.save()
                server.going.clear()
                later(seconds, server.going.set)
            elif replica is None:
                continue
            elif fault == "kill":
                del world.replicas[pod]
                await replica.kill()
            elif fault == "leave":
                helpers.add(asyncio.create_task(world.replicas.pop(pod).leave()))
            elif fault == "freeze":
                replica.client.going.clear()
                later(seconds, replica.client.going.set)
            elif fault == "cut":
                replica.client.cut = True
                later(seconds, lambda client=replica.client: setattr(client, "cut", False))  # type: ignore[misc]
            elif fault == "lossy":
                replica.client.lossy = 0.3
                later(seconds, lambda client=replica.client: setattr(client, "lossy", 0.0))  # type: ignore[misc]
        await asyncio.sleep(9)
        if helpers:
            await asyncio.wait(helpers)
        if not world.replicas:
            world.join("z")
        await world.all_served(3 * TTL)
        await asyncio.sleep(2)
        world.rewound = rewound  # type: ignore[attr-defined]
        owned = [scope for replica in world.replicas.values() for scope in replica.page()]
        assert sorted(owned) == sorted(SCOPES), "each scope on one page"

    world = run(story, seed)
    assert world.falls == []
    # A joiner may take what the store says was released before its owner notices that the store went back.
    rewound: list[float] = world.rewound  # type: ignore[attr-defined]
    assert [double for double in world.doubles if not any(0 <= double[0] - at < 2 * TTL for at in rewound)] == []
