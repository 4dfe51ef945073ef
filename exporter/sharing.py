"""What this process polls: its shard, or what is assigned to it among several replicas on one store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from exporter import log
from exporter.collectors.calls import parts
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

RELEASED_PER_HEARTBEAT = 100
"""(collector, scope) that are released between two heartbeats: few, so that each is without an owner only briefly."""
LEAVE = 2.0
"""Seconds that releasing everything at the end may take; the rest is taken over as from a lost replica."""


class Alone:
    """A process that has its state to itself: it polls its shard from the start to the end."""

    valid = ready = True

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def assigned(self, key: Key) -> bool:
        """Whether this process polls a key; see `Assignment`."""
        return self._shard.owns(key.scope)

    async def send_heartbeats(self) -> None:
        """There is no other replica."""

    async def run(self) -> None:
        """The assignment never changes."""

    async def leave(self) -> None:
        """There is no other replica."""

    def measure(self) -> None:
        """There is nothing to measure."""

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """None."""
        return ()


class Sharing:
    """One of several replicas: polls what is assigned to it, releases the rest, and releases everything at the end.

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
        self._assigned: Set[Scope] = frozenset()
        self._wanted: Set[Key] = frozenset()

    @property
    def valid(self) -> bool:
        """Whether what is held may be shown at this moment."""
        return self._store.valid

    @property
    def ready(self) -> bool:
        """Whether this replica has had everything that is assigned to it at least once."""
        return self._complete

    def assigned(self, key: Key) -> bool:
        """Whether this replica polls a key; see `Assignment`."""
        return key in self._polled or (not key.collector and key.scope in self._polled_scopes)

    async def send_heartbeats(self) -> None:
        """Send heartbeats until cancelled, and drop what other replicas have taken."""
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
        """Release everything: tell the other replicas first, then remove each scope from the page and release it."""
        with contextlib.suppress(TimeoutError, StateError):
            async with asyncio.timeout(LEAVE):
                await self._store.leave()
                await asyncio.sleep(1.5 * self._store.every)
                keys = sorted(self._store.held, key=lambda key: key.scope)
                for part in parts(keys, RELEASED_PER_HEARTBEAT):
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
            self._assigned = frozenset()
            store.configure(fleet.config.sha256)
        assigned = await store.assigned(self._scopes)
        if assigned is None:
            return
        if assigned is not self._assigned:
            self._assigned = assigned
            self._wanted = frozenset(key for key in self._keys if key.scope in assigned)
        surplus = sorted(store.held - self._wanted, key=lambda key: key.scope)[:RELEASED_PER_HEARTBEAT]
        await self._poll(store.held - set(surplus))
        await store.release(surplus)
        async for _ in store.claim([*(self._wanted - store.held)]):
            await self._poll(store.held - set(surplus))
        self._complete = self._complete or (store.joined and not store.waiting)

    async def _poll(self, keys: Set[Key]) -> None:
        """Run the pollers of exactly these keys."""
        keys = keys - self._others
        self._polled, self._polled_scopes = keys, {key.scope for key in keys}
        if self._fleet.pollers.keys() != keys:
            await self._fleet.apply()
