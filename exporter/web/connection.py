"""One connection: what it may cost, in time and memory.

aiohttp's parser and keep-alive do the work. Added here is what it does not do by itself: a deadline for request
heads, a bound on what is buffered for a slow reader, errors answered without a traceback and the library's version.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Callable
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
    """What clients may take. Durations in seconds."""

    connections: int = 512
    head_timeout: float = 9.0
    """From the first moment of a connection, or the first byte of a later request, to the end of the request head."""
    write_timeout: float = 60.0
    """For a whole answer; above every sensible scrape_timeout."""
    idle_timeout: float = 150.0
    """Between two requests; above the usual scrape intervals, so that Prometheus keeps its connection."""
    drain: float = 3.0
    """For running answers, once the server stops."""
    write_buffer: int = 128 * 1024
    """Bytes that wait in the process for a slow reader, beside the 256 kB of one write."""
    send_buffer: int = 256 * 1024
    """Bytes that wait in the kernel; it takes twice as much memory."""
    head_bytes: int = 8190


class Connection(RequestHandler):
    """The protocol of one connection. `closed` is called once, when it is gone."""

    __slots__ = ("_allowed_sans", "_closed", "_head_deadline", "_leaving", "_limits", "busy", "handshake", "wire")

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
            access_log=cast(Any, None),
        )
        self._limits = limits
        self._allowed_sans = allowed_sans
        self._closed = closed
        self._head_deadline: float | None = loop.time() + limits.head_timeout
        self._leaving: float | None = None
        self.busy = False
        self.wire: asyncio.Transport | None = None
        self.handshake: asyncio.Task[None] | None = None
        """Until it is done `wire` is None."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast(asyncio.Transport, transport)
        self.wire.set_write_buffer_limits(high=self._limits.write_buffer)
        super().connection_made(transport)
        # ssl has checked the chain; whose certificate it is may be asked only now.
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

    def begin(self) -> None:
        """A whole request head has arrived."""
        self.busy = True
        self._head_deadline = None

    def end(self) -> None:
        """The answer has been sent; the next request may come."""
        self.busy = False

    def close_idle(self) -> None:
        """Close once everything is sent; only for a connection that is not busy."""
        if self.wire is not None:
            self.wire.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Cut the connection at once, whatever is still to be sent."""
        if self.wire is not None:
            if self.wire.get_write_buffer_size() and (sock := self.wire.get_extra_info("socket")) is not None:
                # What the kernel still holds for a client that does not read goes with it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wire.abort()
        elif self.handshake is not None:
            self.handshake.cancel()

    def overdue(self, now: float) -> bool:
        """Whether the client has had its time: for a request head, or for taking the rest of the last answer."""
        if self.wire is not None and self.wire.is_closing():
            self._leaving = self._leaving or now
            return now - self._leaving > self._limits.head_timeout
        return self._head_deadline is not None and now > self._head_deadline

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> StreamResponse:
        """Answer what could not be read or handled with its status only; a bug is logged, a bad request is not."""
        if status >= 500 and exc is not None and not isinstance(exc, ConnectionError):
            log.get().error("request_failed", path=request.path, error_type=type(exc).__name__, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, another cannot follow")
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
