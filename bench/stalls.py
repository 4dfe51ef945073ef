"""How long the event loop stands still while big answers are polled: `python -m bench.stalls URL FOLDER HOSTS ...`.

Starts executions of so many hosts on the platform, polls until they are counted, and prints JSON: by number of hosts,
the longest stall of the loop in CPU seconds and by the clock, the CPU seconds of the poll, and the hosts that fail on
the page.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from pathlib import Path

import aiohttp

from bench.platform import config, scopes
from exporter import log
from exporter.app import catalogue, collectors, platforms
from exporter.clock import Clock
from exporter.config.load import load
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.poller import Poller
from exporter.state.base import open_store
from exporter.telemetry import Telemetry

BEAT = 0.002


class Heart:
    """What a task sees that wants to run every `BEAT` seconds: the most CPU that the process used, in whatever thread,
    between two of its turns, and the longest delay, in which other processes have their share on a busy machine."""

    worst = delay = 0.0

    async def beat(self) -> None:
        while True:
            used, began = time.process_time(), time.perf_counter()
            await asyncio.sleep(BEAT)
            self.worst = max(self.worst, time.process_time() - used)
            self.delay = max(self.delay, time.perf_counter() - began - BEAT)


async def run(url: str, folder: Path, sizes: list[int]) -> list[dict[str, float]]:
    log.configure("error", "logfmt")
    file = folder / "config.yaml"
    file.write_text(json.dumps({**config(url, len(sizes), "30s"), "counter_birth_hold": "0s"}))
    loaded = load(file).config
    clock, telemetry = Clock(), Telemetry()
    store = open_store(f"sqlite:{folder}/stalls.db")
    await store.open()
    page = Page(catalogue())
    found = []
    try:
        async with platforms(loaded.blueking, clock, telemetry) as apis, aiohttp.ClientSession() as session:
            pollers = [
                Poller(
                    one,
                    store=store,
                    page=page,
                    telemetry=telemetry,
                    clock=clock,
                    hold=0,
                    stale_after=3,
                    request_timeout=30,
                )
                for one in collectors(loaded, apis, clock)
            ]
            for poller, scope, size in zip(pollers, scopes(len(sizes)), sizes, strict=True):
                await poller.poll()
                results = [
                    {"bk_host_id": 1_000_000 + index, "ip": f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}",
                     "status": 104 if index % 10 == 0 else 9, "exit_code": 1 if index % 10 == 0 else 0}
                    for index in range(size)
                ]  # fmt: skip
                started = {
                    "bk_scope_type": scope.bk_scope_type,
                    "bk_scope_id": scope.bk_scope_id,
                    "steps": [{"duration": 0, "results": results}],
                }
                async with session.post(f"{url}/-/world/start", json=started) as answer:
                    answer.raise_for_status()
                await asyncio.sleep(0.2)
                heart = Heart()
                beating = asyncio.create_task(heart.beat())
                used = time.process_time()
                await poller.poll()
                used = time.process_time() - used
                text = b"".join(page.exposition(Format.TEXT))
                await asyncio.sleep(0.01)
                beating.cancel()
                if not poller.success:
                    raise RuntimeError(poller.message)
                own = f'_hosts_failing{{bk_scope_type="biz",bk_scope_id="{scope.bk_scope_id}"'.encode()
                failing = sum(float(line.split()[-1]) for line in text.splitlines() if own in line)
                found.append(
                    {"hosts": size, "stall": heart.worst, "delay": heart.delay, "cpu": used, "failing": failing}
                )
    finally:
        await store.close()
    return found


if __name__ == "__main__":
    gc.freeze()  # as the command does
    print(json.dumps(asyncio.run(run(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]))))
