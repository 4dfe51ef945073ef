"""The one way in which BlueKing is asked: credentials, pace, deadline, retries, limits.

What an endpoint is called and how its data is read stands in job.py and others, what an envelope means in envelope.py.
Redirects are never followed: the app secret is in a header that libraries send on to any host.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import aiohttp
import msgspec
from yarl import URL

from exporter import __version__
from exporter.blueking.envelope import Reply, ResponseDecoder, read
from exporter.blueking.inflate import read_body
from exporter.blueking.pacing import Deadline, Gate
from exporter.blueking.text import clean_text
from exporter.clock import TOLERANCE, Clock
from exporter.config.schema import BlueKing, Tls
from exporter.config.secret import Secret
from exporter.errors import ApiError, ApiReason, ConfigError, Problem
from exporter.log import Logger, redact, redact_values

__all__ = ["ApiObserver", "Client", "Deadline", "Identity"]

T = TypeVar("T")

Identity = Literal["app", "user", "esb"]
"""How a call says who asks: app-type gateway resource, user-type gateway resource, or ESB component."""

LARGE = 1024 * 1024
"""Bytes: a larger answer is decoded in a thread."""
TRIES = 3
RETRIED: frozenset[ApiReason] = frozenset({"timeout", "connect", "http_5xx", "rate_limited"})
BACKOFF = 0.5
"""Seconds: a retry waits a random time up to this, then up to twice that. Short, since a poll comes again by itself."""
LIMITED_BACKOFF = 2.0
"""The same after a 429 that does not say how long to wait."""
MAX_PAUSE = 60.0
"""Seconds: the longest wait that the platform may ask for. Gateway limits count in windows of up to a minute; more is
taken for a mistake, and the first request after the pause finds out."""


class ApiObserver(Protocol):
    """What the client tells about its requests; `Telemetry` makes metrics of it."""

    def api_request(self, api: str, code: str, seconds: float) -> None:
        """A request ended after so long. `code` is the HTTP status, `none` when no answer came."""

    def api_retry(self, api: str) -> None:
        """A request is about to be repeated."""

    def throttled(self, seconds: float) -> None:
        """A request waited so long for its turn, or because the platform asked for it."""

    def inflight(self, delta: int) -> None:
        """A request began (1) or ended (-1)."""

    def quota(self, api: str, remaining: float) -> None:
        """What the gateway says is left of its quota."""

    def skew(self, seconds: float) -> None:
        """Own wall clock minus the platform's."""


