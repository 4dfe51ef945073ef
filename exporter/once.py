"""One complete poll of everything, written as text: for cron and node_exporter's textfile collector."""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from exporter import log
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.schema import Config
from exporter.discovery import Discoverer
from exporter.exposed import page_families, show_scope, show_status_codes
from exporter.fleet import pollers
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.poller import Poller, Services
from exporter.shard import Shard
from exporter.state.base import open_store
from exporter.telemetry import Telemetry


async def once(config: Config, shard: Shard | None = None, *, constants: bool = True) -> tuple[bytes, bool]:
    """The page after one complete poll of every collector, history that was missed included; whether all succeeded.

    Counts are kept in the configured state, so that a second call goes on where this one ended. The process's own
    metrics are left out: beside node_exporter's they would be duplicates. Of the scopes, those of `shard`. `constants`
    False leaves out the series that are the same in the page of every exporter. Raises `StateError`, `ConfigError`.
    """
    shard = shard or Shard()
    clock, telemetry = Clock(), Telemetry()
    page = Page(page_families(), config.max_series)
    async with AsyncExitStack() as stack:
        store = open_store(config.state, shard)
        await store.open()
        stack.push_async_callback(store.close)
        client = await stack.enter_async_context(Client(config.blueking, clock, telemetry, log.get()))
        services = Services(store, page, telemetry, clock)
        found = True
        if config.discovery.enabled:
            discoverer = Discoverer(services)
            await discoverer.load()
            found = await discoverer.refresh(config, client)
            config = msgspec.structs.replace(config, scopes=(*config.scopes, *discoverer.scopes(config)))
        config = msgspec.structs.replace(config, scopes=tuple(one for one in config.scopes if shard.owns(one.scope)))
        polled = pollers(config, client, services)
        await asyncio.gather(*(poll_completely(poller) for poller in polled))
        if constants:
            show_status_codes(page)
        for scope in config.scopes:
            show_scope(page, scope, config)
        body = b"".join(page.exposition(Format.TEXT))
    return body, found and all(poller.success for poller in polled)


async def poll_completely(poller: Poller) -> None:
    """Poll until there is no history left to read, and show everything as it is."""
    while await poller.poll():
        pass
    poller.show(final=True)


def write_atomically(path: Path, body: bytes) -> None:
    """Replace the file in one step, readable for everybody: a reader sees the old page or the new one. Raises
    OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
