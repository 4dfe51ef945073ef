"""A simulated platform of any size: `python -m bench.platform SCOPES [BUSY [PER_MINUTE [INSTANCES]]]`.

`BUSY` scopes start so many executions a minute; every tenth fails on a few hosts, all others are quiet. A subscription
of NodeMan has so many `INSTANCES`.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from exporter.model import Scope
from exporter.simulator import nodeman_api, nodeman_world
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, Target, target

STEP = 0.2
SUBSCRIPTION = 11
"""The id of the first subscription of a simulated NodeMan."""


def scopes(count: int) -> list[Scope]:
    return [Scope("biz", str(2_000_000 + 7 * index)) for index in range(count)]


def config(url: str, count: int, interval: str, **more: Any) -> Mapping[str, Any]:
    """What a daemon needs to watch this platform."""
    return {
        "blueking": {
            "job": {"url": f"{url}/api/bk-job/prod", "api": "v4"},
            "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
            "requests_per_second": 200,
        },
        "collectors": {"job": {"interval": interval, **more.pop("job", {})}},
        "counter_birth_hold": "30s",
        "scopes": [
            {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id, "name": f"Business {index}"}
            for index, scope in enumerate(scopes(count))
        ],
        **more,
    }


def start_one(platform: Platform, scope: Scope, chance: random.Random, *, fails: bool) -> None:
    """One execution of a plan on ten hosts; when it fails, on one to three of them."""
    hosts = [target(number) for number in chance.sample(range(1, 200), 10)]
    broken = chance.sample(hosts, chance.randint(1, 3)) if fails else []
    results: dict[Target, Any] = {host: (104, 1) if host in broken else 9 for host in hosts}
    number = chance.randint(1, 5)
    platform.job.start(
        scope,
        name=f"plan {number}",
        task_type=0,
        launch_mode=chance.randint(1, 3),
        plan_id=1_000_000 + number,
        steps=[StepScript(1, chance.uniform(1, 20), results)],
    )


def subscribe(platform: Platform, scope: Scope, instances: int) -> None:
    """A subscription of NodeMan, the first one, that has just failed on every instance."""
    biz = int(scope.bk_scope_id)
    hosts = {
        nodeman_world.Target(biz, f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", 1_000_000 + index): "install"
        for index in range(instances)
    }
    nodeman_api.world_of(platform).start_subscription("INSTALL_AGENT", hosts, duration=0.1)


async def serve(app: web.Application) -> None:
    """Serve an application on a free port for good, and print its URL."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


async def run(count: int, busy: int, per_minute: float, instances: int) -> None:
    all_scopes = scopes(count)
    platform = Platform(scopes=all_scopes)
    if instances:
        subscribe(platform, all_scopes[0], instances)
    platform.calls = type(platform.calls)(maxlen=20_000)
    chance = random.Random(1)
    async with SimulatorServer(platform) as server:
        print(server.url, flush=True)
        loop = asyncio.get_running_loop()
        began, started = loop.time(), 0
        while True:
            await asyncio.sleep(STEP)
            while started < (loop.time() - began) * busy * per_minute / 60:
                start_one(platform, all_scopes[started % busy], chance, fails=started % 10 == 9)
                started += 1


if __name__ == "__main__":
    numbers = [float(number) for number in sys.argv[1:]] + [0.0, 6.0, 0.0][len(sys.argv) - 2 :]
    asyncio.run(run(int(numbers[0]), int(numbers[1]), numbers[2], int(numbers[3])))
