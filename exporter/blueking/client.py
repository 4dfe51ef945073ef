"""Calls to BlueKing: credentials, retries, and the headers of responses.

Paths and data of the APIs are in job.py and others, the envelopes in envelope.py, rate limit and queue in pacing.py,
HTTP and TLS in transport.py. Retries are made here and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import msgspec
from yarl import URL

from exporter.blueking.envelope import CODES, NODEMGR_CODES, ResponseDecoder, read, request_ids
from exporter.blueking.pacing import Call, Deadline, Gate, RetryBudget
from exporter.blueking.transport import HttpTransport, Request, Transport
from exporter.clock import TOLERANCE, Clock
from exporter.config.schema import BlueKing, ScopeAuth
from exporter.config.secret import Secret
from exporter.errors import ApiError, ApiReason, Problem
from exporter.log import Logger, redact_values
from exporter.model import Scope

__all__ = ["ApiObserver", "Client", "Deadline", "Identity", "Operation", "ScopeClient", "System"]

T = TypeVar("T")

System = Literal["job", "nodeman", "nodeman_legacy", "nodemgr", "cmdb"]
"""A platform of `blueking` in the configuration. Error codes and pauses belong to one."""

Identity = Literal["app", "user", "esb"]
"""How a call is authenticated: app-type gateway resource, user-type gateway resource, or ESB component."""


class Operation(msgspec.Struct, frozen=True):
    """One API operation. `api` is the vendor's name; `params` go into the query of a GET or the JSON body of a POST.
    A param that is None is left out."""

    api: str
    system: System
    identity: Identity
    method: Literal["GET", "POST"]
    url: str
    params: Mapping[str, object]


_Credentials = tuple[dict[str, str], dict[str, str]]
"""The headers with the credentials, and the same as members for body or query, which an ESB may read instead."""

LARGE = 1024 * 1024
"""Bytes: a larger response is decoded in a thread."""
TRIES = 3
RETRIED: frozenset[ApiReason] = frozenset({"timeout", "connect", "http_5xx", "rate_limited"})
BACKOFF = 0.5
"""Seconds: the first retry waits a random time up to this, the second one up to twice that."""
LIMITED_PAUSE = 2.0
"""Seconds: after a 429 that does not say how long to wait, the API pauses for a random time up to this."""
MAX_PAUSE = 60.0
"""Seconds: the longest pause that the platform may ask for. Gateway limits count in windows of up to a minute; a longer
pause is treated as a mistake and shortened to this."""


class ApiObserver(Protocol):
    """Receives events about the requests of a client; `Telemetry` turns them into metrics."""

    def api_request(self, api: str, code: str, seconds: float) -> None:
        """A request ended after `seconds`. `code` is the HTTP status, `none` when no answer came."""

    def api_retry(self, api: str) -> None:
        """A request is about to be repeated."""

    def throttled(self, seconds: float) -> None:
        """A request waited `seconds` before it was sent, pauses of the platform included."""

    def inflight(self, delta: int) -> None:
        """A request began (1) or ended (-1)."""

    def quota(self, api: str, remaining: float) -> None:
        """The remaining quota that the gateway reports."""

    def skew(self, seconds: float) -> None:
        """Own wall clock minus the platform's."""


