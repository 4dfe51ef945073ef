"""The whole daemon beside a simulated platform, over real HTTP on loopback, in virtual time.

Both run in the loop of a test that is marked `looptime`: an hour passes as soon as nobody has anything to do. What a
test reads is the text of /metrics, parsed by prometheus_client.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from exporter.app import App
from exporter.clock import Clock
from exporter.config.load import load
from exporter.metrics.negotiate import Format
from exporter.model import Scope
from exporter.reload import Options
from exporter.simulator.platform import LoggedCall, Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import JobWorld
from tests.support.parsers import parse
from tests.support.web import parsed

EPOCH = 1_795_000_000.0
"""Wall clock at loop time 0, unix seconds."""
BIZ = Scope("biz", "2")
LIST, STATUS = "get_job_instance_list", "get_job_instance_status"

MEMORY = {"url": "memory:"}
"""`state` of a daemon that will not be restarted: idle hours pass three times as fast."""

COLLECTOR = "blueking_exporter_collector_"


class Metrics:
    """One page: samples by name and labels. Names without prefix are JOB's."""

    def __init__(self, text: str, form: Format) -> None:
        self.text = text
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in parse(text, form):
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"two samples for {key}"
                self.samples[key] = sample.value

    def by(self, name: str, *labels: str, scope: Scope = BIZ, **equal: str) -> dict[tuple[str, ...], float]:
        """The values of one scope by the values of these labels; of those with `equal` only."""
        wanted = {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id, **equal}
        found = {}
        for (sample, pairs), value in self.samples.items():
            given = dict(pairs)
            if sample == _full(name) and wanted.items() <= given.items():
                found[tuple(given[label] for label in labels)] = value
        return found

    def get(self, name: str, *, scope: Scope = BIZ, **labels: str) -> float | None:
        """The value of the one series with these labels, None where there is none."""
        pairs = {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id, **labels}
        return self.samples.get((_full(name), frozenset(pairs.items())))

    def total(self, name: str, **equal: str) -> float:
        """The sum over all series with these labels; 0 without any."""
        wanted = equal.items()
        return sum(
            value for (sample, pairs), value in self.samples.items() if sample == _full(name) and wanted <= set(pairs)
        )

    def own(self, name: str, *, scope: Scope = BIZ, **labels: str) -> float | None:
        """The exporter's own metric about its job collector."""
        return self.get(COLLECTOR + name, collector="job", scope=scope, **labels)


def _full(name: str) -> str:
    return name if name.startswith("blueking_") else f"blueking_job_{name}"


