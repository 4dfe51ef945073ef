"""The daemon beside a simulated NodeMan, over real HTTP on loopback, in virtual time: see tests/daemon.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from exporter.model import Scope
from exporter.simulator import nodeman_api
from exporter.simulator.faults import Fault
from exporter.simulator.nodeman_ledger import NodemanLedger
from exporter.simulator.nodeman_world import Job, NodemanWorld, Target
from exporter.simulator.platform import LoggedCall
from exporter.simulator.server import SimulatorServer
from tests.support.daemon import BIZ, EPOCH, Daemon, Metrics

OTHER = Scope("biz", "3")
HOSTS = [Target(2, f"10.2.0.{number}", number) for number in range(1, 41)]
FOREIGN = [Target(3, f"10.3.0.{number}", 300 + number) for number in range(1, 11)]

FAILURE = ("collector", "job_type", "step", "code")
HOST = ("bk_cloud_id", "bk_host_id", "ip")


class Nodeman(Daemon):
    """A simulated NodeMan and the exporter that watches it.

    While `frozen` is set the platform's clock stands: then a poll and the ledger speak of the same moment.
    """

    frozen: float | None = None

    @property
    def nodeman(self) -> NodemanWorld:
        return nodeman_api.world_of(self.platform)

    @property
    def ledger(self) -> NodemanLedger:
        return NodemanLedger(self.nodeman)

    def now(self) -> float:
        """The platform's time, unix seconds."""
        return super().now() if self.frozen is None else self.frozen

    def configure(
        self,
        url: str,
        *,
        api: str = "gateway",
        job: dict[str, Any] | None = None,
        subscription: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        **top: Any,
    ) -> None:
        """Write the configuration. `job`, `subscription`, `task`: keys of the collectors, None switches one off."""
        self._settings = {
            "server": {"listen_address": ["127.0.0.1:0"], "enable_lifecycle": True},
            "blueking": {
                "nodeman": {
                    "url": url if api == "esb" else f"{url}/api/bk-nodeman/prod",
                    "api": api,
                    "web_url": "https://nodeman.example.com/o/",
                },
                "nodeman_legacy": {"url": url},
                "auth": {"app_code": "blueking-exporter", "app_secret": "simulated", "username": "admin"},
                "requests_per_second": 1000,
            },
            "collectors": {
                "job": {"enabled": False},
                "nodeman_job": _collector(job),
                "nodeman_subscription": _collector(subscription),
                "nodeman_task": _collector(task),
            },
            "counter_birth_hold": "0s",
            "scopes": [
                {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}
                for scope in self.platform.scopes
            ],
            **top,
        }
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    def set(self, collector: str, **keys: Any) -> None:
        """Write the configuration again with these keys of a collector changed; a reload or start takes it up."""
        self._settings["collectors"][collector] |= keys
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    def top(self, **keys: Any) -> None:
        """Write the configuration again with these top-level keys."""
        self._settings |= keys
        self.file.write_text(yaml.safe_dump(self._settings), encoding="utf-8")

    async def reload(self) -> None:
        assert self.app is not None
        assert await self.app.configuration.reload() == []

    async def poll_at(self, moment: float) -> Metrics:
        """The page after a poll that saw the platform exactly at that moment of loop time."""
        await self.sleep_until(moment)
        self.frozen = EPOCH + moment
        try:
            return await self.poll()
        finally:
            self.frozen = None

    async def sleep_until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self.loop.time()))

    def fault(self, name: str, **given: Any) -> None:
        self.platform.faults.add(Fault(name, **given))

    def failing_on(self, job_type: str, *hosts: Target, **given: Any) -> Job:
        """A job over these hosts that ends with all of them failed in the step `install`, or what `step` says."""
        step = given.pop("step", "install")
        return self.nodeman.start_job(job_type, dict.fromkeys(hosts, step), **given)

    def asked(self, since: float = 0.0) -> Counter[str]:
        """Calls since that loop time, by api."""
        return Counter(call.api for call in self.calls(since))

    def details(self, since: float = 0.0) -> list[LoggedCall]:
        return self.calls(since, "job_details")


def _collector(keys: dict[str, Any] | None) -> dict[str, Any]:
    return {"enabled": False} if keys is None else {"enabled": True, "interval": "30s", **keys}


def nodeman(name: str) -> str:
    return f"blueking_nodeman_{name}"


def own(metrics: Metrics, name: str, *, collector: str = "nodeman_job", scope: Scope = BIZ, **labels: str) -> float:
    """The exporter's own metric about a collector; 0 if it is absent."""
    full = f"blueking_exporter_collector_{name}"
    return metrics.get(full, collector=collector, scope=scope, **labels) or 0.0


def finished(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    return metrics.by(nodeman("jobs_finished_total"), "job_type", "status", scope=scope)


def failures(metrics: Metrics, scope: Scope = BIZ) -> dict[tuple[str, ...], float]:
    return metrics.by(nodeman("host_failures_total"), *FAILURE, scope=scope)


def failing(metrics: Metrics, scope: Scope = BIZ, **equal: str) -> dict[tuple[str, ...], float]:
    """Without the label sets that stay at 0."""
    shown = metrics.by(nodeman("hosts_failing"), *FAILURE, scope=scope, **equal)
    return {labels: value for labels, value in shown.items() if value}


def since(metrics: Metrics, scope: Scope = BIZ, **equal: str) -> dict[tuple[str, ...], float]:
    return metrics.by(nodeman("host_failing_since_timestamp_seconds"), *HOST, scope=scope, **equal)


Change = Callable[[str, dict[str, Any]], dict[str, Any] | bytes]
"""What happens to an answer on its way: path and body."""


@contextlib.asynccontextmanager
async def changed(url: str, change: Change) -> AsyncIterator[str]:
    """The URL of a server that hands everything on to the one at `url`, and changes the answers."""

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        async with session.request(request.method, f"{url}{request.rel_url}", data=body, headers=headers) as answer:
            new = change(request.path, await answer.json(content_type=None))
            text = new if isinstance(new, bytes) else json.dumps(new).encode()
            date = {"Date": answer.headers["Date"]}
            return web.Response(status=answer.status, body=text, headers=date, content_type="application/json")

    async with aiohttp.ClientSession(auto_decompress=True) as session:
        runner = web.AppRunner(app := web.Application(), access_log=None, shutdown_timeout=0.1)
        app.router.add_route("*", "/{path:.*}", handle)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def listening(one: Daemon, change: Change | None) -> AsyncIterator[str]:
    """The URL of the platform of `one`, with `change` between them. At the end the exporter is stopped."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimulatorServer(one.platform))
        try:
            yield await stack.enter_async_context(changed(server.url, change)) if change else server.url
        finally:
            await one.stop()


@contextlib.asynccontextmanager
async def watched(
    directory: Path,
    *,
    scopes: Sequence[Scope] = (BIZ,),
    seed: int = 1,
    change: Change | None = None,
    **configuration: Any,
) -> AsyncIterator[Nodeman]:
    """A platform that listens and a configured exporter that has not been started. Its clock ticks in seconds.

    `change`: what happens to every answer on its way.
    """
    one = Nodeman(directory, scopes=scopes, tick=1.0, seed=seed)
    async with listening(one, change) as url:
        one.configure(url, **configuration)
        yield one
