"""T11: the calls to the platform, beside the least that could be, in a time that jumps."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter

from bench.measure import Row, scratch
from bench.platform import config, scopes
from exporter import log
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.load import load
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.page import Page
from exporter.poller import Poller, Services
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, target
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry

INTERVAL = 30.0
REOPEN = 86_400.0
MOST = 1.1


class Watched:
    """One scope, its poller and the calls it made since `begin`."""

    def __init__(self, platform: Platform, poller: Poller, at: list[float]) -> None:
        self.platform = platform
        self.poller = poller
        self._at = at

    async def poll(self, times: int) -> int:
        """So many intervals, each with as many polls as there is history to read; how many polls."""
        polls = 0
        for _ in range(times):
            self._at[0] += INTERVAL
            more = True
            while more:
                more = await self.poller.poll()
                polls += 1
                if not self.poller.success:
                    raise RuntimeError(self.poller.message)
        return polls

    def sleep(self, seconds: float) -> None:
        self._at[0] += seconds

    def calls(self) -> Counter[str]:
        """`list` of a window, `look` at what is known already, `status`; the log of calls begins anew."""
        found: Counter[str] = Counter()
        for call in self.platform.calls:
            looks = "job_instance_id" in call.params or "status" in call.params
            found["status" if call.api.endswith("status") else "look" if looks else "list"] += 1
        self.platform.calls.clear()
        return found

    def run(self, number: int, *, fails: bool, hosts: bool = True) -> None:
        """An execution of a plan of its own that takes two seconds."""
        results = {target(number): (104, 1) if fails else 9} if hosts else {}
        step = StepScript(1, 2.0, results, status=4 if fails else None)
        self.platform.job.start(scopes(1)[0], plan_id=1_000_000 + number, steps=[step])


def _row(what: str, calls: float, least: float, target: float | None) -> Row:
    return Row(target_id="T11", what=what, value=calls, anchor=least, unit="calls", target=target)


async def _measure() -> list[Row]:
    log.configure("error", "logfmt")
    at = [1_789_000_000.0 - time.monotonic()]

    def now() -> float:  # time that passes, and jumps
        return at[0] + time.monotonic()

    platform = Platform(scopes=scopes(1), now=now)
    clock, telemetry = Clock(wall=now, monotonic=now), Telemetry()
    rows = []
    with scratch() as folder:
        async with SimulatorServer(platform) as server:
            file = folder / "config.yaml"
            settings = config(server.url, 1, f"{INTERVAL:.0f}s", job={"reopen_window": f"{REOPEN:.0f}s"})
            settings["blueking"]["requests_per_second"] = 10_000
            file.write_text(json.dumps(settings))
            loaded = load(file).config
            store = MemoryStore()
            async with Client(loaded.blueking, clock, telemetry, log.get()) as client:
                services = Services(store, Page(page_families()), telemetry, clock)
                (poller,) = pollers(loaded, client, services)
                one = Watched(platform, poller, at)
                await one.poll(2)
                one.calls()

                polls = await one.poll(100)
                rows.append(_row("idle scope, 100 intervals", one.calls().total(), polls, MOST))

                number, failing = 0, 0
                for _ in range(40):
                    for _ in range(5):
                        number += 1
                        failing += number % 10 == 0
                        one.run(number, fails=number % 10 == 0)
                    polls = await one.poll(1)
                await one.poll(2)
                calls = one.calls()
                name = f"{number} executions, {failing} failing, in 42 intervals"
                rows.append(_row(f"{name}: windows and statuses", calls["list"] + calls["status"], 42 + failing, MOST))
                rows.append(_row(f"{name}: looks at failing hosts (4.1.8)", calls["look"], 42 * INTERVAL / 120, None))

                one.sleep(3600)
                await one.poll(1)
                one.calls()
                for _ in range(10_000):
                    number += 1
                    one.run(number, fails=False)
                    one.sleep(2)
                await one.poll(1)
                calls = one.calls()
                least = math.ceil((10_000 + poller.collector.config.lookback / 2) / 200)  # type: ignore[attr-defined]
                rows.append(_row("catch-up of 10,000 executions", calls["list"], least, MOST))

                one.sleep(REOPEN * 2)
                await one.poll(1)
                for _ in range(50):
                    number += 1
                    one.run(number, fails=True, hosts=False)
                await one.poll(2)
                one.calls()
                intervals = int(REOPEN / 10 / INTERVAL)
                await one.poll(intervals)
                calls = one.calls()
                rows.append(
                    _row(
                        "50 failed executions without hosts, for a tenth of reopen_window: looks",
                        calls["look"],
                        10,
                        MOST,
                    )
                )
    return rows


def measure() -> list[Row]:
    return asyncio.run(_measure())