class Client:
    """Asks one BlueKing; an async context manager that owns the connections.

    All its calls share one rate limit, one number of slots and one retry budget. Entering it raises ConfigError when
    the TLS files cannot be used. `transport` replaces real connections.
    """

    def __init__(
        self, config: BlueKing, clock: Clock, observer: ApiObserver, log: Logger, transport: Transport | None = None
    ) -> None:
        self.config = config
        self._clock = clock
        self._observer = observer
        self._log = log
        self._gate = Gate(config.requests_per_second, config.max_concurrency, clock, observer.throttled)
        self._budget = RetryBudget(config.retry_budget, clock)
        self._transport = transport or HttpTransport(config)
        self._redacted: set[str] = set()
        self._secrets: tuple[str, ...] = ()
        self._made_credentials: dict[tuple[Identity, str | None, str | None], _Credentials] = {}

    async def __aenter__(self) -> Self:
        await self._transport.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def take_share(self, share: float) -> None:
        """Use this share of `requests_per_second`, above 0; others ask the same platform with the rest."""
        self._gate.set_rate(self.config.requests_per_second * share)

    @property
    def queued(self) -> int:
        """Calls that wait for nothing but a slot or the rate limit."""
        return self._gate.queued

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    def for_scope(self, scope: Scope | None, auth: ScopeAuth | None = None) -> ScopeClient:
        """The client of one scope, which asks with the user and tenant of `auth` where it names them."""
        return ScopeClient(self, scope, auth or ScopeAuth())

    async def refresh_tls(self) -> list[Problem]:
        """Use changed TLS files for new connections. Returns what is wrong with them; then the old ones stay in use."""
        return await self._transport.refresh_tls()

    async def call(
        self,
        operation: Operation,
        decoders: Sequence[ResponseDecoder[Any, T]],
        *,
        scope: Scope | None,
        auth: ScopeAuth,
        deadline: Deadline,
    ) -> T:
        """See `ScopeClient.call`."""
        call = Call(operation.api, operation.system, scope)
        before: ApiError | None = None
        self._budget.count_call()
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    value = await self._try(call, operation, decoders, auth, deadline)
                except ApiError as error:
                    # Callers keep errors for a while: their tracebacks would keep the response, maybe megabytes.
                    error.__traceback__ = error.__context__ = None
                    if before is not None and error.status is None and not self._time_for(error, deadline):
                        # BlueKing's own answer says more than "no time was left for a retry".
                        raise before from None
                    before = error
                    if attempt == TRIES or error.reason not in RETRIED:
                        raise
                    if not self._time_for(error, deadline):
                        raise
                    if not self._budget.allow(deadline.answered):
                        self._log.debug("api_retry_not_allowed", api=call.api, reason=error.reason, error=str(error))
                        raise
                    self._log.debug("api_retry", api=call.api, reason=error.reason, error=str(error))
                else:
                    deadline.answered += 1
                    return value
                self._observer.api_retry(call.api)
                await asyncio.sleep(random.uniform(0, BACKOFF * 2 ** (attempt - 1)))
            raise AssertionError("the last try returns or raises")
        finally:
            # Its traceback leads to this frame: a cycle, which would live until a full collection.
            before = None

    async def _try(
        self,
        call: Call,
        operation: Operation,
        decoders: Sequence[ResponseDecoder[Any, T]],
        auth: ScopeAuth,
        deadline: Deadline,
    ) -> T:
        """Try once. If it fails and BlueKing asks for a pause, that pause begins."""
        code = "none"
        received: Mapping[str, str] = {}

        def on_headers(status: int, headers: Mapping[str, str]) -> None:
            nonlocal code, received
            code, received = str(status), headers
            self._read_headers(call.api, headers)

        try:
            if deadline.remaining() <= 0:
                raise ApiError("timeout", "no time was left in this poll")
            async with self._gate.turn(call, deadline):
                seconds = min(self.config.request_timeout, deadline.remaining())
                # Secrets are read for each try, since their files may have changed.
                request = self._request(operation, auth)
                began = self._clock.monotonic()
                self._observer.inflight(1)
                try:
                    reply = await self._transport.send(request, seconds, on_headers)
                finally:
                    self._observer.inflight(-1)
                    self._observer.api_request(call.api, code, self._clock.monotonic() - began)
            codes = NODEMGR_CODES if call.system == "nodemgr" else CODES
            if len(reply.body) <= LARGE:
                return read(reply, decoders, codes)
            return await asyncio.to_thread(read, reply, decoders, codes)
        except ApiError as error:
            error.api = call.api
            error.request_id = error.request_id or request_ids(received)
            if error.status is not None:
                error.retry_after = pause = self._asked_pause(error.reason, received)
                if error.reason == "rate_limited":
                    pause = random.uniform(0, LIMITED_PAUSE) if pause is None else pause
                    self._gate.pause_api(call, pause)
                elif pause:
                    self._gate.pause_scope(call, pause, error.reason)
            raise

    def _time_for(self, error: ApiError, deadline: Deadline) -> bool:
        """Whether another try, after the requested pause, fits into the deadline."""
        return deadline.remaining() > (error.retry_after or 0.0)

    def _request(self, operation: Operation, auth: ScopeAuth) -> Request:
        headers, members = self._credentials(operation.identity, auth)
        params = {**operation.params, **members} if members else operation.params
        request = Request(operation.method, operation.url, headers, proxy=self._reveal(self.config.proxy_url) or None)
        if operation.method == "GET":
            request.query = {name: _query_text(value) for name, value in params.items() if value is not None}
        else:
            request.body = msgspec.json.encode({name: value for name, value in params.items() if value is not None})
            request.headers = headers | {"Content-Type": "application/json"}
        return request

    def _credentials(self, identity: Identity, scope_auth: ScopeAuth) -> _Credentials:
        """Those of a call. They are made once per identity, user and tenant, and again after a secret has changed."""
        auth = self.config.auth
        secrets = self._reveal(auth.app_secret), self._reveal(auth.access_token), self._reveal(auth.bk_token)
        if secrets != self._secrets:
            self._secrets = secrets
            self._made_credentials.clear()
        place = identity, scope_auth.username, scope_auth.tenant_id
        made = self._made_credentials.get(place)
        if made is None:
            made = self._made_credentials[place] = self._make_credentials(identity, scope_auth, *secrets)
        return made

    def _make_credentials(
        self, identity: Identity, scope_auth: ScopeAuth, app_secret: str, access_token: str, bk_token: str
    ) -> _Credentials:
        """The gateway passes on the user that X-Bkapi-Authorization names; JOB reads X-Bk-Username first where it can.
        Beside a token the gateway ignores `bk_username`, so app-type calls carry none.
        """
        auth = self.config.auth
        app = {"bk_app_code": auth.app_code, "bk_app_secret": app_secret}
        named = {"bk_username": scope_auth.username or auth.username}
        headers = {}
        if tenant_id := scope_auth.tenant_id or auth.tenant_id:
            headers["X-Bk-Tenant-Id"] = tenant_id
        if identity == "app":
            headers["X-Bkapi-Authorization"] = _json(app | named)
            headers["X-Bk-Username"] = named["bk_username"]
            return headers, {}
        user = {"bk_token": bk_token} if bk_token else named
        headers["X-Bkapi-Authorization"] = _json({"access_token": access_token} if access_token else app | user)
        if identity == "user":
            return headers, {}
        members = app | ({"bk_access_token": access_token} if access_token else user)
        return headers, _without_empty(members)

    def _reveal(self, secret: Secret | None) -> str:
        """The current value of a secret. From now on it is redacted in every log line."""
        value = secret.reveal() if secret else ""
        if value and value not in self._redacted:
            self._redacted.add(value)
            in_query = URL().with_query({"": value}).raw_query_string[1:]
            password = URL(value).password if secret is self.config.proxy_url else None
            redact_values([value, in_query, password or ""])
        return value

    def _read_headers(self, api: str, headers: Mapping[str, str]) -> None:
        """Read the platform's time and the quota from the headers of any response."""
        if (date := _date(headers.get("Date"))) is not None:
            self._learn_time(api, date)
            self._observer.skew(self._clock.skew)
        if (remaining := _number(headers.get("X-Bkapi-RateLimit-Remaining"))) is not None:
            self._observer.quota(api, remaining)

    def _learn_time(self, api: str, date: float) -> None:
        """Pass a Date to the clock, and log its verdict unless the Date only confirms the known time."""
        platform = self._clock.platform()
        verdict = self._clock.learn(date)
        if verdict == "known":
            return
        off = round(date - platform, 1)
        match verdict:
            case "first" if abs(off) > TOLERANCE:
                self._log.info("platform_clock_differs", api=api, seconds=off, consequence="windows use its clock")
            case "doubted":
                consequence = "ignored, unless the answers of a minute agree with it"
                self._log.warning("platform_date_doubted", api=api, seconds=off, consequence=consequence)
            case "believed":
                self._log.warning("platform_date_believed", api=api, seconds=off, consequence="windows use it")

    def _asked_pause(self, reason: ApiReason, headers: Mapping[str, str]) -> float | None:
        """Seconds of the pause that BlueKing asks for, at most `MAX_PAUSE`; None if it asks for none."""
        asked = headers.get("Retry-After")
        pause = _number(asked)
        if pause is None and (until := _date(asked)) is not None:
            pause = until - self._clock.platform()
        if pause is None and reason == "rate_limited":  # the gateway sends it with every response, good ones too
            pause = _number(headers.get("X-Bkapi-RateLimit-Reset"))
        return None if pause is None else min(max(pause, 0.0), MAX_PAUSE)


class ScopeClient:
    """Makes calls for one scope, or for no scope. Cheap to create: connections and limits belong to the `Client`."""

    def __init__(self, client: Client, scope: Scope | None, auth: ScopeAuth) -> None:
        self._client = client
        self._scope = scope
        self._auth = auth

    def call(
        self, operation: Operation, decoders: Sequence[ResponseDecoder[Any, T]], *, deadline: Deadline
    ) -> Awaitable[T]:
        """The data of the response, read by the first of `decoders` that fits.

        Failures that may pass are tried again inside `deadline` and the budget, `TRIES` times at most in all. Raises
        ApiError only.
        """
        return self._client.call(operation, decoders, scope=self._scope, auth=self._auth, deadline=deadline)


def _json(members: Mapping[str, str]) -> str:
    return json.dumps(_without_empty(members))


def _without_empty(members: Mapping[str, str]) -> dict[str, str]:
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
    """Unix seconds of an HTTP date. Cached, since all responses of one second have the same date."""
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None
