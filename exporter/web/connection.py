"""One connection: limits on its time and memory.

aiohttp parses requests and keeps connections alive. This class adds a deadline for request heads, a deadline for a
client that does not read, and errors without a traceback and without the name of the library.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, cast

import msgspec
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse
from aiohttp.web_server import Server

from exporter import log
from exporter.web.reply import SECURITY_HEADERS


class Limits(msgspec.Struct, frozen=True):
    """What one client may use. Durations in seconds."""

    connections: int = 512
    head_timeout: float = 9.0
    """From the start of a connection, or the first byte of a later request, to the end of the request head."""
    write_timeout: float = 60.0
    """For a whole answer; longer than any usual scrape_timeout."""
    stall_timeout: float = 20.0
    """For a client that does not read while its answer waits."""
    idle_timeout: float = 150.0
    """Between two requests; longer than usual scrape intervals, so that Prometheus keeps its connection."""
    drain: float = 3.0
    """For running answers when the server stops."""
    write_buffer: int = 64 * 1024
    """Bytes in the process that wait for a slow client. At this limit nothing more is written; one write may exceed
    it."""
    send_buffer: int = 256 * 1024
    """Bytes in the kernel that wait for a slow client; Linux reserves twice as much."""
    receive_buffer: int = 64 * 1024
    """Bytes in the kernel of requests that have not been read."""
    head_bytes: int = 8190


class Connection(RequestHandler):
    """The protocol of one connection. `closed` is called once, after it has ended."""

    __slots__ = (
        "_allowed_sans",
        "_closed",
        "_closing_since",
        "_head_deadline",
        "_limits",
        "busy",
        "handshake",
        "waiting_since",
        "wire",
    )

    def __init__(
        self,
        manager: Server,
        limits: Limits,
        allowed_sans: frozenset[str],
        closed: Callable[[Connection], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=limits.idle_timeout,
            lingering_time=1.0,
            max_line_size=limits.head_bytes,
            max_field_size=limits.head_bytes,
            auto_decompress=False,  # no request body is ever read
            access_log=cast(Any, None),
        )
        self._limits = limits
        self._allowed_sans = allowed_sans
        self._closed = closed
        self._head_deadline: float | None = loop.time() + limits.head_timeout
        self._closing_since: float | None = None
        self.busy = False
        """A request is being answered."""
        self.waiting_since: float | None = None
        """Since when the answer waits for the client to read, or for a password check."""
        self.wire: asyncio.Transport | None = None
        self.handshake: asyncio.Task[None] | None = None
        """Until it is done `wire` is None."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast(asyncio.Transport, transport)
        self.wire.set_write_buffer_limits(high=self._limits.write_buffer)
        super().connection_made(transport)
        # ssl has verified the chain, not the names.
        if self._allowed_sans and self._allowed_sans.isdisjoint(names(self.wire.get_extra_info("peercert") or {})):
            log.get().warning("client_certificate_refused", reason="no allowed subject alternative name")
            self.wire.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._closed(self)

    def data_received(self, data: bytes) -> None:
        if not self.busy and self._head_deadline is None:
            self._head_deadline = self._loop.time() + self._limits.head_timeout
        super().data_received(data)

    @property
    def client(self) -> tuple[str, int]:
        """Address and port of the client."""
        peer = self.peername
        return (peer[0], peer[1]) if isinstance(peer, tuple) else ("", 0)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.waiting_since = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.waiting_since = None

    def begin(self) -> None:
        """A whole request head has arrived."""
        self.busy = True
        self._head_deadline = None

    def end(self) -> None:
        """The answer has been written; the next request may come."""
        self.busy = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The answer waits for a password check inside this context."""
        self.waiting_since = self._loop.time()
        try:
            yield
        finally:
            self.waiting_since = None

    def close_idle(self) -> None:
        """Close after everything is sent; only for a connection that is not busy."""
        if self.wire is not None:
            self.wire.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once, without sending the rest."""
        if self.wire is not None:
            if self.wire.get_write_buffer_size() and (sock := self.wire.get_extra_info("socket")) is not None:
                # The kernel drops what it still holds for a client that does not read.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wire.abort()
        elif self.handshake is not None:
            self.handshake.cancel()

    def overdue(self, now: float) -> bool:
        """Whether the client has used up its time for a request head, or for reading its answers."""
        if self.wire is not None and self.wire.is_closing():
            self._closing_since = self._closing_since or now
            return now - self._closing_since > self._limits.head_timeout
        return self.stalled(now) or (self._head_deadline is not None and now > self._head_deadline)

    def stalled(self, now: float) -> bool:
        """Whether the client has not read for too long."""
        return (
            self.writing_paused
            and self.waiting_since is not None
            and now - self.waiting_since > self._limits.stall_timeout
        )

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> StreamResponse:
        """Answer a bad request or an exception with its status only. Exceptions are logged, bad requests are not."""
        if status >= 500 and exc is not None and not isinstance(exc, ConnectionError):
            log.get().error("request_failed", path=request.path, error_type=type(exc).__name__, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so no other can be sent")
        response = Response(status=status, text=f"{HTTPStatus(status).phrase}\n", headers=SECURITY_HEADERS)
        response.force_close()
        return response


def names(certificate: dict[str, Any]) -> set[str]:
    """All subject alternative names of a peer certificate as `ssl` gives it; IP addresses in their shortest form."""
    found = set()
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "IP Address":
            try:
                value = str(ipaddress.ip_address(value.strip()))
            except ValueError:
                continue
        found.add(value)
    return found
