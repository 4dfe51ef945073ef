"""All pollers of the process: they are started, changed and stopped here.

config ─┐
        ├─► apply (one at a time) ─► exactly one running poller per wanted (collector, scope)
assigned┘
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

import msgspec

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.blueking.nodemgr import NodemgrApi
from exporter.clock import Clock
from exporter.collectors import COLLECTORS
from exporter.collectors.base import Collector, Platforms
from exporter.collectors.calls import gather_bounded, parts
from exporter.config.schema import Config, ScopeConfig
from exporter.errors import ConfigError, Problem, StateError
from exporter.exposed import scope_key, show_scope, show_status_codes
from exporter.model import Key, Scope
from exporter.poller import Poller, Services, Settings, flush
from exporter.state.base import Stored

CHECK = 10.0
"""Seconds between two looks at the state."""
FLUSH = 60.0
"""Seconds after which the polls that found nothing new are committed, at most."""
QUEUED = 64
"""Calls that are queued before no more polls begin, and polls that begin at once."""
BEGIN_EVERY = 0.05
"""Seconds after which the queue is looked at again while more polls are due."""
LOADED = 500
"""States that are read from the store at once."""
SAVES = 100
"""States that are committed at once when many of them are."""
KEEP = 7 * 86400.0
"""Seconds for which the state of a removed scope is kept, so that it continues when the scope comes back."""
MANY = 25
"""Pollers that are shown in one go, in some 10 ms."""
SCOPES = 1000
"""Scopes whose names are shown in one go."""
PROCESS_SERIES = 200
"""Series of `max_series` that are reserved for the metrics of the process."""

FoundScopes = Callable[[Config], tuple[ScopeConfig, ...]]
"""The scopes that discovery adds to a configuration."""
Assignment = Callable[[Key], bool]
"""Whether this process polls a (collector, scope). The key of a scope itself has an empty collector."""


def platforms(client: Client, one: ScopeConfig) -> Platforms:
    """The APIs of the configured platforms for one scope. All scopes share the client and so one rate limit."""
    config, scope_client = client.config, client.for_scope(one.scope, one.auth)
    return Platforms(
        job=JobApi(scope_client, config.job) if config.job else None,
        nodeman=NodemanApi(scope_client, config.nodeman, config.timezone) if config.nodeman else None,
        nodeman_legacy=(
            NodemanLegacyApi(scope_client, config.nodeman_legacy, config.timezone) if config.nodeman_legacy else None
        ),
        nodemgr=NodemgrApi(scope_client, config.nodemgr) if config.nodemgr else None,
    )


def collectors(scopes: Iterable[ScopeConfig], client: Client, clock: Clock) -> list[Collector]:
    """One collector per enabled (collector, scope), in the order of `scopes`."""
    built: list[Collector] = []
    for one in scopes:
        apis = platforms(client, one)
        made = (collector.build(one, apis, clock) for collector in COLLECTORS)
        built += [collector for collector in made if collector is not None]
    return built


def pollers(config: Config, client: Client, services: Services) -> list[Poller]:
    """One poller per enabled (collector, scope), none of them loaded or running."""
    settings = Settings.of(config)
    return [Poller(collector, settings, services) for collector in collectors(config.scopes, client, services.clock)]


def series_limit(config: Config) -> int:
    """Series that the page may have beside the metrics of the process."""
    return max(0, config.max_series - PROCESS_SERIES)


class Saved(Protocol):
    """A state that belongs to no poller. It is never purged, and is committed again when the store has lost it."""

    key: Key

    async def save(self) -> None:
        """Commit the state again. Raises `StateError`."""


class Fleet:
    """Runs the pollers that configuration and assignment ask for, until the context is left.

    `apply` is the only way to change them, at the start, at a reload and later; `drop` takes one away at once.
    `config` and `client` are those in use. `enabled`: every (collector, scope) of the configuration and of discovery,
    with the scope it comes from, wherever that is polled. `scopes`: those that are polled here. `shares_rate`: other
    processes poll the others, and all of them together keep to `requests_per_second`; each takes a part by the scopes
    it has. `others`: states that are kept like those of the pollers.
    """

    def __init__(self, services: Services, *, shares_rate: bool = False) -> None:
        self.config: Config | None = None
        self.pollers: dict[Key, Poller] = {}
        self.client: Client | None = None
        self.scopes: dict[Scope, ScopeConfig] = {}
        self.enabled: Mapping[Key, ScopeConfig] = {}
        self.others: list[Saved] = []
        self._services = services
        self._found: FoundScopes = lambda config: ()
        self._complete: Config | None = None  # the configuration with the scopes that were found
        self._assigned: Assignment = lambda key: True
        self._group = asyncio.TaskGroup()
        self._due: deque[Poller] = deque()
        self._begin_timer: asyncio.Handle | None = None
        self._lock = asyncio.Lock()
        self._settings: Settings | None = None
        self._stopped = False
        self._shares_rate = shares_rate
        self._of_scope: Counter[Scope] = Counter()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._due.clear()
        for poller in self.pollers.values():
            poller.stop()
        try:
            await self._group.__aexit__(kind, error, traceback)
        finally:
            if self.client is not None:
                await self.client.close()

    @property
    def attempted(self) -> bool:
        """Whether there is a configuration and every poller has ended a poll, complete or not."""
        return self.config is not None and all(poller.attempted for poller in self.pollers.values())

    async def apply(
        self,
        config: Config | None = None,
        *,
        found: FoundScopes | None = None,
        assigned: Assignment | None = None,
    ) -> bool:
        """Run exactly one poller per (collector, scope) that the configuration enables and that is assigned here.

        An argument that is not given stays what it was; at first nothing is found and everything is assigned. Pollers
        that stay keep their state and go on. Raises `ConfigError` for TLS files and `StateError` for states that cannot
        be loaded; then nothing has changed. False, and nothing has changed, after `stop`.
        """
        async with self._lock:
            same = found is None and (config is None or config is self.config)
            config, found = config or self.config, found or self._found
            if self._stopped or config is None:
                return False
            complete = self._complete
            if complete is None or not same:
                complete = msgspec.structs.replace(config, scopes=(*config.scopes, *found(config)))
                await asyncio.sleep(0)  # thousands may have been found
            await self._apply(complete, assigned or self._assigned)
            self.config, self._found = config, found
            return True

    async def stop(self) -> None:
        """Stop all polls for good, at the latest when an `apply` that is running has ended. The page stays as it is."""
        async with self._lock:
            self._stopped = True
            self._due.clear()
            await self._stop(self.pollers)

    def drop(self, key: Key) -> None:
        """Stop polling and showing a key at once, since somebody else does it now."""
        if poller := self.pollers.pop(key, None):
            poller.stop()
            poller.close()
            self._of_scope[key.scope] -= 1
            if not self._of_scope[key.scope]:
                self._services.page.remove(Key("", key.scope))
                self.scopes.pop(key.scope, None)

    def _take_share(self) -> None:
        if self._shares_rate and self.client is not None and self.scopes:
            self.client.take_share(len(self.scopes) / len({key.scope for key in self.enabled} | self.scopes.keys()))

    def retry_refused(self) -> None:
        """Poll the scopes at once that BlueKing refused: their credentials may have changed."""
        for poller in self.pollers.values():
            poller.retry_refused()

    async def refresh_tls(self) -> list[Problem]:
        """See `Client.refresh_tls`."""
        return await self.client.refresh_tls() if self.client is not None else []

    async def purge(self) -> None:
        """Forget the states of scopes that have been gone for `KEEP`, once an hour."""
        while True:
            try:
                keep = [*self.enabled, *(one.key for one in self.others)]
                forgotten = await self._services.store.purge(keep, self._services.clock.wall() - KEEP)
                if forgotten:
                    log.get().info("state_purged", states=forgotten)
            except StateError as error:
                log.get().warning("state_purge_failed", message=str(error))
            await asyncio.sleep(3600)

    async def keep_state(self) -> None:
        """Check every few seconds whether the stored state is lost or damaged; if so, commit it again from memory."""
        store, telemetry = self._services.store, self._services.telemetry
        complete, resets = True, store.resets
        while True:
            try:
                complete = await store.check() and complete
                if not complete:
                    saved: list[Saved] = [*self.pollers.values(), *self.others]
                    await gather_bounded((one.save() for one in saved), SAVES)
                    complete = True
                since = self._services.clock.monotonic() - (FLUSH - CHECK)
                if not await self._flush([one for one in self.pollers.values() if one.uncommitted_since <= since]):
                    self._commit_next()
                telemetry.state_size(await store.size())
            except StateError as error:
                telemetry.state_write_error()
                self._commit_next()
                log.get().error("state_not_kept", message=str(error), consequence="polls fail until it can be written")
            for _ in range(store.resets - resets):
                telemetry.state_reset()
            resets = store.resets
            await asyncio.sleep(CHECK)

    def _commit_next(self) -> None:
        for poller in self.pollers.values():
            poller.commit_next()

    async def _apply(self, config: Config, assigned: Assignment) -> None:
        services, settings = self._services, Settings.of(config)
        unchanged = config is self._complete
        # First every step that can fail; none of them changes anything.
        async with AsyncExitStack() as undo:
            client = self.client
            if client is None or config.blueking != client.config:
                client = Client(config.blueking, services.clock, services.telemetry, log.get())
                await undo.enter_async_context(client)
            elif not unchanged and (problems := await client.refresh_tls()):
                raise ConfigError(problems)
            # Of thousands of scopes few change at a time, or their assignment: what stays is not built again.
            if unchanged:
                kept = self.enabled
            else:
                same = (
                    _same_scopes(self._complete, config) if (client, settings) == (self.client, self._settings) else {}
                )
                kept = {key: same[key.scope] for key in self.enabled if key.scope in same}
            await asyncio.sleep(0)
            new = {one.scope: one for key, one in kept.items() if key not in self.pollers and assigned(key)}
            unchanged_scopes = {key.scope for key in kept}
            if not unchanged:
                new |= {one.scope: one for one in config.scopes if one.scope not in unchanged_scopes}
            collector_of: dict[Key, Collector] = {}
            for part in parts([*new.values()], LOADED):
                collector_of |= {Key(one.name, one.scope): one for one in collectors(part, client, services.clock)}
                await asyncio.sleep(0)
            enabled = kept if unchanged else {**kept, **{key: new[key.scope] for key in collector_of}}
            missing = [one for key, one in collector_of.items() if key not in self.pollers and assigned(key)]
            added: list[Poller] = []
            stored: dict[Key, Stored] = {}
            for few in parts(missing, LOADED):
                added += [Poller(one, settings, services) for one in few]
                stored |= await services.store.load_many([Key(one.name, one.scope) for one in few])
            undo.pop_all()

        await asyncio.sleep(0)
        gone = [key for key in self.pollers if key not in enabled or not assigned(key)]
        changed = [
            key
            for key, poller in self.pollers.items()
            if client is not self.client
            or (key in collector_of and collector_of[key].interval != poller.collector.interval)
        ]
        await self._stop({*gone, *changed})
        if client is not self.client:
            if self.client is not None:
                await self.client.close()
            self.client = client
        for key in gone:
            self.drop(key)
        if not unchanged:
            self.retry_refused()
            changed_here = [key for key in collector_of if key in self.pollers and key not in kept]
            for number, key in enumerate(changed_here):
                if key in self.pollers:  # it may have been dropped meanwhile
                    self.pollers[key].reconfigure(collector_of[key], settings)
                if number % MANY == MANY - 1:
                    await asyncio.sleep(0)
        for number, poller in enumerate(added):
            self.pollers[poller.key] = poller
            self._of_scope[poller.key.scope] += 1
            await poller.show_stored(stored.pop(poller.key, None))
            if number % MANY == MANY - 1:
                await asyncio.sleep(0)  # thousands of them must not hold up a scrape
        self._complete, self._assigned, self.enabled, self._settings = config, assigned, enabled, settings
        for some in parts([poller for poller in self.pollers.values() if not poller.started], SCOPES):
            for poller in some:
                if self.pollers.get(poller.key) is poller:
                    poller.start(self._poll_due)
            await asyncio.sleep(0)
        await self._show_scopes(config, assigned, unchanged_scopes)
        self._take_share()

    def _poll_due(self, poller: Poller) -> None:
        self._due.append(poller)
        if self._begin_timer is None:
            self._begin_timer = asyncio.get_running_loop().call_soon(self._begin_polls)

    def _begin_polls(self) -> None:
        """Begin polls in the order in which they became due, as long as few calls are queued.

        A poll that waits for its turn takes ten times the memory of one that has not begun. And so every poller has had
        its first poll before another one has its second, even when there are more polls than calls may be sent."""
        self._begin_timer = None
        room = QUEUED - self.client.queued if self.client is not None else 0
        while self._due and room > 0:
            self._due.popleft().begin(self._group)
            room -= 1
        if self._due:
            self._begin_timer = asyncio.get_running_loop().call_later(BEGIN_EVERY, self._begin_polls)

    async def _stop(self, keys: Iterable[Key]) -> None:
        """Stop these polls, and commit what they have left uncommitted."""
        pollers = [self.pollers[key] for key in keys]
        tasks = [task for poller in pollers if (task := poller.stop())]
        if tasks:
            await asyncio.wait(tasks)
        if not await self._flush(pollers):
            log.get().warning("state_not_flushed", consequence="the next process reads some minutes again")

    async def _flush(self, pollers: Sequence[Poller]) -> bool:
        """Commit their polls that found nothing new. False, and the others are left as they are, when that fails."""
        for part in parts(pollers, SAVES):
            if not await flush(self._services.store, part):
                return False
        return True

    async def _show_scopes(self, config: Config, assigned: Assignment, unchanged: Set[Scope]) -> None:
        page = self._services.page
        page.limit(series_limit(config))
        show_status_codes(page)
        before = self.scopes
        self.scopes = {one.scope: one for one in config.scopes if assigned(scope_key(one))}
        for scope in before.keys() - self.scopes.keys():
            page.remove(scope_key(before[scope]))
        await asyncio.sleep(0)
        new = [one for scope, one in self.scopes.items() if scope not in before or scope not in unchanged]
        for number, one in enumerate(new):
            if one.scope in self.scopes:
                show_scope(page, one, config)
            if number % SCOPES == SCOPES - 1:
                await asyncio.sleep(0)


def _same_scopes(old: Config | None, new: Config) -> dict[Scope, ScopeConfig]:
    """The scopes of which nothing has changed."""
    before = {one.scope: one for one in old.scopes} if old else {}
    equal: dict[tuple[int, int], bool] = {}  # most scopes share their settings: compare these once
    same = {}
    for one in new.scopes:
        if (other := before.get(one.scope)) is not None:
            pair = id(one.collectors), id(other.collectors)
            if pair not in equal:
                equal[pair] = one.collectors == other.collectors
            if equal[pair] and (one.name, one.auth) == (other.name, other.auth):
                same[one.scope] = one
    return same
