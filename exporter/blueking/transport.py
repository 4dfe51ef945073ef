"""Requests to BlueKing over HTTP: connections, TLS, limits, and every failure translated to an `ApiError`.

Redirects are never followed, and nothing is sent twice: the app secret is in a header, and each request is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult

from exporter import __version__
from exporter.blueking.envelope import Reply
from exporter.blueking.inflate import read_body
from exporter.blueking.text import clean_text
from exporter.config.files import stamp
from exporter.config.schema import BlueKing
from exporter.config.tls import TlsFileError, client_context
from exporter.errors import ApiError, ApiReason, ConfigError, Problem

MAX_HEADER = 64 * 1024
"""Bytes of one response header; some gateways put whole permission requests into headers."""
MAX_HEADERS = 1024
DNS_TTL = 10.0
"""Seconds for which the addresses of a name are used without looking it up again."""
BROKEN_HANDSHAKE = "the connection broke during the TLS handshake"
NOT_CONFIRMED = (
    "the server closed the connection before it confirmed the TLS handshake; it may demand a client certificate, or "
    "refuse the one that was sent (blueking.tls.cert_file)"
)


class Request(msgspec.Struct):
    """One request. `query` is added to the URL; `proxy` is the URL of an HTTP proxy."""

    method: str
    url: str
    headers: dict[str, str]
    query: dict[str, str] = {}
    body: bytes | None = None
    proxy: str | None = None


LookUp = Callable[..., Sequence[tuple[socket.AddressFamily, Any, int, Any, tuple[Any, ...]]]]
OnHeaders = Callable[[int, Mapping[str, str]], None]
"""Called with the HTTP status and the headers as soon as they have arrived."""


class Transport(Protocol):
    """Sends requests, and owns the connections."""

    async def open(self) -> None:
        """Raises ConfigError when the TLS files cannot be used."""

    async def close(self) -> None:
        """Close the connections."""

    async def send(self, request: Request, seconds: float, on_headers: OnHeaders) -> Reply:
        """Send one request and read the whole response within `seconds`. Raises ApiError only."""

    async def refresh_tls(self) -> list[Problem]:
        """Use changed TLS files for new connections. Returns what is wrong with them; then the old ones stay."""


class HttpTransport:
    """`Transport` over real connections.

    `look_up` behaves like `socket.getaddrinfo`; the addresses it finds are used for `dns_ttl` seconds.
    """

    def __init__(self, config: BlueKing, *, look_up: LookUp = socket.getaddrinfo, dns_ttl: float = DNS_TTL) -> None:
        self._config = config
        self._look_up = look_up
        self._dns_ttl = dns_ttl
        self._tls: ssl.SSLContext | bool = True
        self._stamps: list[tuple[int, ...]] | None = None
        self._problems: list[Problem] = []
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        if problems := await self.refresh_tls():
            raise ConfigError(problems)
        self._connector = _Connector(
            limit=self._config.max_concurrency, resolver=_Resolver(self._look_up), ttl_dns_cache=self._dns_ttl
        )
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            timeout=aiohttp.ClientTimeout(total=None),  # `send` has its own, for the whole request
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            middlewares=(self._send_once,),
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            max_headers=MAX_HEADERS,
            headers={
                "User-Agent": f"blueking-exporter/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
            },
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, request: Request, seconds: float, on_headers: OnHeaders) -> Reply:
        assert self._session is not None, "the transport is not open"
        limit = self._config.max_response_bytes
        status: int | None = None
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(
                    request.method,
                    request.url,
                    headers=request.headers,
                    params=request.query,
                    data=request.body,
                    proxy=request.proxy,
                    ssl=self._tls,
                    server_hostname=self._config.tls.server_name,
                    allow_redirects=False,
                ) as response,
            ):
                status, headers = response.status, response.headers
                on_headers(status, headers)
                if (response.content_length or 0) > limit:
                    raise ApiError("too_large", f"{response.content_length} bytes announced, {limit} are allowed")
                body = await read_body(response.content.iter_any(), headers.get("Content-Encoding", ""), limit)
        except ApiError as error:
            error.status = status
            raise
        except (
            TimeoutError,
            OSError,
            aiohttp.ClientError,
            aiohttp.http.HttpProcessingError,
            _BrokenConnection,
            _TlsFailure,
        ) as error:
            # `from None`: the cause holds the request with its headers, and its text may hold the URL with its query.
            reason, text = _classify(error, status, seconds, tls=request.url.startswith("https:"))
            raise ApiError(reason, clean_text(text), status=status) from None
        return Reply(status, body, headers)

    async def refresh_tls(self) -> list[Problem]:
        tls = self._config.tls
        files = tuple(file for file in (tls.ca_file, tls.cert_file, tls.key_file) if file)
        if files or tls.insecure_skip_verify:
            stamps = await asyncio.to_thread(lambda: [stamp(file) for file in files])
            if stamps != self._stamps or self._problems:
                self._stamps = stamps
                try:
                    # A new context is another key of the connection pool, so new requests make new connections.
                    self._tls = await asyncio.to_thread(client_context, tls)
                    self._problems = []
                except TlsFileError as error:
                    file = str(getattr(tls, error.key))
                    self._problems = [Problem(file, 0, 0, f"blueking.tls.{error.key}", str(error))]
        return self._problems

    async def _send_once(
        self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Hide a broken connection from aiohttp, which would send a GET again by itself, uncounted and at once."""
        try:
            response = await send(request)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if self._connector.handshake_was_confirmed(request):
                raise _BrokenConnection(str(error)) from error.__cause__
            raise _TlsFailure(NOT_CONFIRMED) from error.__cause__
        self._connector.answered(request)
        return response


