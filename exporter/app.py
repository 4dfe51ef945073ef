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
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from socket import socket
from typing import TYPE_CHECKING

from exporter import __version__, log, systemd
from exporter.clock import Clock
from exporter.config.load import Loaded
from exporter.config.schema import Config
from exporter.config.state_url import RedisUrl
from exporter.discovery import Discoverer
from exporter.exposed import page_families
from exporter.fleet import Fleet, series_limit
from exporter.metrics.page import Page
from exporter.poller import Services
from exporter.process import Process
from exporter.reload import Configuration, Options
from exporter.shard import pod_name
from exporter.sharing import Alone, Sharing
from exporter.state.base import Store, open_store
from exporter.telemetry import Telemetry
from exporter.web.security import WebConfig
from exporter.web.server import Backend, WebServer, listen

if TYPE_CHECKING:
    # redis-py is an extra.
    from exporter.state.redis import RedisStore

COLLECT = (10_000, 2, 50)
"""Thresholds of the garbage collector. What a poll needs is freed without it, and with the usual 700 it would take a
twentieth of the CPU. With the usual 10 for the second generation it would stop the event loop for some 90 ms while
thousands of scopes have their first poll."""
STOP_WITHIN = 4.5
"""Seconds from the request to stop until the process ends, even while a thread hangs in the resolver or on a disk."""


class App:
    """One daemon; `run` returns after `stop`. Raises `ConfigError` for the web configuration file."""

    def __init__(self, options: Options, loaded: Loaded, clock: Clock | None = None) -> None:
        config = loaded.config
        self.options = options
        self.clock = clock or Clock()
        self.telemetry = Telemetry(__version__)
        self.telemetry.shard(options.shard.ordinal, options.shard.total)
        page = Page(page_families(), series_limit(config), self.telemetry.series_dropped)
        shared = _shared_store(config, self.telemetry)
        self.store: Store = shared or open_store(config.state, options.shard)
        services = Services(self.store, page, self.telemetry, self.clock)
        self.fleet = Fleet(services, shares_rate=shared is not None)
        self.discoverer = Discoverer(services, shared)
        self.fleet.others.append(self.discoverer)
        self.sharing = Sharing(shared, self.fleet, self.telemetry) if shared else Alone(options.shard)
        self.web = WebConfig(config.server.web_config_file, self._web_file_followed)
        self.configuration = Configuration(options, loaded, self.fleet, self.web, self.telemetry, self.clock)
        self.process = Process(self.fleet, self.sharing, page, self.telemetry, self.clock)

    async def run(self, started: Callable[[Sequence[str]], None] = lambda addresses: None) -> None:
        """Serve until `stop`. `started` is called with the addresses as soon as they answer.

        Raises `ConfigError` for the certificates of the client, `StateError` for the state, and `ExporterError` for an
        address that is taken; some of them in a group.
        """
        async with AsyncExitStack() as stack:
            await self._open_state(stack)
            sockets = self._open_port(stack)
            await stack.enter_async_context(self.fleet)
            await self._start_pollers()
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            server = self._web_server()
            serving = tasks.create_task(server.run(sockets), name="web")
            heartbeats = tasks.create_task(self.sharing.send_heartbeats(), name="heartbeat")
            background = [tasks.create_task(work, name=name) for name, work in self._background().items()]
            self._announce([_url(one.getsockname(), self.web.current.tls is not None) for one in sockets], started)

            await self.process.stopping.wait()
            systemd.notify("STOPPING=1")
            log.get().info("stopping")
            for task in background:
                task.cancel()
            await self.fleet.stop()
            # Heartbeats and scrapes go on during this: scopes that are not released yet are still shown here.
            await asyncio.gather(server.drain(), self.sharing.leave())
            heartbeats.cancel()
            serving.cancel()

    def stop(self) -> None:
        """Ask the daemon to stop. It is not ready from here on."""
        self.process.stopping.set()

    async def _open_state(self, stack: AsyncExitStack) -> None:
        await self.store.open()
        stack.push_async_callback(self.store.close)
        for _ in range(self.store.resets):
            self.telemetry.state_reset()

    def _open_port(self, stack: AsyncExitStack) -> list[socket]:
        """The listening sockets. Connections queue until the state is loaded."""
        address = self.configuration.loaded.config.server.listen_address
        sockets = systemd.sockets() if self.options.systemd_socket else listen(address)
        for one in sockets:
            stack.callback(one.close)
        return sockets

    async def _start_pollers(self) -> None:
        await self.discoverer.load()
        config = self.configuration.loaded.config
        await self.fleet.apply(config, found=self.discoverer.scopes, assigned=self.sharing.assigned)
        gc.freeze()  # walking over thousands of pollers would make every full collection slow
        gc.enable()
        gc.set_threshold(*COLLECT)

    def _web_server(self) -> WebServer:
        process = self.process
        backend = Backend(
            process.exposition, process.status, process.failures, process.ready, self.configuration.reload
        )
        return WebServer(backend, self.configuration.loaded.config.server, self.web)

    def _background(self) -> dict[str, Coroutine[None, None, None]]:
        """What runs until the request to stop, by the name of its task."""
        return {
            "reload": self.configuration.serve_requests(),
            "follow files": self.configuration.follow(),
            "purge": self.fleet.purge(),
            "discovery": self.discoverer.run(self.fleet),
            "loop lag": self.telemetry.measure_loop_lag(self.clock),
            "state": self.fleet.keep_state(),
            "share": self.sharing.run(),
            "watchdog": systemd.feed_watchdog(),
        }

    def _announce(self, addresses: Sequence[str], started: Callable[[Sequence[str]], None]) -> None:
        log.get().info("started", version=__version__, addresses=",".join(addresses), pollers=len(self.fleet.pollers))
        started(addresses)
        systemd.notify("READY=1", f"STATUS=watching {len(self.fleet.pollers)} (collector, scope)")

    def _web_file_followed(self, taken: bool) -> None:
        self.configuration.note("web configuration", broken=not taken)


def _shared_store(config: Config, telemetry: Telemetry) -> RedisStore | None:
    """The store of one of several replicas, None with a state that belongs to one process."""
    if not isinstance(config.state.url, RedisUrl):
        return None
    from exporter.state.redis import RedisStore

    telemetry.shared()
    store = RedisStore(config.state, pod=pod_name(), telemetry=telemetry)
    store.configure(config.sha256)
    return store


def _url(address: tuple[object, ...], tls: bool) -> str:
    host, port = address[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in str(host) else host}:{port}"


def _end_process() -> None:
    """End the process with 0, whatever its other threads do. What has been committed is safe."""
    last_line = threading.Thread(
        target=log.get().warning, args=("stopped_by_force",), kwargs={"message": "a thread still hangs"}, daemon=True
    )
    last_line.start()
    last_line.join(0.2)  # standard error may hang as well
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
        if app.process.stopping.is_set():
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