class Client:
    """Asks one BlueKing platform; an async context manager that owns the connections.

    One request budget and one number of slots hold for everything that is asked through it.
    """

    def __init__(self, config: BlueKing, clock: Clock, observer: ApiObserver, log: Logger) -> None:
        self._config = config
        self._clock = clock
        self._observer = observer
        self._log = log
        self._gate = Gate(config.requests_per_second, config.max_concurrency, clock, observer.throttled)
        self._redacted: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Raises ConfigError when the TLS files cannot be used."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._config.max_concurrency, ssl=_tls(self._config.tls)),
            timeout=aiohttp.ClientTimeout(total=None),  # the whole request has its own, see _exchange
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            middlewares=(_send_once,),
            headers={
                "User-Agent": f"blueking-exporter/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
            },
        )
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self,
        api: str,
        method: Literal["GET", "POST"],
        url: str,
        params: Mapping[str, object],
        decoders: Sequence[ResponseDecoder[Any, T]],
        *,
        identity: Identity,
        deadline: Deadline,
    ) -> T:
        """The data of an answer, read by the first of `decoders` that fits.

        `api` is the vendor's name of the operation. `params` go into the query of a GET, into the JSON body of a POST;
        None is left out. What may pass is tried up to `TRIES` times inside `deadline`. Raises ApiError only.
        """
        # Made anew for each try: a secret may have been changed meanwhile.
        request = partial(self._request, method, url, params, identity)
        answered: ApiError | None = None
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    return await self._attempt(api, request, decoders, deadline)
                except ApiError as error:
                    error.api = api
                    if error.reason == "timeout" and answered is not None and deadline.remaining() <= 0:
                        # What the platform said tells more than that no time was left to ask again.
                        raise answered from None
                    answered = error
                    wait = self._wait_after(error, attempt)
                    if attempt == TRIES or error.reason not in RETRIED or wait >= deadline.remaining():
                        raise
                    if error.retry_after is not None:
                        self._observer.throttled(wait)
                    self._log.debug("api_retry", api=api, reason=error.reason, error=str(error), wait=round(wait, 3))
                self._observer.api_retry(api)
                await asyncio.sleep(wait)
            raise AssertionError("the last try returns or raises")
        finally:
            # Its traceback leads to this frame, and holds the answer: megabytes, until somebody collects garbage.
            answered = None

    def _wait_after(self, error: ApiError, attempt: int) -> float:
        """Seconds to the next try, with full jitter. What the platform asks for holds for all who ask it."""
        limited = error.reason == "rate_limited"
        first = LIMITED_BACKOFF if limited and error.retry_after is None else BACKOFF
        wait = (error.retry_after or 0) + random.uniform(0, first * 2 ** (attempt - 1))
        if error.status is not None and (limited or error.retry_after):
            self._gate.pause(wait)
        return wait

    async def _attempt(
        self,
        api: str,
        request: Callable[[], dict[str, Any]],
        decoders: Sequence[ResponseDecoder[Any, T]],
        deadline: Deadline,
    ) -> T:
        async with self._gate.turn(deadline):
            seconds = min(self._config.request_timeout, deadline.remaining())
            if seconds <= 0:
                raise ApiError("timeout", "no time was left in this poll")
            reply = await self._exchange(api, request(), seconds)
        try:
            if len(reply.body) <= LARGE:
                return read(reply, decoders)
            return await asyncio.to_thread(read, reply, decoders)
        except ApiError as error:
            error.retry_after = self._asked_wait(error.reason, reply.headers)
            raise

    async def _exchange(self, api: str, request: dict[str, Any], seconds: float) -> Reply:
        """One request and its whole answer, within so many seconds."""
        assert self._session is not None, "the client is not entered"
        limit = self._config.max_response_bytes
        status: int | None = None
        began = self._clock.monotonic()
        self._observer.inflight(1)
        try:
            async with asyncio.timeout(seconds), self._session.request(**request) as response:
                status, headers = response.status, response.headers
                self._read_headers(api, headers)
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
            BrokenConnection,
        ) as error:
            # `from None`: the cause holds the request with its headers, and its text may hold the URL with its query.
            raise ApiError(_reason_of(error, status), _text_of(error, seconds), status=status) from None
        finally:
            self._observer.inflight(-1)
            self._observer.api_request(api, str(status or "none"), self._clock.monotonic() - began)
        return Reply(status, body, headers)

    def _request(self, method: str, url: str, params: Mapping[str, object], identity: Identity) -> dict[str, Any]:
        headers, members = self._credentials(identity)
        given = {name: value for name, value in {**params, **members}.items() if value is not None}
        request: dict[str, Any] = {
            "method": method,
            "url": url,
            "headers": headers,
            "allow_redirects": False,
            "server_hostname": self._config.tls.server_name,
            "proxy": self._reveal(self._config.proxy_url) or None,
        }
        if method == "GET":
            request["params"] = {name: _query_text(value) for name, value in given.items()}
        else:
            request["data"] = msgspec.json.encode(given)
            headers["Content-Type"] = "application/json"
        return request

    def _credentials(self, identity: Identity) -> tuple[dict[str, str], dict[str, str]]:
        """The headers that say who asks, and the members for the body or query of an ESB that ignores the header."""
        auth = self._config.auth
        app = {"bk_app_code": auth.app_code, "bk_app_secret": self._reveal(auth.app_secret)}
        access_token, bk_token = self._reveal(auth.access_token), self._reveal(auth.bk_token)
        user = {"bk_token": bk_token} if bk_token else {"bk_username": auth.username}
        said = {"access_token": access_token} if access_token else app if identity == "app" else app | user
        headers = {"X-Bkapi-Authorization": json.dumps(_filled(said))}
        if identity == "app" and auth.username:
            headers["X-Bk-Username"] = auth.username
        if auth.tenant_id:
            headers["X-Bk-Tenant-Id"] = auth.tenant_id
        members = app | ({"bk_access_token": access_token} if access_token else user) if identity == "esb" else {}
        return headers, _filled(members)

    def _reveal(self, secret: Secret | None) -> str:
        """The value of this moment; from now on no log line and no error text shows it."""
        value = secret.reveal() if secret else ""
        if value and value not in self._redacted:
            self._redacted.add(value)
            in_query = URL().with_query({"": value}).raw_query_string[1:]
            password = URL(value).password if secret is self._config.proxy_url else None
            redact_values([value, in_query, password or ""])
        return value

    def _read_headers(self, api: str, headers: Mapping[str, str]) -> None:
        """Take what the headers of any answer tell: the platform's time and the quota."""
        if (date := _date(headers.get("Date"))) is not None:
            self._learn_time(api, date)
            self._observer.skew(self._clock.skew)
        if (remaining := _number(headers.get("X-Bkapi-RateLimit-Remaining"))) is not None:
            self._observer.quota(api, remaining)

    def _learn_time(self, api: str, date: float) -> None:
        """Give a Date to the clock, and log what it makes of it unless that is what was known."""
        off = round(date - self._clock.platform(), 1)
        match self._clock.learn(date):
            case "first" if abs(off) > TOLERANCE:
                self._log.info("platform_clock_differs", api=api, seconds=off, consequence="windows use its clock")
            case "doubted":
                consequence = "ignored, unless the answers of a minute agree with it"
                self._log.warning("platform_date_doubted", api=api, seconds=off, consequence=consequence)
            case "believed":
                self._log.warning("platform_date_believed", api=api, seconds=off, consequence="windows use it")

    def _asked_wait(self, reason: ApiReason, headers: Mapping[str, str]) -> float | None:
        """Seconds for which the platform asks us to stay away, at most `MAX_PAUSE`."""
        wait = None
        if reason in {"rate_limited", "http_5xx"}:
            asked = headers.get("Retry-After")
            wait = _number(asked)
            if wait is None and (until := _date(asked)) is not None:
                wait = until - self._clock.platform()
        if wait is None and reason == "rate_limited":  # the gateway sends it with every answer, good ones too
            wait = _number(headers.get("X-Bkapi-RateLimit-Reset"))
        return None if wait is None else min(max(wait, 0.0), MAX_PAUSE)


