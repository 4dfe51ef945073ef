"""The composition root: build, start, reload, stop.

    state opened ─ port listens ─ client ─ pollers ─► … ─► not ready ─ pollers cancelled ─ scrapes finished ─ state
    closed

Web server, page, state and telemetry live as long as the process. Pollers come and go with the configuration; one that
stays in it keeps running through a reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypedDict

import msgspec

from exporter import __version__, log, systemd
from exporter.blueking.client import Client
from exporter.blueking.job import JobApi
from exporter.blueking.nodeman import NodemanApi
from exporter.blueking.nodeman_legacy import NodemanLegacyApi
from exporter.clock import Clock
from exporter.collectors import COLLECTORS
from exporter.collectors.base import Collector, CollectorState, Platforms
from exporter.collectors.failing_hosts import Streak
from exporter.collectors.job.collector import JobCollector
from exporter.collectors.job.metrics import STATUS_CODE_INFO, status_code_info
from exporter.config.load import Loaded, Override, load
from exporter.config.schema import BlueKing, Config
from exporter.errors import ConfigError, StateError
from exporter.metrics.family import Family
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Exposition, Page
from exporter.metrics.render import render_gauge, scope_prefix
from exporter.model import Key
from exporter.poller import FAMILIES, Poller
from exporter.state.base import Store, open_store
from exporter.telemetry import Telemetry
from exporter.web.config import WebConfig
from exporter.web.server import Backend, WebServer, listen
from exporter.web.status import FailingExecution, FailingHost, Failures, Status, Watch

READY_AFTER = 60.0
"""Seconds after which the daemon is ready although some poller has not finished its first attempt."""
FOLLOW = 5.0
"""Seconds between two looks at the scope files."""
KEEP = 7 * 86400.0
"""Seconds for which the state of a removed scope waits for it to come back."""
SECRETS = "secret files"
LAG_PERIOD = 1.0
PROCESS_SERIES = 200
"""Room that `max_series` leaves for the metrics of the process itself, which are on the page too."""

SCOPE_INFO = Family(
    "blueking_scope_info", "gauge", ("name",), "A configured scope and its name for people.", "已配置的范围及其名称。"
)


def catalogue() -> tuple[Family, ...]:
    """Every family of the page, in its order: JOB and NodeMan, then what the exporter says of its pollers."""
    watched = {family.name: family for collector in COLLECTORS for family in collector.families}
    return (*watched.values(), STATUS_CODE_INFO, SCOPE_INFO, *FAMILIES)


class Options(msgspec.Struct, frozen=True):
    """What the command line says beyond the configuration."""

    config_file: Path
    overrides: Mapping[str, Override] = {}
    systemd_socket: bool = False


def show_static(page: Page, config: Config) -> None:
    """Put on the page what does not depend on any poll."""
    page.put(None, {STATUS_CODE_INFO.name: render_gauge(STATUS_CODE_INFO, "", status_code_info())})
    for one in config.scopes:
        chunk = render_gauge(SCOPE_INFO, scope_prefix(one.scope), {(one.name,): 1.0})
        page.put(Key("", one.scope), {SCOPE_INFO.name: chunk})


def _room(config: Config) -> int:
    return max(0, config.max_series - PROCESS_SERIES)


class Settings(TypedDict):
    """What all pollers share of the configuration, in the units of `Config`."""

    hold: float
    stale_after: int
    request_timeout: float


@asynccontextmanager
async def platforms(config: BlueKing, clock: Clock, telemetry: Telemetry) -> AsyncIterator[Platforms]:
    """The APIs of the configured platforms on one client, so that they share one budget."""
    async with Client(config, clock, telemetry, log.get()) as client:
        yield Platforms(
            job=JobApi(client, config.job) if config.job else None,
            nodeman=NodemanApi(client, config.nodeman, config.timezone) if config.nodeman else None,
            nodeman_legacy=(
                NodemanLegacyApi(client, config.nodeman_legacy, config.timezone) if config.nodeman_legacy else None
            ),
        )


def collectors(config: Config, apis: Platforms, clock: Clock) -> list[Collector]:
    """One collector per enabled (collector, scope), in the order of the configuration."""
    built = (
        collector.build(scope, apis, clock, config.counter_birth_hold)
        for scope in config.scopes
        for collector in COLLECTORS
    )
    return [collector for collector in built if collector is not None]


class App:
    """One daemon. `run` returns when it is asked to stop."""

    def __init__(self, options: Options, loaded: Loaded, clock: Clock | None = None) -> None:
        self.options = options
        self.loaded = loaded
        self.clock = clock or Clock()
        self.started = self.clock.wall()
        self.stopping = asyncio.Event()
        self._begun = self.clock.monotonic()
        self._ready = False
        self._notified = False
        self.telemetry = Telemetry(__version__)
        self.telemetry.shard(0, 1)
        self.telemetry.config_loaded(loaded.config.sha256, self.started)
        self.page = Page(catalogue(), _room(loaded.config), self.telemetry.series_dropped)
        self._running: set[asyncio.Task[None]] = set()
        self._pollers: dict[Key, tuple[Poller, asyncio.Task[None]]] = {}
        self._reloading = asyncio.Lock()
        self._web = WebConfig()
        self._broken: set[str] = set()

    @property
    def config(self) -> Config:
        return self.loaded.config

    async def run(self, started: Callable[[Sequence[str]], None] = lambda urls: None) -> None:
        """Serve until `stopping` is set. `started` is told the addresses once they listen.

        Raises `ConfigError` for what only shows when it is used (certificates, web file) and `StateError` for the
        state.
        """
        config = self.config
        async with AsyncExitStack() as stack:
            self._web = web = WebConfig(config.server.web_config_file, self._web_followed)
            self.store = await self._open_store(stack, config.state.url)
            self._client, self._platforms = await self._enter_client(config.blueking)
            stack.push_async_callback(self._leave_client)
            sockets = systemd.sockets() if self.options.systemd_socket else listen(config.server.listen_address)
            for socket in sockets:
                stack.callback(socket.close)
            async with asyncio.TaskGroup() as self._tasks:
                # Who connects meanwhile waits in the backlog, for a whole page and a true word on readiness.
                await self._apply(self.loaded)
                gc.freeze()  # pollers and tasks stay: looking through thousands of them would hold everybody up
                server = WebServer(self._backend(), web)
                serving = self._spawn(server.run(sockets), "web")
                for name, task in (("lag", self._measure_lag()), ("follow", self._follow()), ("purge", self._purge())):
                    self._spawn(task, name)
                addresses = [_url(socket.getsockname(), web.current.tls is not None) for socket in sockets]
                log.get().info("started", version=__version__, addresses=addresses, pollers=len(self._pollers))
                started(addresses)
                self._notify_ready()
                await self.stopping.wait()
                systemd.notify("STOPPING=1")
                log.get().info("stopping")
                # A reload that is under way ends first: what it starts after this would never be told to stop.
                async with self._reloading:
                    for running in self._running - {serving}:
                        running.cancel()
                await server.drain()
                serving.cancel()

    def stop(self) -> None:
        """Ask the daemon to stop. From here on it is not ready."""
        self.stopping.set()

    async def reload(self) -> list[str]:
        """Read the configuration again and go on with it, or change nothing and say what is wrong with it."""
        async with self._reloading:
            if self.stopping.is_set():
                return ["not reloaded: stopping"]
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                loaded = await asyncio.to_thread(load, self.options.config_file, self.options.overrides)
                if broken := await self._web.refresh():
                    return [str(problem) for problem in broken]
                self._warn_of_restart(loaded.config)
                await self._apply(loaded)
            except (ConfigError, StateError) as error:
                self._note("configuration", broken=True)
                problems = str(error).splitlines()
                log.get().error("reload_failed", problems=problems, always=True)
                return problems
            finally:
                systemd.notify("READY=1")
            self._note("configuration", broken=False)
            log.get().info("reloaded", pollers=len(self._pollers))
            return []

    def _web_followed(self, taken: bool) -> None:
        """A changed web configuration file is in force, or it is broken and the one before stays."""
        self._note("web configuration", broken=not taken)

    def _note(self, what: str, *, broken: bool) -> None:
        """Keep the metric of the reload at 0 as long as anything that was read is broken."""
        (self._broken.add if broken else self._broken.discard)(what)
        if self._broken:
            self.telemetry.config_reload_failed()
        else:
            self.telemetry.config_loaded(self.config.sha256, self.clock.wall())

    # Building

    async def _open_store(self, stack: AsyncExitStack, url: str) -> Store:
        store = open_store(url)
        await store.open()
        stack.push_async_callback(store.close)
        for _ in range(store.resets):
            self.telemetry.state_reset()
        return store

    async def _enter_client(self, config: BlueKing) -> tuple[AsyncExitStack, Platforms]:
        """What closes the client, and the APIs on it."""
        stack = AsyncExitStack()
        return stack, await stack.enter_async_context(platforms(config, self.clock, self.telemetry))

    async def _leave_client(self) -> None:
        await self._client.aclose()

    async def _apply(self, loaded: Loaded) -> None:
        """Let exactly the pollers of this configuration run. What can fail (TLS files, the state) does so before any
        change, and leaves nothing behind."""
        config, old = loaded.config, self.config
        settings: Settings = {
            "hold": config.counter_birth_hold,
            "stale_after": config.stale_after,
            "request_timeout": config.blueking.request_timeout,
        }
        async with AsyncExitStack() as undo:
            client, apis = self._client, self._platforms
            if config.blueking != old.blueking:
                client, apis = await self._enter_client(config.blueking)
                undo.push_async_callback(client.aclose)
            wanted = {Key(one.name, one.scope): one for one in collectors(config, apis, self.clock)}
            added = {key: self._poller(one, settings) for key, one in wanted.items() if key not in self._pollers}
            for poller in added.values():
                undo.callback(poller.close)
                await poller.load()
            undo.pop_all()

        gone = [key for key in self._pollers if key not in wanted]
        changed = [
            key
            for key, (poller, _) in self._pollers.items()
            if client is not self._client or key not in wanted or wanted[key].interval != poller.collector.interval
        ]
        await self._stop_polls(changed)
        if client is not self._client:
            await self._client.aclose()
            self._client, self._platforms = client, apis
        for key in gone:
            self._pollers.pop(key)[0].close()
        for key, (poller, task) in self._pollers.items():
            poller.reconfigure(wanted[key], **settings)
            if task.done():
                self._pollers[key] = poller, self._spawn(poller.run(), f"poll {key}")
        for key, poller in added.items():
            self._pollers[key] = poller, self._spawn(poller.run(), f"poll {key}")
        self.page.limit(_room(config))
        for scope in {one.scope for one in old.scopes} - {one.scope for one in config.scopes}:
            self.page.remove(Key("", scope))
        show_static(self.page, config)
        self.loaded = loaded

    def _poller(self, collector: Collector, settings: Settings) -> Poller:
        return Poller(
            collector, store=self.store, page=self.page, telemetry=self.telemetry, clock=self.clock, **settings
        )

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _stop_polls(self, keys: Sequence[Key]) -> None:
        tasks = [self._pollers[key][1] for key in keys]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _warn_of_restart(self, new: Config) -> None:
        """These are used once, at the start; a reload goes on with the old ones."""
        old = self.config
        for path, before, after in (
            ("server", old.server, new.server),
            ("state.url", old.state.url, new.state.url),
            ("log", old.log, new.log),
        ):
            if before != after:
                log.get().warning("restart_needed", file=str(self.options.config_file), field=path)

    # Tasks

    async def _measure_lag(self) -> None:
        """How late the loop runs what is due, and the watchdog's proof that it runs at all."""
        watchdog = systemd.watchdog_interval()
        fed = self.clock.monotonic()
        while True:
            due = self.clock.monotonic() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            now = self.clock.monotonic()
            self.telemetry.loop_lag(max(0.0, now - due))
            with contextlib.suppress(StateError):  # it would end the process; polls report what is wrong
                self.telemetry.state_size(await self.store.size())
            self._notify_ready()
            if watchdog is not None and now - fed >= watchdog - LAG_PERIOD:
                systemd.notify("WATCHDOG=1")
                fed = now

    async def _follow(self) -> None:
        """Reload when a scope file was added, removed or changed; tell of secret files that cannot be read any more."""
        seen = await asyncio.to_thread(self.loaded.scope_stamp)
        while True:
            await asyncio.sleep(FOLLOW)
            stamp = await asyncio.to_thread(self.loaded.scope_stamp)
            if stamp != seen:
                seen = stamp
                await self.reload()
            lost = await asyncio.to_thread(self.loaded.unreadable_secrets)
            if bool(lost) != (SECRETS in self._broken):
                self._note(SECRETS, broken=bool(lost))
            for file, why in lost:
                log.get().error("secret_file_unreadable", file=str(file), message=why, consequence="the last one stays")

    async def _purge(self) -> None:
        """Forget the states of scopes that have been gone for long."""
        while True:
            try:
                forgotten = await self.store.purge(list(self._pollers), self.clock.wall() - KEEP)
                if forgotten:
                    log.get().info("state_purged", states=forgotten)
            except StateError as error:
                log.get().warning("state_purge_failed", message=str(error))
            await asyncio.sleep(3600)

    # What the web server asks

    @property
    def ready(self) -> bool:
        """Every poller has finished an attempt, or a minute has passed; a reload never takes it back, stopping does."""
        if not self._ready:
            waited = self.clock.monotonic() - self._begun >= READY_AFTER
            self._ready = waited or all(poller.attempted.is_set() for poller, _ in self._pollers.values())
        return self._ready and not self.stopping.is_set()

    def _notify_ready(self) -> None:
        if not self._notified:
            self._notified = (
                systemd.notify("READY=1", f"STATUS=watching {len(self._pollers)} (collector, scope)") or True
            )

    def _backend(self) -> Backend:
        return Backend(
            exposition=self._exposition,
            status=self.status,
            failures=self.failures,
            ready=lambda: self.ready,
            reload=self.reload,
            sent=self.telemetry.exposition,
            telemetry_path=self.config.server.telemetry_path,
            enable_lifecycle=self.config.server.enable_lifecycle,
        )

    def _exposition(self, form: Format, names: frozenset[str] | None, gzip: bool) -> Exposition:
        # Counting first: it is what finds out how many series max_series cuts.
        self.telemetry.series(self.page.counts())
        return self.page.exposition(form, names, self.telemetry.render(form.openmetrics, names), gzip)

    def status(self) -> Status:
        """What the landing page and /api/v1/status show."""
        now = self.clock.wall()
        names = {one.scope: one.name for one in self.config.scopes}
        return Status(
            version=__version__,
            started=self.started,
            uptime=self.clock.monotonic() - self._begun,
            ready=self.ready,
            series=sum(self.page.counts().values()),
            watches=tuple(self._watch(poller, names[poller.key.scope], now) for poller, _ in self._pollers.values()),
        )

    def _watch(self, poller: Poller, name: str, now: float) -> Watch:
        state = poller.state
        return Watch(
            collector=poller.key.collector,
            bk_scope_type=poller.key.scope.bk_scope_type,
            bk_scope_id=poller.key.scope.bk_scope_id,
            name=name,
            state=poller.status,
            last_success=state.last_success if state else None,
            age=max(0.0, now - state.last_success) if state else None,
            reason=poller.reason or "",
            message=log.redact(poller.message),
            next_poll=None if poller.next_poll is None else max(0.0, poller.next_poll - self.clock.monotonic()),
            interval=poller.collector.interval,
            failing_hosts=len(poller.collector.failing_hosts(state).streaks) if state and poller.fresh else None,
            series=poller.series,
        )

    def failures(self, scope_type: str | None, scope_id: str | None) -> Failures:
        """What fails now in the matching scopes, with the ids that lead to it on the platform."""
        executions: list[FailingExecution] = []
        hosts: list[tuple[Collector, Streak]] = []
        for poller, _ in self._pollers.values():
            collector, scope, state = poller.collector, poller.key.scope, poller.state
            if (
                state is None
                or scope_type not in (None, scope.bk_scope_type)
                or scope_id not in (None, scope.bk_scope_id)
            ):
                continue
            executions += _failing_executions(collector, state)
            hosts += [(collector, streak) for streak in collector.failing_hosts(state).streaks.values()]
        executions.sort(key=lambda execution: execution.end_time or 0.0, reverse=True)
        hosts.sort(key=lambda host: host[1].since)
        return Failures(executions, (_failing_host(collector, streak) for collector, streak in hosts))


