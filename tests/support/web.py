"""A web server with test data on loopback, for the tests of the web layer."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.config import schema
from exporter.metrics.family import GaugeChunk
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Exposition, Piece, Snapshot
from exporter.status import FailureFilter, Failures, Status
from exporter.web.connection import Limits
from exporter.web.security import WebConfig
from exporter.web.server import Backend, WebServer, listen


async def no_failures(wanted: FailureFilter) -> Failures:
    return Failures()


async def no_errors() -> Sequence[str]:
    return []


def expose(lines: Sequence[bytes]) -> Callable[[Format, frozenset[str] | None, bool], Exposition]:
    """A page of these lines in either format; nothing of it when names are asked for."""
    pieces = [Piece((GaugeChunk(line, 1),), len(line)) for line in lines]

    def exposition(form: Format, names: frozenset[str] | None, gzip: bool) -> Exposition:
        return Exposition(Snapshot(pieces if names is None else []), b"# EOF\n" if form.openmetrics else b"", gzip)

    return exposition


def resident() -> int:
    """Bytes of memory that this process really uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


STATUS = Status(version="0.1.0", started=1.0, uptime=2.0, ready=True)
BACKEND = Backend(
    exposition=expose([b"up 1\n"]),
    status=lambda: STATUS,
    failures=no_failures,
    ready=lambda: True,
    reload=no_errors,
)


@dataclass
class Running:
    """A server that answers. `stop()` is what SIGTERM does."""

    port: int
    task: asyncio.Task[None]
    server: WebServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def raw(self, data: bytes, *, until: float = 30.0) -> bytes:
        """Everything the server sends back to these bytes, until it closes."""
        async with asyncio.timeout(until):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(data)
                return await reader.read()
            finally:
                writer.close()

    async def get(self, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names and body of one request on a connection of its own."""
        lines = [f"{method} {path} HTTP/1.1", "Connection: close", *headers, "", ""]
        if not any(header.lower().startswith("host:") for header in headers):
            lines.insert(1, "Host: test")
        return parsed(await self.raw("\r\n".join(lines).encode("latin-1")))


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with lower-case names, body (chunks put together)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if headers.get("transfer-encoding") == "chunked" and body:
        chunks = []
        while True:
            size, _, body = body.partition(b"\r\n")
            if not int(size, 16):
                break
            chunks.append(body[: int(size, 16)])
            body = body[int(size, 16) + 2 :]
        body = b"".join(chunks)
    return int(first.split()[1]), headers, body


@contextlib.asynccontextmanager
async def running(
    config: Path | WebConfig | None = None,
    limits: Limits | None = None,
    settings: schema.Server | None = None,
    **changes: Any,
) -> AsyncIterator[Running]:
    """A server with `BACKEND`, some of its parts changed."""
    if isinstance(config, Path):
        config = WebConfig(config)
    server = WebServer(replace(BACKEND, **changes), settings, config, limits)
    listeners = listen(["127.0.0.1:0"])
    port = listeners[0].getsockname()[1]
    run = Running(port, asyncio.get_running_loop().create_task(server.run(listeners), name="server"), server)
    try:
        yield run
    finally:
        await run.stop()