def _filled(members: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in members.items() if value}


def _query_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@lru_cache(maxsize=8)
def _date(text: str | None) -> float | None:
    """Unix seconds of an HTTP date. All answers of a second have the same."""
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _tls(tls: Tls) -> ssl.SSLContext | bool:
    if tls == Tls():
        return True  # the library has made this very context; another takes as long as all of our own modules
    files = ", ".join(str(file) for file in (tls.ca_file, tls.cert_file, tls.key_file) if file)
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError([Problem(files, 0, 0, "blueking.tls", f"cannot be used: {error}")]) from error
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class BrokenConnection(Exception):
    """A connection that broke under a request."""


async def _send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Hide a broken connection from aiohttp, which would send a GET again by itself: past the budget, and uncounted."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise BrokenConnection(str(error)) from error.__cause__


def _reason_of(error: Exception, status: int | None) -> ApiReason:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        return "tls"
    if isinstance(error, aiohttp.ClientHttpProxyError) or status is not None:
        return "connect"  # the proxy refused, or the answer broke off
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.http.HttpProcessingError):
        return "decode"  # what came is not HTTP
    return "connect"


def _text_of(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no complete answer within {seconds:.3g} s"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.http.HttpProcessingError):
        text = error.message  # str() would show the URL
    else:
        text = str(error)
    return clean_text(redact(f"{type(error).__name__}: {text}"))