class Daemon:
    """A simulated platform and the exporter that watches it.

    `ahead`: seconds by which the exporter's own wall clock is ahead of the platform's; may be changed at any time.
    `tick`: the platform moves in steps of so many seconds, so that nothing happens between two calls of one poll.
    """

    def __init__(self, directory: Path, *, scopes: Sequence[Scope], tick: float | None, seed: int) -> None:
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.ahead = 0.0
        self.tick = tick
        self.platform = Platform(seed=seed, now=self.now, scopes=scopes)
        self.app: App | None = None
        self._settings: dict[str, Any] = {}
        self._running: asyncio.Task[None] | None = None
        self._url = ""
        self._looks = 0

    @property
    def world(self) -> JobWorld:
        return self.platform.job

    @property
    def file(self) -> Path:
        return self.directory / "config.yaml"

    def now(self) -> float:
        """The platform's time, unix seconds."""
        time = EPOCH + self.loop.time()
        return time if self.tick is None else time // self.tick * self.tick

    def monotonic(self) -> float:
        """The loop's time plus a nanosecond per call, so that a loop that waits for a time ends."""
        self._looks += 1
        return self.loop.time() + self._looks * 1e-9

    @property
    def ms(self) -> int:
        return int(self.now() * 1000)

    def configure(self, url: str, *, api: str = "v4", job: dict[str, Any] | None = None, **top: Any) -> None:
        """Write the configuration. `job`: keys of the collector; `top`: top-level keys."""
        path = url if api == "esb" else f"{url}/api/bk-job/prod"
        self._settings = {
            "server": {"listen_address": ["127.0.0.1:0"], "enable_lifecycle": True},
            "blueking": {
                "job": {"url": path, "api": api},
                "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
                "requests_per_second": 1000,
            },
            "collectors": {"job": {"interval": "30s", **(job or {})}},
            "counter_birth_hold": "0s",
            "scopes": [
                {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}
                for scope in self.platform.scopes
            ],
            **top,
        }
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    def change(self, *, job: dict[str, Any] | None = None, **top: Any) -> None:
        """Write the configuration again, with these keys changed. A reload or a start takes it up."""
        self._settings |= top
        self._settings["collectors"]["job"] |= job or {}
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    async def start(self) -> None:
        """Start the exporter on the state that the last one left, and wait for its first poll."""
        clock = Clock(lambda: EPOCH + self.loop.time() + self.ahead, self.monotonic)
        self.app = App(Options(self.file), load(self.file), clock)
        listening: asyncio.Future[str] = self.loop.create_future()
        self._running = self.loop.create_task(self.app.run(lambda urls: listening.set_result(urls[0])))
        waiting: list[asyncio.Future[Any]] = [listening, self._running]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            await self._running
        self._url = listening.result()
        await self.until(lambda: self.app is not None and self.app.process.ready())

    async def stop(self) -> None:
        """Stop the exporter as SIGTERM does."""
        if self.app is not None and self._running is not None:
            self.app.stop()
            await self._running
            self.app = self._running = None

    async def restart(self, down: float = 0.0) -> None:
        """Another process on the same state, after so many seconds."""
        await self.stop()
        await asyncio.sleep(down)
        await self.start()

    async def until(self, true: Callable[[], bool], within: float = 600.0) -> None:
        """Let time pass in small steps until something is true."""
        limit = self.loop.time() + within
        while not true():
            assert self.loop.time() < limit, "it did not come true"
            await asyncio.sleep(0.02)

    async def poll(self, times: int = 1) -> Metrics:
        """Wait for the next poll of every scope, and all that follow it at once, to be over; the page after it."""
        for _ in range(times):
            await asyncio.sleep(max(self._waits()) + 0.01)
            # A poll that runs, or that follows another one at once, is due now.
            await self.until(lambda: min(self._waits()) > 0)
        return await self.metrics()

    def _waits(self) -> list[float]:
        """Seconds until the next poll of each scope."""
        assert self.app is not None
        return [watch.next_poll or 0.0 for watch in self.app.process.status().pollers]

    async def ask(self, path: str, *headers: str, method: str = "GET") -> tuple[int, bytes]:
        """Status and body of one request to the exporter."""
        port = int(self._url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", "Content-Length: 0", *headers]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            status, _, body = parsed(await reader.read())
        finally:
            writer.close()
        return status, body

    async def metrics(self, openmetrics: bool = False) -> Metrics:
        """The page as it is now."""
        form = Format.OPENMETRICS if openmetrics else Format.TEXT
        accept = ["Accept: application/openmetrics-text; version=1.0.0"] if openmetrics else []
        status, body = await self.ask("/metrics", *accept)
        assert status == 200
        return Metrics(body.decode("utf-8"), form)

    def calls(self, since: float = 0.0, api: str | None = None) -> list[LoggedCall]:
        """The calls that the platform has received since that loop time."""
        return [call for call in self.platform.calls if call.at >= EPOCH + since and api in (None, call.api)]

    def counted_calls(self, since: float = 0.0) -> Counter[str]:
        return Counter(call.api for call in self.calls(since))


@contextlib.asynccontextmanager
async def daemon(
    directory: Path,
    *,
    scopes: Sequence[Scope] = (BIZ,),
    tick: float | None = None,
    seed: int = 1,
    **configuration: Any,
) -> AsyncIterator[Daemon]:
    """A platform that listens and a configured exporter that has not been started."""
    one = Daemon(directory, scopes=scopes, tick=tick, seed=seed)
    async with SimulatorServer(one.platform) as server:
        one.configure(server.url, **configuration)
        try:
            yield one
        finally:
            await one.stop()
