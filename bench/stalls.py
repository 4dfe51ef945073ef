"""How long the event loop stands still while big answers are polled: `python -m bench.stalls URL FOLDER HOSTS ...`.

Polls the subscription of the platform, then executions on so many hosts, one after the other, and prints JSON: the
longest stall of the loop in CPU seconds and by the clock, the CPU seconds of the poll, and the hosts that fail then.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from pathlib import Path

import aiohttp

from bench.platform import SUBSCRIPTION, config
from exporter import log
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.load import load
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.page import Page
from exporter.model import Scope
from exporter.poller import Poller, Services
from exporter.state.sqlite import SQLiteStore
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


async def run(url: str, folder: Path, sizes: list[int]) -> list[dict[str, object]]:
    log.configure("error", "logfmt")
    settings = {**config(url, len(sizes), "30s"), "counter_birth_hold": "0s"}
    settings["blueking"]["nodeman"] = {"url": f"{url}/api/bk-nodeman/prod"}
    subscription = {"enabled": True, "subscription_ids": [SUBSCRIPTION]}
    settings["scopes"][0]["collectors"] = {"nodeman_subscription": subscription}
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings))
    loaded = load(file).config
    clock, telemetry = Clock(), Telemetry()
    store = SQLiteStore(folder / "stalls.db")
    await store.open()
    page = Page(page_families())
    found: list[dict[str, object]] = []
    try:
        async with Client(loaded.blueking, clock, telemetry, log.get()) as client, aiohttp.ClientSession() as session:
            built = pollers(loaded, client, Services(store, page, telemetry, clock))
            (other,) = [poller for poller in built if poller.key.collector != "job"]
            found.append({"what": "subscription", **await _watch(other)})
            built.remove(other)
            for poller, size in zip(built, sizes, strict=True):
                await poller.poll()
                await _start(session, url, poller.key.scope, size)
                await asyncio.sleep(0.2)
                found.append({"what": "execution", **await _watch(poller)})
    finally:
        await store.close()
    return found


async def _watch(poller: Poller) -> dict[str, float]:
    """One poll, beside a heart that beats."""
    heart = Heart()
    beating = asyncio.create_task(heart.beat())
    used = time.process_time()
    await poller.poll()
    used = time.process_time() - used
    await asyncio.sleep(0.01)
    beating.cancel()
    if not poller.success or poller.state is None:
        raise RuntimeError(poller.message)
    failing = len(poller.collector.failing_hosts(poller.state).streaks)
    return {"failing": failing, "stall": heart.worst, "delay": heart.delay, "cpu": used}


async def _start(session: aiohttp.ClientSession, url: str, scope: Scope, hosts: int) -> None:
    """An execution that is over at once; every tenth host fails."""
    results = [
        {
            "bk_host_id": 1_000_000 + index,
            "ip": f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}",
            "status": 104 if index % 10 == 0 else 9,
            "exit_code": 1 if index % 10 == 0 else 0,
        }
        for index in range(hosts)
    ]
    where = {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}
    started = {**where, "steps": [{"duration": 0, "results": results}]}
    async with session.post(f"{url}/-/world/start", json=started) as answer:
        answer.raise_for_status()


if __name__ == "__main__":
    gc.freeze()  # as the command does
    print(json.dumps(asyncio.run(run(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]))))
