"""Scopes found in CMDB, beside those of the configuration.

    ask CMDB ─► observe (pure) ─► commit ─► fleet.apply(found=…)

What was found is part of the state: a start needs no CMDB. A scope is retired by `retire_after` complete lists in a
row that do not contain it. An error or an empty list retires nothing: an empty list may be a failure of CMDB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Protocol

import msgspec

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.cmdb import CmdbApi, NamedScope
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import fold
from exporter.config.schema import Config, Discovery, ScopeConfig
from exporter.errors import ApiError, StateError
from exporter.fleet import Fleet
from exporter.model import Key, Scope, name_matches
from exporter.poller import LINES, Services
from exporter.state.base import Stored

READ_SHARED = 5.0
"""Seconds between two reads of what another replica has found."""
STATE = Key("discovery", Scope("biz", "0"))
"""The key of the state; no business has the id 0."""


class FoundScope(msgspec.Struct, frozen=True):
    """`missing`: complete lists in a row that did not contain it."""

    scope: Scope
    name: str
    missing: int = 0


class DiscoveryState(msgspec.Struct, frozen=True):
    """`found`: by scope type and id. `last_success`: unix seconds of the newest complete answers, None before."""

    found: tuple[FoundScope, ...] = ()
    last_success: float | None = None

    def observe(self, listed: Sequence[Sequence[NamedScope]], discovery: Discovery, now: float) -> DiscoveryState:
        """The next state. `listed`: complete lists, each of one scope type."""
        known = {one.scope: one for one in self.found}
        for scopes in listed:
            if not scopes:
                continue
            kind = scopes[0].scope.bk_scope_type
            present = {one.scope: one for one in scopes if selects(discovery, one)}
            for scope, found in list(known.items()):
                if scope.bk_scope_type == kind and scope not in present:
                    known[scope] = msgspec.structs.replace(found, missing=found.missing + 1)
            known |= {scope: FoundScope(scope, one.name) for scope, one in present.items()}
        kept = (one for one in known.values() if one.missing < discovery.retire_after)
        ordered = sorted(kept, key=lambda one: (one.scope.bk_scope_type, int(one.scope.bk_scope_id)))
        return DiscoveryState(tuple(ordered), now if any(listed) else self.last_success)


def selects(discovery: Discovery, one: NamedScope | FoundScope) -> bool:
    """Whether `include` names this scope and `exclude` does not."""
    choice = discovery.biz if one.scope.bk_scope_type == "biz" else discovery.biz_set
    return _named(choice.include, one) and not _named(choice.exclude, one)


def unmatched(discovery: Discovery, scopes: Iterable[NamedScope]) -> list[tuple[str, str]]:
    """The entries of include and exclude that match none of these scopes, each with its key; `*` is never reported."""
    scopes = list(scopes)
    missing = []
    for kind, choice in (("biz", discovery.biz), ("biz_set", discovery.biz_set)):
        of_kind = [one for one in scopes if one.scope.bk_scope_type == kind]
        for key in ("include", "exclude"):
            for entry in getattr(choice, key):
                if entry != "*" and not any(_named((entry,), one) for one in of_kind):
                    missing.append((f"discovery.{kind}.{key}", entry))
    return missing


def scope_configs(config: Config, found: Iterable[NamedScope | FoundScope]) -> tuple[ScopeConfig, ...]:
    """What to poll of the found scopes; scopes of the configuration are left out."""
    configured = {one.scope for one in config.scopes}
    collectors = config.discovery.collectors
    for_sets = msgspec.structs.replace(
        collectors,
        **{
            # NodeMan knows businesses only.
            name: msgspec.structs.replace(getattr(collectors, name), enabled=False)
            for name in collectors.__struct_fields__
            if name != "job"
        },
    )
    return tuple(
        ScopeConfig(one.scope, one.name, collectors if one.scope.bk_scope_type == "biz" else for_sets)
        for one in found
        if one.scope not in configured and selects(config.discovery, one)
    )


async def ask(config: Config, client: Client, deadline: Deadline) -> list[list[NamedScope]]:
    """The complete lists of the scope types that the configuration includes. Raises ApiError."""
    platform = config.blueking.cmdb
    assert platform is not None, "the configuration requires blueking.cmdb for discovery"
    api = CmdbApi(client.for_scope(None), platform)
    lists = []
    if config.discovery.biz.include:
        lists.append(await api.businesses(deadline))
    if config.discovery.biz_set.include:
        lists.append(await api.business_sets(deadline))
    return lists


async def add_found(config: Config, client: Client, clock: Clock) -> tuple[Config, list[NamedScope]]:
    """The configuration with the scopes that CMDB lists now, and all that it lists. Raises ApiError."""
    lists = await ask(config, client, Deadline(2 * config.blueking.request_timeout, clock))
    listed = [one for scopes in lists for one in scopes]
    return msgspec.structs.replace(config, scopes=(*config.scopes, *scope_configs(config, listed))), listed


class SharedStore(Protocol):
    """A store on which several processes share the work: the one that holds `STATE` asks CMDB, the others read it."""

    @property
    def held(self) -> Set[Key]: ...

    async def read(self, key: Key) -> Stored | None: ...


class Discoverer:
    """Keeps what was found, and adds it to configurations."""

    def __init__(self, services: Services, shared: SharedStore | None = None) -> None:
        self.key = STATE
        self._services = services
        self._shared = shared
        self._follows = shared is not None
        self._committing = asyncio.Lock()
        self._state = DiscoveryState()

    async def load(self) -> None:
        """Load what was found before; from a shared store only `run` does, when it answers. Raises StateError; a
        damaged state is forgotten, and its scopes found anew."""
        if self._shared is None:
            self._decode(await self._services.store.load(STATE))

    def _decode(self, stored: Stored | None) -> None:
        if stored is not None:
            try:
                self._state = msgspec.msgpack.decode(stored.payload, type=DiscoveryState)
            except msgspec.DecodeError as error:
                self._services.telemetry.state_reset()
                log.get().error("state_unreadable", collector="discovery", message=str(error), consequence="asked anew")

    def scopes(self, config: Config) -> tuple[ScopeConfig, ...]:
        """What discovery adds to this configuration: nothing while it is disabled."""
        if not config.discovery.enabled:
            self._services.telemetry.discovery_off()
            return ()
        scopes = scope_configs(config, self._state.found)
        self._services.telemetry.discovered(
            {kind: sum(one.scope.bk_scope_type == kind for one in scopes) for kind in ("biz", "biz_set")},
            self._state.last_success,
        )
        return scopes

    async def run(self, fleet: Fleet) -> None:
        """Ask CMDB once per interval, at once at first, and let the fleet poll what was found."""
        clock, asked = self._services.clock, float("-inf")
        while True:
            config, client, shared = fleet.config, fleet.client, self._shared
            if shared and STATE not in shared.held:
                self._follows, asked = True, float("-inf")
                await self._follow(fleet, shared)
            elif (
                config
                and client
                and config.discovery.enabled
                and clock.monotonic() >= asked + config.discovery.interval
            ):
                asked = clock.monotonic()
                if shared and self._follows:
                    await self._follow(fleet, shared)  # what the former owner has committed last
                    self._follows = False
                if await self.refresh(config, client):
                    try:
                        await fleet.apply(found=self.scopes)
                    except StateError as error:
                        self._failed("state", str(error))
            await asyncio.sleep(READ_SHARED if self._follows else 1)

    async def _follow(self, fleet: Fleet, shared: SharedStore) -> None:
        """Poll what the replica that asks CMDB has found."""
        before = self._state
        try:
            self._decode(await shared.read(STATE))
            if self._state != before:
                await fleet.apply(found=self.scopes)
                await self._log_changes(before, self._state)
        except StateError as error:
            log.get().debug("discovery_not_read", message=str(error))  # the heartbeats log it

    async def refresh(self, config: Config, client: Client) -> bool:
        """Ask CMDB and commit what it lists. False, and nothing has changed, when that fails."""
        services = self._services
        seconds = max(config.discovery.interval, 2 * config.blueking.request_timeout)
        try:
            lists = await ask(config, client, Deadline(seconds, services.clock))
            observe = partial(self._state.observe, lists, config.discovery, services.clock.wall())
            state = await fold(sum(map(len, lists)), observe)
            async with self._committing:
                await services.store.commit(STATE, msgspec.msgpack.encode(state))
                before, self._state = self._state, state
        except ApiError as error:
            self._failed(error.reason, str(error), api=error.api, request_id=error.request_id)
            return False
        except StateError as error:
            services.telemetry.state_write_error()
            self._failed("state", str(error))
            return False
        if not all(lists):
            log.get().warning("discovery_empty", message="CMDB lists nothing", consequence="no scope is retired")
        await self._log_changes(before, state)
        return True

    async def save(self) -> None:
        """Commit again what was found, if anything was, because the store has lost it. Raises StateError."""
        async with self._committing:
            if self._state != DiscoveryState():
                await self._services.store.commit(STATE, msgspec.msgpack.encode(self._state))

    def _failed(self, reason: str, message: str, **fields: object) -> None:
        self._services.telemetry.discovery_failed(reason)
        log.get().warning("discovery_failed", reason=reason, message=message, **fields)

    async def _log_changes(self, before: DiscoveryState, after: DiscoveryState) -> None:
        old, new = ({one.scope: one.name for one in state.found} for state in (before, after))
        found = ((scope, "scope_found", new[scope]) for scope in sorted(new.keys() - old.keys()))
        retired = ((scope, "scope_retired", old[scope]) for scope in sorted(old.keys() - new.keys()))
        for number, (scope, event, name) in enumerate((*found, *retired), 1):
            log.get().info(event, scope=str(scope), name=name)
            if number % LINES == 0:
                await asyncio.sleep(0)


def _named(entries: Iterable[str], one: NamedScope | FoundScope) -> bool:
    return any(
        entry == "*" or (entry == one.scope.bk_scope_id if entry.isdecimal() else name_matches(one.name, entry))
        for entry in entries
    )
