"""What this process polls: its shard, or what is assigned to it among several replicas on one store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from exporter import log
from exporter.config.schema import ScopeConfig
from exporter.errors import StateError
from exporter.fleet import Fleet
from exporter.model import Key, Scope
from exporter.shard import Shard
from exporter.status import ReplicaStatus
from exporter.telemetry import Telemetry

if TYPE_CHECKING:
    # redis-py is an extra.
    from exporter.state.redis import RedisStore

RELEASED_PER_BEAT = 100
"""(collector, scope) that are given away between two heartbeats: few at once, so that each is away only briefly."""
LEAVE = 2.0
"""Seconds that the handover at the end may take; what is left is taken over like that of a lost replica."""


class Alone:
    """A process that has its state to itself: it polls its shard from the start to the end."""

    valid = ready = True

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def assigned(self, key: Key) -> bool:
        """Whether this process polls a key; see `Assignment`."""
        return self._shard.owns(key.scope)

    async def send_heartbeats(self) -> None:
        """Nobody waits for heartbeats."""

    async def run(self) -> None:
        """The assignment never changes."""

    async def leave(self) -> None:
        """There is nobody to hand over to."""

    def measure(self) -> None:
        """There is nothing to measure."""

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """None."""
        return ()


class Sharing:
    """One of several replicas: takes what is assigned to it, gives away what is not, hands over at the end.

    Keeps the pollers of `fleet` in step with what `store` holds. `run` and `send_heartbeats` run beside each other.
    """

    def __init__(self, store: RedisStore, fleet: Fleet, telemetry: Telemetry) -> None:
        self._store = store
        self._fleet = fleet
        self._telemetry = telemetry
        self._complete = False
        self._polled: Set[Key] = frozenset()
        self._polled_scopes: Set[Scope] = frozenset()
        self._enabled: Mapping[Key, ScopeConfig] = {}
        self._others = {one.key for one in fleet.others}
        self._keys: tuple[Key, ...] = ()
        self._scopes: tuple[Scope, ...] = ()
        self._mine: Set[Scope] = frozenset()
        self._wanted: Set[Key] = frozenset()

    @property
    def valid(self) -> bool:
        """Whether what is held may be shown at this moment."""
        return self._store.valid

    @property
    def ready(self) -> bool:
        """Whether this replica has had once what is assigned to it."""
        return self._complete

    def assigned(self, key: Key) -> bool:
        """Whether this replica polls a key; see `Assignment`."""
        return key in self._polled or (not key.collector and key.scope in self._polled_scopes)

    async def send_heartbeats(self) -> None:
        """Send heartbeats for ever, and drop what other replicas have taken."""
        await self._store.send_heartbeats(self._fleet.drop)

    async def run(self) -> None:
        """Follow the assignment after every heartbeat."""
        while True:
            await self._store.next_heartbeat()
            try:
                await self._follow()
            except StateError as error:
                log.get().warning("state_not_shared", message=str(error))

    async def leave(self) -> None:
        """Give everything away: others know first, then each scope leaves the page and can be taken at once."""
        with contextlib.suppress(TimeoutError, StateError):
            async with asyncio.timeout(LEAVE):
                await self._store.leave()
                await asyncio.sleep(1.5 * self._store.every)
                keys = sorted(self._store.held, key=lambda key: key.scope)
                for start in range(0, len(keys), RELEASED_PER_BEAT):
                    part = keys[start : start + RELEASED_PER_BEAT]
                    for key in part:
                        self._fleet.drop(key)
                    await self._store.release(part)

    def measure(self) -> None:
        """Put what is known now into the metrics."""
        store = self._store
        self._telemetry.lease(store.valid, store.remaining)
        self._telemetry.replicas([member.phase for member in store.members()])
        self._telemetry.scopes(
            owned=len(self._fleet.scopes), configured=len(set(self._scopes) - {key.scope for key in self._others})
        )

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """All that are alive, as this one sees them."""
        return tuple(
            ReplicaStatus(name=one.name, phase=one.phase, configuration=one.group, self=one.name == self._store.name)
            for one in sorted(self._store.members(), key=lambda one: one.name)
        )

    async def _follow(self) -> None:
        store, fleet = self._store, self._fleet
        if fleet.config is None:
            return
        if fleet.enabled is not self._enabled:
            self._enabled = fleet.enabled
            self._keys = (*fleet.enabled, *(self._others if fleet.config.discovery.enabled else ()))
            self._scopes = tuple(dict.fromkeys(key.scope for key in self._keys))
            self._mine = frozenset()
            store.configure(fleet.config.sha256)
        mine = await store.assigned(self._scopes)
        if mine is None:
            return
        if mine is not self._mine:
            self._mine = mine
            self._wanted = frozenset(key for key in self._keys if key.scope in mine)
        give = sorted(store.held - self._wanted, key=lambda key: key.scope)[:RELEASED_PER_BEAT]
        await self._poll(store.held - set(give))
        await store.release(give)
        async for _ in store.claim([*(self._wanted - store.held)]):
            await self._poll(store.held - set(give))
        self._complete = self._complete or (store.joined and not store.waiting)

    async def _poll(self, keys: Set[Key]) -> None:
        """Run the pollers of exactly these keys."""
        keys = keys - self._others
        self._polled, self._polled_scopes = keys, {key.scope for key in keys}
        if self._fleet.pollers.keys() != keys:
            await self._fleet.apply()
