"""The daemon: start, signals, stop.

    state opened ─► port opened ─► pollers ─► web server ─► … ─► not ready ─► pollers stopped ─► scrapes ended ─► closed

Web server, page, state and telemetry live as long as the process; the pollers come and go with the configuration.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from exporter import __version__, log, systemd
from exporter.clock import Clock
from exporter.config.load import Loaded
from exporter.config.schema import Config
from exporter.config.state_url import RedisUrl
from exporter.discovery import Discoverer
from exporter.exposed import page_families
from exporter.fleet import Fleet, series_limit
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Exposition, Page
from exporter.model import Key
from exporter.poller import Services
from exporter.reload import Configuration, Options
from exporter.shard import pod_name
from exporter.state.base import Store, open_store
from exporter.status import FailureFilter, FailureFinder, Failures, Status, process_status
from exporter.telemetry import Telemetry
from exporter.web.security import WebConfig
from exporter.web.server import Backend, WebServer, listen

if TYPE_CHECKING:
    # redis-py is an extra.
    from exporter.sharing import Sharing
    from exporter.state.redis import RedisStore

STOP_WITHIN = 4.5
"""Seconds from the request to stop until the process ends, even while a thread hangs in the resolver or on a disk."""
READY_AFTER = 60.0
"""Seconds after which the daemon is ready even if some poller has not ended its first poll."""


class App:
    """One daemon; `run` returns after `stop`. Raises `ConfigError` for the web configuration file."""

    def __init__(self, options: Options, loaded: Loaded, clock: Clock | None = None) -> None:
        self.options = options
        self.clock = clock or Clock()
        self.stopping = asyncio.Event()
        self.telemetry = Telemetry(__version__)
        self.page = Page(page_families(), series_limit(loaded.config), self.telemetry.series_dropped)
        shard = options.shard
        shared = _shared_store(loaded.config, self.telemetry)
        self.store: Store = shared or open_store(loaded.config.state, shard)
        services = Services(self.store, self.page, self.telemetry, self.clock)
        self.fleet = Fleet(services, shares_rate=shared is not None)
        self.discoverer = Discoverer(services, shared)
        self.fleet.others.append(self.discoverer)
        self.sharing = _share(shared, self.fleet, self.telemetry) if shared else None
        self.web = WebConfig(loaded.config.server.web_config_file, self._web_file_followed)
        self.configuration = Configuration(options, loaded, self.fleet, self.web, self.telemetry, self.clock)
        self.telemetry.shard(shard.ordinal, shard.total)
        self._started = self.clock.wall()
        self._begun = self.clock.monotonic()
        self._ready = False
        self._finder = FailureFinder(self.fleet)

    async def run(self, started: Callable[[Sequence[str]], None] = lambda addresses: None) -> None:
        """Serve until `stop`. `started` is called with the addresses as soon as they answer.

        Raises `ConfigError` for the certificates of the client, `StateError` for the state, and `ExporterError` for an
        address that is taken; some of them in a group.
        """
        config = self.configuration.loaded.config
        async with AsyncExitStack() as stack:
            await self.store.open()
            stack.push_async_callback(self.store.close)
            for _ in range(self.store.resets):
                self.telemetry.state_reset()
            sockets = systemd.sockets() if self.options.systemd_socket else listen(config.server.listen_address)
            for socket in sockets:
                stack.callback(socket.close)
            await stack.enter_async_context(self.fleet)
            # Connections queue until the state is loaded.
            if not self.sharing:  # else it reads what another replica has found, when the store answers
                await self.discoverer.load()
            assigned = self.sharing.assigned if self.sharing else self._in_shard
            await self.fleet.apply(config, found=self.discoverer.scopes, assigned=assigned)
            gc.freeze()  # pollers stay: walking over thousands of them would make every full collection slow

            server = WebServer(self._backend(), config.server, self.web)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            serving = tasks.create_task(server.run(sockets), name="web")
            background = [
                tasks.create_task(self.configuration.serve_requests(), name="reload"),
                tasks.create_task(self.configuration.follow(), name="follow files"),
                tasks.create_task(self.fleet.purge(), name="purge"),
                tasks.create_task(self.discoverer.run(self.fleet), name="discovery"),
                tasks.create_task(self.telemetry.measure_loop_lag(self.clock), name="loop lag"),
                tasks.create_task(self.fleet.keep_state(), name="state"),
                tasks.create_task(systemd.feed_watchdog(), name="watchdog"),
            ]
            if self.sharing:
                background.append(tasks.create_task(self.sharing.run(), name="share"))
                beating = tasks.create_task(self.sharing.beat(), name="heartbeat")
                stack.callback(beating.cancel)
            addresses = [_url(socket.getsockname(), self.web.current.tls is not None) for socket in sockets]
            log.get().info("started", version=__version__, addresses=addresses, pollers=len(self.fleet.pollers))
            started(addresses)
            systemd.notify("READY=1", f"STATUS=watching {len(self.fleet.pollers)} (collector, scope)")

            await self.stopping.wait()
            systemd.notify("STOPPING=1")
            log.get().info("stopping")
            for task in background:
                task.cancel()
            await self.fleet.stop()
            # Heartbeats and scrapes go on during this: scopes that are not released yet are still shown here.
            await asyncio.gather(server.drain(), self.sharing.leave() if self.sharing else asyncio.sleep(0))
            serving.cancel()

    def stop(self) -> None:
        """Ask the daemon to stop. It is not ready from here on."""
        self.stopping.set()

    @property
    def ready(self) -> bool:
        """Whether every poller has ended a poll, or a minute has passed. A reload never resets it, a stop does.

        With several replicas, this one must also have polled its share.
        """
        if not self._ready:
            complete = self.fleet.attempted and (self.sharing is None or self.sharing.ready)
            self._ready = complete or self.clock.monotonic() - self._begun >= READY_AFTER
        return self._ready and not self.stopping.is_set()

    def status(self) -> Status:
        """What the landing page and /api/v1/status show."""
        return process_status(
            self.fleet,
            replicas=self.sharing.replicas() if self.sharing else (),
            visible=self.visible,
            started=self._started,
            uptime=self.clock.monotonic() - self._begun,
            ready=self.ready,
            series=sum(self.page.counts().values()),
        )

    def _web_file_followed(self, taken: bool) -> None:
        self.configuration.note("web configuration", broken=not taken)

    def _backend(self) -> Backend:
        return Backend(
            exposition=self._exposition,
            status=self.status,
            failures=self._failures,
            ready=lambda: self.ready,
            reload=self.configuration.reload,
        )

    def _in_shard(self, key: Key) -> bool:
        return self.options.shard.owns(key.scope)

    @property
    def visible(self) -> bool:
        """Whether this process may show its scopes: after its lease has lapsed, another replica may show them."""
        return self.sharing is None or self.sharing.valid

    async def _failures(self, wanted: FailureFilter) -> Failures:
        return await self._finder.find(wanted) if self.visible else Failures(visible=False)

    def _exposition(self, form: Format, names: frozenset[str] | None, gzip: bool) -> Exposition:
        # Count first: counting determines how many series max_series cuts.
        self.telemetry.series(self.page.counts())
        if self.sharing:
            self.sharing.measure()
        shown = names if self.visible else frozenset()
        exposition = self.page.exposition(form, shown, self.telemetry.render(form.openmetrics, names), gzip)
        if names is None:
            self.telemetry.exposition(exposition.size)
        return exposition


def _shared_store(config: Config, telemetry: Telemetry) -> RedisStore | None:
    """The store of one of several replicas, None with a state that belongs to one process."""
    if not isinstance(config.state.url, RedisUrl):
        return None
    from exporter.state.redis import RedisStore

    telemetry.shared()
    store = RedisStore(config.state, pod=pod_name(), observer=telemetry)
    store.configure(config.sha256)
    return store


def _share(store: RedisStore, fleet: Fleet, telemetry: Telemetry) -> Sharing:
    from exporter.sharing import Sharing

    return Sharing(store, fleet, telemetry)


def _url(address: tuple[object, ...], tls: bool) -> str:
    host, port = address[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in str(host) else host}:{port}"


def _end_process() -> None:
    """End the process with 0, whatever its other threads do. What has been committed is safe."""
    farewell = threading.Thread(
        target=log.get().warning, args=("stopped_by_force",), kwargs={"message": "a thread still hangs"}, daemon=True
    )
    farewell.start()
    farewell.join(0.2)  # standard error may hang as well
    os._exit(0)


async def run(
    options: Options,
    loaded: Loaded,
    started: Callable[[Sequence[str]], None] = lambda addresses: None,
    *,
    in_terminal: bool = False,
) -> None:
    """Run the daemon until SIGTERM or SIGINT; a second one ends the process at once. SIGHUP reloads, but where the
    daemon belongs to a terminal (`in_terminal`) it stops, since the terminal was closed.

    A SIGHUP that comes while the daemon starts takes effect when it has started. SIGTERM and SIGINT are the caller's
    until then.
    """
    app = App(options, loaded)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log.on_loop_exception)
    if not in_terminal:
        loop.add_signal_handler(signal.SIGHUP, app.configuration.requested.set)

    def stop() -> None:
        if app.stopping.is_set():
            os._exit(1)
        app.stop()
        force = threading.Timer(STOP_WITHIN, _end_process)
        force.daemon = True
        force.start()

    def on_start(addresses: Sequence[str]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if in_terminal else [])):
            loop.add_signal_handler(number, stop)
        started(addresses)

    await app.run(on_start)