def _failing_executions(collector: Collector, state: CollectorState) -> list[FailingExecution]:
    is_job = collector.name == JobCollector.name
    return [
        FailingExecution(
            collector=collector.name,
            bk_scope_type=collector.scope.bk_scope_type,
            bk_scope_id=collector.scope.bk_scope_id,
            status=failed.status,
            name=failed.name,
            job_instance_id=failed.id if is_job else None,
            job_id=None if is_job else failed.id,
            end_time=failed.end,
        )
        for failed in collector.failed_executions(state)
    ]


def _failing_host(collector: Collector, streak: Streak) -> FailingHost:
    is_job = collector.name == JobCollector.name
    labels = dict(zip(collector.failure_labels, streak.labels, strict=True))
    return FailingHost(
        collector=collector.name,
        bk_scope_type=collector.scope.bk_scope_type,
        bk_scope_id=collector.scope.bk_scope_id,
        bk_cloud_id=streak.host.bk_cloud_id,
        bk_host_id=streak.host.bk_host_id,
        ip=streak.host.ip,
        code=labels["code"],
        reason=labels.get("reason") or labels.get("step", ""),
        since=streak.since,
        consecutive=streak.count,
        job_instance_id=streak.run if is_job else None,
        job_id=None if is_job else streak.run,
    )


def _url(address: tuple[object, ...], tls: bool) -> str:
    host, port = address[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in str(host) else host}:{port}"


async def run(
    options: Options, loaded: Loaded, started: Callable[[Sequence[str]], None] = lambda addresses: None
) -> None:
    """Run the daemon until SIGTERM or SIGINT; a second one ends it on the spot. SIGHUP reloads."""
    app = App(options, loaded)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log.on_loop_exception)
    reloads: set[asyncio.Task[list[str]]] = set()

    def stop() -> None:
        if app.stopping.is_set():
            os._exit(1)
        app.stop()

    def reload() -> None:
        task = loop.create_task(app.reload(), name="reload")
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await app.run(started)
