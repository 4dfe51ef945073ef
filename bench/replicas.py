"""Several replicas on Redis: takeover, load of the store, balance and moves, CPU of a poll, stall of a change."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import MIB, Row, output, python, scratch, server, versus
from exporter import log
from exporter.config.schema import State
from exporter.config.state_url import StateUrl
from exporter.model import Key, Scope
from exporter.state.leases import Assignment
from exporter.state.redis import RedisStore
from exporter.telemetry import Telemetry
from tests.support.components import Redis, Stack

SCOPES = 30_000
INTERVAL = 30.0
PAYLOAD = b"x" * 3000
TTL = 3.0
POLLED = 300


class Replica:
    """A store and what the fleet does with it, without polls."""

    def __init__(self, server: Redis, pod: str, scopes: tuple[Scope, ...]) -> None:
        state = State(url=StateUrl().parse(f"redis://127.0.0.1:{server.port}", Path("/")), lease_ttl=TTL)
        self.store = RedisStore(state, pod=pod, telemetry=Telemetry())
        self.scopes = scopes
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.store.open()
        heartbeats = self.store.send_heartbeats(lambda key: None)
        self.tasks = [asyncio.create_task(work) for work in (heartbeats, self._share())]

    async def kill(self) -> None:
        """As by `kill -9`: nothing is released."""
        for task in self.tasks:
            task.cancel()
        await self.store._client.close()

    async def _share(self) -> None:
        while True:
            await self.store.next_heartbeat()
            mine = await self.store.assigned(self.scopes)
            if mine is None:
                continue
            await self.store.release([key for key in self.store.held if key.scope not in mine][:100])
            wanted = [key for scope in mine if (key := Key("job", scope)) not in self.store.held]
            async for _ in self.store.claim(wanted):
                pass


def measure() -> list[Row]:
    log.configure("error", "logfmt")
    return [*_balance(), _stall(), *asyncio.run(_takeovers()), *asyncio.run(_load()), *_polls()]


def _scopes(count: int) -> tuple[Scope, ...]:
    return tuple(Scope("biz", str(number)) for number in range(1, count + 1))


def _balance() -> list[Row]:
    """Who has what of 30,000 scopes with 8 replicas, and what 8 → 9 → 8 moves."""
    items = tuple(map(str, _scopes(SCOPES)))
    pods = [f"exporter-{number}" for number in range(9)]

    def owners(count: int) -> dict[str, str]:
        return {item: pod for pod in pods[:count] for item in Assignment().of(pod, pods[:count], items)}

    eight, nine = owners(8), owners(9)
    counts = [list(eight.values()).count(pod) for pod in pods[:8]]
    moved = sum(eight[item] != nine[item] for item in items)
    needless = sum(eight[item] != nine[item] != pods[8] for item in items)
    mean = SCOPES / 8
    return [
        Row(target_id="R1", what="scopes of the fullest of 8 replicas above the mean", value=max(counts) / mean - 1,
            unit="", target=0.10),
        Row(target_id="R2", what="scopes that move 8 → 9, and back 9 → 8", value=moved / SCOPES, unit="",
            target=1 / 9 + 0.01),
        Row(target_id="R2", what="of these, moves between two that stay", value=needless, unit="", target=0),
    ]  # fmt: skip


def _stall() -> Row:
    """How long the event loop stands still while 30,000 scopes are assigned anew among nine."""
    pods = [f"exporter-{number}" for number in range(9)]
    items = tuple(map(str, _scopes(SCOPES)))

    async def stalled() -> float:
        assignment, longest = Assignment(), 0.0
        await asyncio.to_thread(assignment.of, pods[0], pods[:8], items)
        work = asyncio.create_task(asyncio.to_thread(assignment.of, pods[0], pods, items))
        while not work.done():
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began - 0.001)
        return longest

    stalls = [asyncio.run(stalled()) for _ in range(5)]
    return Row(target_id="R3", what="stall of the loop when a ninth replica joins, 30,000 scopes", value=median(stalls),
               unit="s", target=0.05, rounds=5, low=min(stalls), high=max(stalls))  # fmt: skip


async def _until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():  # noqa: ASYNC110 what is waited for is in the store
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def _takeovers(rounds: int = 3) -> list[Row]:
    """kill -9, SIGTERM: seconds until others hold every scope."""
    scopes = _scopes(600)
    with Stack() as stack:
        redis = await asyncio.to_thread(stack.redis)
        replicas = {pod: Replica(redis, pod, scopes) for pod in "abc"}
        for replica in replicas.values():
            await replica.start()

        def complete() -> bool:
            return sum(len(replica.store.held) for replica in replicas.values()) == len(scopes)

        await _until(complete)
        killed: list[float] = []
        left: list[float] = []
        for _ in range(rounds):
            for how, took in (("kill", killed), ("leave", left)):
                replica = replicas.pop("a")
                if how == "leave":
                    await replica.store.leave()
                    await asyncio.sleep(1.5 * replica.store.every)
                    began = time.monotonic()
                    replica.tasks[1].cancel()
                    await replica.store.release(list(replica.store.held))
                else:
                    began = time.monotonic()
                await replica.kill()
                await _until(complete)
                took.append(time.monotonic() - began)
                replicas["a"] = Replica(redis, "a", scopes)
                await replicas["a"].start()
                await _until(lambda: complete() and len(replicas["a"].store.held) > 100)
        for replica in replicas.values():
            await replica.kill()
    return [
        Row(target_id="R4", what=f"takeover after kill -9, ttl {TTL:g} s", value=median(killed), unit="s",
            target=TTL + 1, rounds=rounds, low=min(killed), high=max(killed)),
        Row(target_id="R4", what="takeover after a release (SIGTERM)", value=median(left), unit="s", target=1.0,
            rounds=rounds, low=min(left), high=max(left)),
    ]  # fmt: skip


async def _load(seconds: float = 6.0) -> list[Row]:
    """What 30,000 scopes at 30 s cost the store: 1,000 commits of 3 kB per second."""
    rate, count = SCOPES / INTERVAL, 2000
    scopes = _scopes(count)
    with Stack() as stack:
        redis = await asyncio.to_thread(stack.redis, "--appendonly", "yes", "--appendfsync", "everysec")
        replica = Replica(redis, "a", scopes)
        await replica.start()
        await _until(lambda: len(replica.store.held) == count)
        keys = [Key("job", scope) for scope in scopes]
        before = await asyncio.to_thread(_seen, redis)
        began, number, running = time.monotonic(), 0, set()
        while (now := time.monotonic()) < began + seconds:
            for _ in range(int((now - began) * rate) - number):
                task = asyncio.create_task(replica.store.commit(keys[number % count], PAYLOAD))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*running)
        took = time.monotonic() - began
        after = await asyncio.to_thread(_seen, redis)
        await replica.kill()
    per_second = {name: (after[name] - before[name]) / took for name in before}
    return [
        Row(target_id="R5", what="commits per second at the store", value=number / took, unit="1/s"),
        Row(target_id="R5", what="CPU of the store, of a core", value=per_second["cpu"], unit="", target=0.15),
        Row(target_id="R5", what="bytes to the store per second", value=per_second["received"] / MIB, unit="MiB/s"),
        Row(target_id="R5", what="append-only file per second", value=per_second["file"] / MIB, unit="MiB/s"),
        Row(target_id="R5", what="memory of the store for 30,000 scopes of 3 kB",
            value=after["memory"] / count * SCOPES / MIB, unit="MiB"),
    ]  # fmt: skip


def _seen(redis: Redis) -> dict[str, float]:
    info: Any = redis.ask("INFO", "everything")
    return {
        "cpu": info["used_cpu_sys"] + info["used_cpu_user"],
        "received": info["total_net_input_bytes"],
        "file": info["aof_current_size"],
        "memory": info["used_memory_dataset"],
    }


def _polls(rounds: int = 3) -> list[Row]:
    """CPU of a whole poll of a page of 199 rows, with its commit to Redis and to SQLite."""
    spent: dict[str, dict[str, list[float]]] = {kind: {"new": [], "known": []} for kind in ("redis", "sqlite")}
    with Stack() as stack:
        for _ in range(rounds):
            for kind, found in spent.items():
                address = [f"redis://127.0.0.1:{stack.redis().port}"] if kind == "redis" else []
                with scratch() as folder, server(*python("bench.pages")) as (_process, url):
                    printed = output(*python("bench.polling", url, str(POLLED), str(folder), *address))
                for name, value in json.loads(printed).items():
                    found[name].append(value)
    what = "CPU of a poll with Redis / with SQLite"
    return [
        versus("R6", f"{what}: all rows new", spent["redis"]["new"], spent["sqlite"]["new"], "s", 1.3),
        versus("R6", f"{what}: all rows known", spent["redis"]["known"], spent["sqlite"]["known"], "s", 1.3),
    ]