class _Connector(aiohttp.TCPConnector):
    """Remembers on which connection a request is sent.

    With TLS 1.3 the client's part of the handshake ends before the server has looked at the client certificate. The
    server confirms the handshake by a session ticket, or at the latest by an answer.
    """

    def __init__(self, *, limit: int, resolver: AbstractResolver, ttl_dns_cache: float) -> None:
        super().__init__(limit=limit, resolver=resolver, ttl_dns_cache=ttl_dns_cache)  # type: ignore[arg-type]
        self._unconfirmed: WeakKeyDictionary[aiohttp.ClientRequest, ssl.SSLObject] = WeakKeyDictionary()
        self._answered: WeakSet[ssl.SSLObject] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 (the library's signature)
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        tls = connection.transport.get_extra_info("ssl_object") if connection.transport else None
        if tls is not None and tls.version() == "TLSv1.3" and tls not in self._answered:
            self._unconfirmed[req] = tls
        return connection

    def answered(self, request: aiohttp.ClientRequest) -> None:
        """The server has answered this request."""
        if (tls := self._unconfirmed.pop(request, None)) is not None:
            self._answered.add(tls)

    def handshake_was_confirmed(self, request: aiohttp.ClientRequest) -> bool:
        """Whether the connection of this request has broken for another reason than its TLS handshake."""
        tls = self._unconfirmed.pop(request, None)
        return tls is None or (tls.session is not None and tls.session.has_ticket)


class _Resolver(AbstractResolver):
    """Looks names up in daemon threads: a name server that is silent does not delay the end of the process.

    The connector looks a name up once, however many requests wait for it.
    """

    def __init__(self, look_up: LookUp) -> None:
        self._look_up = look_up

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[ResolveResult]] = loop.create_future()

        def settle(result: list[ResolveResult] | OSError) -> None:
            if found.done():
                return
            if isinstance(result, OSError):
                found.set_exception(result)
            else:
                found.set_result(result)

        def look_up() -> None:
            result: list[ResolveResult] | OSError
            try:
                result = _addresses(self._look_up, host, port, family)
            except OSError as error:
                result = error
            except UnicodeError as error:
                result = OSError(f"no valid host name: {error}")
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                loop.call_soon_threadsafe(settle, result)

        threading.Thread(target=look_up, name=f"resolve {host}", daemon=True).start()
        return await found

    async def close(self) -> None:
        """Nothing is kept."""


def _addresses(look_up: LookUp, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found: list[ResolveResult] = []
    for kind, _, proto, _, address in look_up(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG):
        name = str(address[0])
        if len(address) == 4 and address[3] and "%" not in name:
            name = f"{name}%{address[3]}"  # a link-local address is valid on one interface only
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        found.append(ResolveResult(hostname=host, host=name, port=port, family=kind, proto=proto, flags=flags))
    return found


class _BrokenConnection(Exception):
    """A connection broke after its handshake."""


class _TlsFailure(Exception):
    """A TLS handshake failed at its end."""


def _classify(error: Exception, status: int | None, seconds: float, *, tls: bool) -> tuple[ApiReason, str]:
    """The reason and what to tell people. `status` is None when no response has begun; `tls`: the URL is https."""
    if isinstance(error, TimeoutError):
        return "timeout", f"no complete answer within {seconds:.3g} s"
    if isinstance(error.__cause__, ssl.SSLError):
        return "tls", _tls_text(error.__cause__)
    if isinstance(error, _TlsFailure):
        return "tls", str(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        where, cause = f"{error.host}:{error.port}", error.os_error
        # A connection that is not established yet can be refused, but not reset.
        if tls and isinstance(cause, ConnectionResetError | BrokenPipeError | ConnectionAbortedError):
            return "tls", f"{BROKEN_HANDSHAKE} with {where}"
        return "connect", f"cannot connect to {where}: {cause.strerror or cause}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return "connect", f"the proxy answered {error.status} {error.message}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.http.HttpProcessingError):
        # `message` alone: str() would show the URL.
        return ("connect" if status is not None else "decode"), f"{type(error).__name__}: {error.message}"
    return "connect", f"{type(error).__name__}: {error}"


def _tls_text(error: ssl.SSLError) -> str:
    """What went wrong in the words of OpenSSL, without its codes and source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {error.verify_message}"
    text = str(error.args[-1]) if error.args else type(error).__name__
    return text.partition("] ")[2].partition(" (_ssl.c")[0] or text
