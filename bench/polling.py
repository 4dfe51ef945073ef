"""Many polls of the real poller in a process of its own: `python -m bench.polling URL SCOPES FOLDER
[profile | STATE_URL]`.

Prints JSON: CPU seconds per poll in which all rows are new, and per poll in which all are known already.
"""

from __future__ import annotations

import asyncio
import cProfile
import gc
import json
import pstats
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.pages import ROWS
from bench.platform import config
from exporter import log
from exporter.app import COLLECT
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.load import load
from exporter.config.schema import Config, State
from exporter.config.state_url import StateUrl
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.page import Page
from exporter.model import Key
from exporter.poller import Poller, Services
from exporter.state.base import Store, open_store
from exporter.telemetry import Telemetry

CONCURRENCY = 32
BACKGROUND: list[asyncio.Task[None]] = []


async def run(url: str, count: int, folder: Path, profile: bool, state_url: str = "") -> dict[str, float]:
    log.configure("error", "logfmt")
    file = folder / "config.yaml"
    settings = dict(config("http://unused", count, "30s", job={"lookback": "1h"}))
    settings["blueking"] |= {
        "job": {"url": url, "api": "v4"},
        "requests_per_second": 1e6,
        "max_concurrency": CONCURRENCY,
    }
    settings["counter_birth_hold"] = "0s"
    file.write_text(json.dumps(settings))
    loaded = load(file).config
    clock, telemetry = Clock(), Telemetry()
    store = await _store(state_url or f"sqlite:{folder}/state.db", loaded, telemetry)
    page = Page(page_families())
    try:
        async with Client(loaded.blueking, clock, telemetry, log.get()) as client:
            built = pollers(loaded, client, Services(store, page, telemetry, clock))

            async def round_of() -> float:
                began = time.process_time()
                await _all(built)
                return (time.process_time() - began) / count

            await round_of()
            gc.collect()
            gc.freeze()  # as the daemon does
            gc.set_threshold(*COLLECT)
            profiler = cProfile.Profile()
            if profile:
                profiler.enable()
            new = await round_of()
            if profile:
                profiler.disable()
                pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)
            known = await round_of()
            finished = "blueking_job_executions_finished_total"
            for poller in built:
                counted = (
                    sum(one.value for one in poller.state.counts.counters[finished].values()) if poller.state else 0
                )
                if counted != ROWS:
                    raise RuntimeError(f"{poller.key} counted {counted}")
            return {"new": new, "known": known}
    finally:
        for task in BACKGROUND:
            task.cancel()
        await store.close()


async def _store(url: str, config: Config, telemetry: Telemetry) -> Store:
    """An open store; of Redis with every key claimed, and heartbeats under way."""
    state = State(url=StateUrl().parse(url, Path("/")), lease_ttl=10.0)
    if url.startswith("sqlite:"):
        store = open_store(state)
        await store.open()
        return store
    from exporter.state.redis import RedisStore

    shared = RedisStore(state, pod="bench", telemetry=telemetry)
    await shared.open()
    BACKGROUND.append(asyncio.create_task(shared.send_heartbeats(lambda key: None)))
    keys = [Key("job", one.scope) for one in config.scopes]
    while len(shared.held) < len(keys):
        await shared.next_heartbeat()
        async for _ in shared.claim([key for key in keys if key not in shared.held]):
            pass
    return shared


async def _all(pollers: Sequence[Poller]) -> None:
    waiting = iter(pollers)

    async def work() -> None:
        for poller in waiting:
            await poller.poll()
            if not poller.success:
                raise RuntimeError(poller.message)

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


if __name__ == "__main__":
    more = sys.argv[4] if len(sys.argv) > 4 else ""
    profile = more == "profile"
    address = "" if profile else more
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), profile, address))))
