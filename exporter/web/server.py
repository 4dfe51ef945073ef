"""The web server: listeners, the path of one request, start and stop.

accept ─► connection ─► rate limit ─► user ─► route ─► Reply ─► writes of 256 kB; others are served between two writes
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

# Not aiohttp.web, which brings an application, a router and a runner that nothing here needs, at 35 ms of the start.
from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server

from exporter import log
from exporter.config import schema
from exporter.errors import ExporterError
from exporter.status import Status
from exporter.web import api
from exporter.web.connection import Connection, Limits
from exporter.web.pages.failures import failures
from exporter.web.pages.landing import landing
from exporter.web.query import QueryError
from exporter.web.reply import SECURITY_HEADERS, WRITE, WRITE_TLS, Reply, text, writes
from exporter.web.security import WebConfig, is_address, is_cross_site, requested_host

RESERVED_FILES = 32
"""Descriptors reserved for pollers, state and logs, for any number of clients."""
CHECK_CLIENTS = 1.0
"""Seconds between two checks for overdue clients."""
TRANSIENT = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,  # too many clients
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,  # this client
    }
)
"""Errors of accept() that pass by themselves."""
HTTP_READ = ("GET", "HEAD")
HEALTH = ("/-/healthy", "/-/ready")
PAGES = ("/", "/failures", *HEALTH, "/api/v1/status", "/api/v1/failures")


@dataclass(frozen=True)
class Backend:
    """What the web server needs from the rest of the process. None of these functions may block.

    `reload` returns the errors, none when the new configuration is in use.
    """

    exposition: api.Exposition
    status: Callable[[], Status]
    failures: api.FindFailures
    ready: Callable[[], bool]
    reload: Callable[[], Awaitable[Sequence[str]]]


def listen(addresses: Sequence[str]) -> list[socket.socket]:
    """Listening sockets for `HOST:PORT`, `[IPV6]:PORT` or `:PORT` (all addresses). ExporterError when taken."""
    opened: list[socket.socket] = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            if not host and socket.has_dualstack_ipv6():
                opened.append(_listen(socket.AF_INET6, ("::", int(port)), dualstack=True))
                continue
            found = socket.getaddrinfo(host or "0.0.0.0", int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            # A name may have several addresses; the IPv4 one is what people mean by localhost.
            family, _, _, _, target = min(found, key=lambda entry: entry[0] != socket.AF_INET)
            opened.append(_listen(family, target, dualstack=False))
        except OSError as error:
            for one in opened:
                one.close()
            raise ExporterError(f"cannot listen on {address}: {error.strerror or error}") from error
    return opened


def _listen(family: int, target: tuple[object, ...], *, dualstack: bool) -> socket.socket:
    return socket.create_server(target[:2], family=family, backlog=128, dualstack_ipv6=dualstack)


async def _readable(listener: socket.socket) -> None:
    """Wait until a connection can be accepted; cancelling `loop.sock_accept` could lose one that it has accepted."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)


