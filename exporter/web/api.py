"""The answers for programs: /metrics, the health checks, the reload and the JSON of /api/v1."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import msgspec
from aiohttp.web_request import BaseRequest

from exporter.log import redact
from exporter.metrics.negotiate import Format, negotiate
from exporter.status import FailureFilter, Failures, Status
from exporter.web.query import failure_filter, parameters
from exporter.web.reply import NO_STORE, Reply, text, whole

JSON = "application/json; charset=utf-8"
MOST_NAMES = 100
"""Values of `name[]` that one request may have."""
NUMBERS = frozenset({"bk_host_id", "bk_scope_id"})
"""Members that hold a number as text, which may look like a secret of digits."""
ROWS = 1000
"""Rows that are encoded at once, in about 3 ms."""


class Answer(Protocol):
    """The bytes of one exposition, to be iterated once; `length` in bytes where it is known before."""

    @property
    def length(self) -> int | None: ...

    def __iter__(self) -> Iterator[bytes]: ...


Exposition = Callable[[Format, frozenset[str] | None, bool], Answer]
"""(format, names or None for everything, gzip) → the page and the exporter's own metrics."""
FindFailures = Callable[[FailureFilter], Awaitable[Failures]]


def metrics(request: BaseRequest, exposition: Exposition) -> Reply:
    """The exposition in the format that the scraper prefers; 400 for more than 100 `name[]`."""
    names = request.query.getall("name[]", [])
    if len(names) > MOST_NAMES:
        return text(400, f"at most {MOST_NAMES} name[] are allowed")
    form, gzip = negotiate(
        ",".join(request.headers.getall("Accept", [])), ",".join(request.headers.getall("Accept-Encoding", []))
    )
    answer = exposition(form, frozenset(names) if names else None, gzip)
    headers = {"Vary": "Accept, Accept-Encoding"} | ({"Content-Encoding": "gzip"} if gzip else {})
    return Reply(200, form.value, answer, answer.length, headers)


def healthy() -> Reply:
    """200 as long as the process can answer at all."""
    return text(200, "blueking-exporter is healthy")


def ready(is_ready: bool) -> Reply:
    """200 or 503."""
    return text(200, "ready") if is_ready else text(503, "not ready")


async def reload(enabled: bool, reload: Callable[[], Awaitable[Sequence[str]]]) -> Reply:
    """200 when the new configuration is in use, 403 when the reload is not enabled, 500 with all errors."""
    if not enabled:
        return text(403, "reload is not enabled; start with --web.enable-lifecycle")
    errors = await reload()
    return text(500, "\n".join(errors)) if errors else text(200, "reloaded")


def status(value: Status) -> Reply:
    """GET /api/v1/status."""
    if len(value.pollers) <= ROWS:
        return whole(200, JSON, b"".join(_status(value)))
    return Reply(200, JSON, _status(value), None, NO_STORE)


def _status(value: Status) -> Iterator[bytes]:
    """The JSON in pieces; the event loop serves others in between."""
    head = _redacted(msgspec.structs.replace(value, pollers=()))
    yield head.removesuffix(b"]}")
    yield from _rows(value.pollers)
    yield b"]}"


async def failures(request: BaseRequest, find: FindFailures) -> Reply:
    """GET /api/v1/failures?bk_scope_type=&bk_scope_id=; both optional, an empty one counts as absent."""
    wanted = failure_filter(parameters(request, ("bk_scope_type", "bk_scope_id")))
    return Reply(200, JSON, _chunks(await find(wanted)), None, NO_STORE)


def _chunks(found: Failures) -> Iterator[bytes]:
    """The JSON in pieces; the event loop serves others in between."""
    yield b'{"executions":['
    yield from _rows(found.executions)
    yield b'],"hosts":['
    yield from _rows(found.hosts)
    yield b"]}"


def _rows(rows: Iterable[msgspec.Struct]) -> Iterator[bytes]:
    waiting, comma = iter(rows), b""
    while some := list(islice(waiting, ROWS)):
        yield comma + _redacted(some)[1:-1]
        comma = b","


def _redacted(value: msgspec.Struct | list[msgspec.Struct]) -> bytes:
    """JSON without secrets: names and messages come from the platform, which may repeat one."""
    encoded = msgspec.json.encode(value)
    text = encoded.decode()
    if redact(text) == text:
        return encoded
    # A secret of digits would match numbers too, so texts are redacted one by one.
    return msgspec.json.encode(_redact_texts(msgspec.to_builtins(value)))


def _redact_texts(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: member if name in NUMBERS else _redact_texts(member) for name, member in value.items()}
    return [_redact_texts(item) for item in value] if isinstance(value, list | tuple) else value
