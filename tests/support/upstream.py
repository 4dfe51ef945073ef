"""A BlueKing on a loopback port whose answers the test chooses, and a client for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from exporter import log
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.config.schema import Auth, BlueKing
from exporter.config.secret import Secret
from tests.support.paths import FIXTURES

CANARY = "canary-s3cret/+\"'value"
SAMPLES: list[dict[str, Any]] = json.loads((FIXTURES / "manifest.json").read_text())["samples"]
EMPTY_PAGE = b'{"data":{"job_instance_list":[]}}'

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Asked(msgspec.Struct):
    """A request as it arrived; `at` is the loop's time."""

    at: float
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Upstream:
    """An HTTP server: `answers` are used one after the other, the last one for ever."""

    def __init__(self, *answers: web.Response | Answer) -> None:
        self._answers = list(answers) or [reply()]
        self.asked: list[Asked] = []
        self.url = ""

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(
            Asked(
                asyncio.get_running_loop().time(),
                request.method,
                request.path,
                dict(request.query),
                dict(request.headers),
                body,
            )
        )
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, web.Response):
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
        return await answer(request)  # type: ignore[arg-type]

    async def __aenter__(self) -> Upstream:
        server = web.Server(self._serve, access_log=None, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def reply(body: bytes | str = EMPTY_PAGE, status: int = 200, **headers: str) -> web.Response:
    """A JSON answer; `Retry_After="1"` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(
        status=status,
        body=body.encode() if isinstance(body, str) else body,
        headers={"Content-Type": "application/json", **named},
    )


@contextlib.asynccontextmanager
async def raw(peer: Peer) -> AsyncIterator[str]:
    """A TCP server that reads the head of a request and then leaves the connection to `peer`; yields its URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            await peer(reader, writer)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            writer.close()
            await writer.wait_closed()
        tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sends(*parts: bytes) -> Peer:
    """A peer that writes these bytes and closes."""

    async def peer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return peer


class Recorder:
    """Records the calls to the client's observer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.retries: Counter[str] = Counter()
        self.waited = 0.0
        self.flying = self.most_flying = 0
        self.quotas: list[tuple[str, float]] = []
        self.skews: list[float] = []

    def api_request(self, api: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((api, code))

    def api_retry(self, api: str) -> None:
        self.retries[api] += 1

    def throttled(self, seconds: float) -> None:
        self.waited += seconds

    def inflight(self, delta: int) -> None:
        self.flying += delta
        self.most_flying = max(self.most_flying, self.flying)

    def quota(self, api: str, remaining: float) -> None:
        self.quotas.append((api, remaining))

    def skew(self, seconds: float) -> None:
        self.skews.append(seconds)


def config(**changes: Any) -> BlueKing:
    """Fast defaults and an app secret that must never show up anywhere."""
    values: dict[str, Any] = {
        "auth": Auth(app_code="exporter", app_secret=Secret(CANARY), username="ops01"),
        "request_timeout": 2.0,
        "requests_per_second": 1000.0,
        **changes,
    }
    return BlueKing(**values)


def client(recorder: Recorder | None = None, clock: Clock | None = None, **changes: Any) -> Client:
    """A client that is not entered yet."""
    return Client(config(**changes), clock or Clock(), recorder or Recorder(), log.get())