class WebServer:
    """The state of one server: its connections and how to answer them."""

    def __init__(
        self,
        backend: Backend,
        settings: schema.Server | None = None,
        config: WebConfig | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._backend = backend
        self._settings = settings or schema.Server()
        self._config = config or WebConfig()
        self._limits = limits = limits or Limits()
        # A request ends with its connection: a client that left does not wait for a password check.
        self._manager = Server(self._handle, handler_cancellation=True)
        self._connections: dict[Connection, None] = {}  # in the order of their arrival
        self._gone = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._drained_by: float | None = None
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(4, min(limits.connections, files - RESERVED_FILES)) if files > 0 else limits.connections

    async def run(self, listeners: Sequence[socket.socket]) -> None:
        """Answer requests until cancelled; then stop accepting, give running answers what `drain` left of their time.

        What is left then is cut. The listeners are closed. Any other way out is a bug.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for listener in listeners:
                    tasks.create_task(self._accept(listener), name=f"accept {listener.getsockname()}")
                tasks.create_task(self._close_overdue(), name="overdue clients")
                tasks.create_task(self._config.follow(), name="web configuration")
        finally:
            for listener in listeners:
                listener.close()
            await self._drain()

    async def drain(self) -> None:
        """Wait until the answers that are running now have been sent, at most `limits.drain` seconds. New requests are
        still answered, so that a check of readiness gets its 503."""
        self._drained_by = asyncio.get_running_loop().time() + self._limits.drain
        running = {one for one in self._connections if one.busy}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain):
                # The end of one answer is no event, and this is short.
                while any(one.busy for one in running & self._connections.keys()):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    # ---- connections -------------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections until cancelled. When descriptors run out, close a connection, log it and wait."""
        listener.setblocking(False)
        while True:
            await _readable(listener)
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                log.get().warning("accept_failed", reason=errno.errorcode[error.errno])
                self._make_room()
                await asyncio.sleep(0.2)
                continue
            if len(self._connections) < self._most or self._make_room():
                self._open(client)
            else:
                log.get().warning("connections_exhausted", most=self._most)
                client.close()

    def _open(self, client: socket.socket) -> None:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.send_buffer)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._limits.receive_buffer)
        current = self._config.current
        connection = Connection(self._manager, self._limits, current.allowed_sans, self._forget)
        self._connections[connection] = None
        handshake = asyncio.get_running_loop().create_task(self._handshake(connection, client, current.tls))
        connection.handshake = handshake

        def failed(_: object) -> None:
            if connection.wire is None:
                client.close()
                self._forget(connection)

        handshake.add_done_callback(failed)

    async def _handshake(self, connection: Connection, client: socket.socket, tls: ssl.SSLContext | None) -> None:
        timeouts = {"ssl_handshake_timeout": self._limits.head_timeout, "ssl_shutdown_timeout": 1.0} if tls else {}
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, client, ssl=tls, **timeouts)
        except OSError as error:  # ssl.SSLError and TimeoutError are such, too
            log.get().debug("handshake_failed", message=str(error))

    def _forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        self._gone.set()

    def _make_room(self) -> bool:
        """Close the oldest idle connection, else the one whose answer has waited for the longest time.

        So neither silent clients nor clients that do not read can use up the connections.
        """
        waiting = [one for one in self._connections if one.waiting_since is not None]
        closable = next((one for one in self._connections if not one.busy), None) or min(
            waiting, key=lambda one: one.waiting_since or 0.0, default=None
        )
        if closable is None:
            return False
        closable.abort()
        self._forget(closable)
        return True

    async def _close_overdue(self) -> None:
        """Close the connections of clients that send a request head, or read their answers, too slowly."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_CLIENTS)
            now = loop.time()
            for connection in [one for one in self._connections if one.overdue(now)]:
                if connection.stalled(now):
                    log.get().warning("client_too_slow", timeout=self._limits.stall_timeout)
                connection.abort()

    async def _drain(self) -> None:
        """Close idle connections, wait for running answers, cut what is left."""
        self._manager.pre_shutdown()
        for connection in list(self._connections):
            if not connection.busy:
                connection.close_idle()
        left = self._limits.drain
        if self._drained_by is not None:  # `drain` may have used up the time
            left = max(0.0, self._drained_by - asyncio.get_running_loop().time())
        # Not `asyncio.timeout`: before Python 3.11.4 it raises CancelledError in a task that is being cancelled.
        try:
            await asyncio.wait_for(self._all_gone(), left)
        except TimeoutError:
            log.get().warning("connections_cut", connections=len(self._connections))
        for connection in list(self._connections):
            connection.abort()
        await self._manager.shutdown(timeout=0.1)

    async def _all_gone(self) -> None:
        while self._connections:
            self._gone.clear()
            await self._gone.wait()

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: BaseRequest) -> StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin()
        try:
            return await self._send(request, await self._reply(request, connection), connection)
        finally:
            connection.end()

    async def _reply(self, request: BaseRequest, connection: Connection) -> Reply:
        current = self._config.current
        if request.version not in (HttpVersion10, HttpVersion11):
            return text(400)
        if not current.limiter.allow():
            return text(429)
        if not self._host_allowed(request):
            return text(403, "this name is not in server.allowed_hosts")
        if current.users and not await self._admits(request, connection):
            return text(401, headers={"WWW-Authenticate": 'Basic realm="blueking-exporter", charset="UTF-8"'})
        try:
            return await self._route(request, connection)
        except QueryError as error:
            return text(400, str(error))

    def _host_allowed(self, request: BaseRequest) -> bool:
        allowed = self._settings.allowed_hosts
        if not allowed or request.path in HEALTH:
            return True
        host = requested_host(request)
        # A scraper may use an address that changes. An attack by DNS rebinding always uses a name.
        return host in allowed or (request.path == self._settings.telemetry_path and is_address(host))

    async def _admits(self, request: BaseRequest, connection: Connection) -> bool:
        if self._settings.health_without_auth and request.path in HEALTH:
            return True
        users, authorization = self._config.current.users, request.headers.get("Authorization")
        with connection.waiting():
            return await self._config.users.admits(authorization, users, connection.client)

    async def _alone(self, connection: Connection, answer: Callable[[], Awaitable[Reply]]) -> Reply:
        """One of these answers at a time: with tens of thousands of hosts each keeps a thread busy."""
        with connection.waiting():
            async with self._one_at_a_time:
                return await answer()

    async def _route(self, request: BaseRequest, connection: Connection) -> Reply:
        backend, settings = self._backend, self._settings
        path = request.path
        if path == "/-/reload":
            if request.method != "POST":
                return text(405, headers={"Allow": "POST"})
            if is_cross_site(request):
                return text(403, "a page of another site may not reload")
            return await asyncio.shield(api.reload(settings.enable_lifecycle, backend.reload))
        if path not in (*PAGES, settings.telemetry_path):
            return text(404)
        if request.method not in HTTP_READ:
            return text(405, headers={"Allow": ", ".join(HTTP_READ)})
        match path:
            case "/":
                return landing(request, backend.status(), settings.telemetry_path)
            case "/failures":
                return await self._alone(connection, lambda: failures(request, backend.failures))
            case "/-/healthy":
                return api.healthy()
            case "/-/ready":
                return api.ready(backend.ready())
            case "/api/v1/status":
                return api.status(backend.status())
            case "/api/v1/failures":
                return await self._alone(connection, lambda: api.failures(request, backend.failures))
            case _:
                return api.metrics(request, backend.exposition)

    async def _send(self, request: BaseRequest, reply: Reply, connection: Connection) -> StreamResponse:
        headers = {**SECURITY_HEADERS, **reply.headers, **self._config.current.headers}
        response = StreamResponse(status=reply.status, headers={**headers, "Content-Type": reply.content_type})
        if reply.length is not None:
            response.content_length = reply.length
        elif request.version < HttpVersion11:
            response.force_close()  # HTTP/1.0 has no other mark for the end of a body
        try:
            async with asyncio.timeout(self._limits.write_timeout):
                await response.prepare(request)
                if request.method != "HEAD":
                    for piece in writes(reply.body, WRITE_TLS if connection.ssl_context else WRITE):
                        await response.write(piece)
                        await asyncio.sleep(0)
                await response.write_eof()
                # Small answers are written without waiting. Before the next request of the connection is answered, the
                # client has to read.
                await request.writer.drain()
        except TimeoutError:
            log.get().warning("client_too_slow", path=request.path, timeout=self._limits.write_timeout)
            connection.abort()
            raise ConnectionResetError("the client did not take the answer in time") from None
        return response
