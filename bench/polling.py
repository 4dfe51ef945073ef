"""Many polls of the real poller in a process of its own: `python -m bench.polling URL SCOPES FOLDER
[profile]`.

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
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.load import load
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.page import Page
from exporter.poller import Poller, Services
from exporter.state.base import open_store
from exporter.telemetry import Telemetry

CONCURRENCY = 32


async def run(url: str, count: int, folder: Path, profile: bool) -> dict[str, float]:
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
    store = open_store(f"sqlite:{folder}/state.db")
    await store.open()
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
            gc.freeze()  # as the command does
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
        await store.close()


async def _all(pollers: Sequence[Poller]) -> None:
    waiting = iter(pollers)

    async def work() -> None:
        for poller in waiting:
            await poller.poll()
            if not poller.success:
                raise RuntimeError(poller.message)

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), len(sys.argv) > 4))))
