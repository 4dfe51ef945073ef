"""The probes, the reload and the JSON for drill-down."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import get_args

import msgspec
from aiohttp.web_request import BaseRequest

from exporter.log import redact
from exporter.model import ScopeType
from exporter.status import Failures, Status
from exporter.web.reply import NO_STORE, Reply, text, whole

JSON = "application/json; charset=utf-8"
ROWS = 1000
"""Rows that are put into words in one go, in some 3 ms."""
_ID = re.compile("[1-9][0-9]{0,18}")


def healthy() -> Reply:
    """200 as long as the process can answer at all."""
    return text(200, "blueking-exporter is healthy")


def ready(is_ready: bool) -> Reply:
    """200 or 503."""
    return text(200, "ready") if is_ready else text(503, "not ready")


async def reload(enabled: bool, reload: Callable[[], Awaitable[Sequence[str]]]) -> Reply:
    """200 when the new configuration is in force, 403 when the lifecycle API is off, 500 with all errors."""
    if not enabled:
        return text(403, "reload is not enabled; start with --web.enable-lifecycle")
    errors = await reload()
    return text(500, "\n".join(errors)) if errors else text(200, "reloaded")


def status(value: Status) -> Reply:
    """GET /api/v1/status."""
    return whole(200, JSON, _redacted(value))


def failures(request: BaseRequest, failures: Callable[[str | None, str | None], Failures]) -> Reply:
    """GET /api/v1/failures?bk_scope_type=&bk_scope_id=; both optional, an empty one counts as absent."""
    asked: dict[str, str | None] = {"bk_scope_type": None, "bk_scope_id": None}
    for name, value in request.query.items():
        if name not in asked:
            return text(400, "known parameters: bk_scope_type, bk_scope_id")
        if asked[name] is not None:
            return text(400, f"{name} is given twice")
        asked[name] = value
    scope_type, scope_id = asked["bk_scope_type"] or None, asked["bk_scope_id"] or None
    if scope_type is not None and scope_type not in get_args(ScopeType):
        return text(400, f"bk_scope_type: want {', '.join(get_args(ScopeType))}")
    if scope_id is not None and not _ID.fullmatch(scope_id):
        return text(400, "bk_scope_id: want a positive number")
    return Reply(200, JSON, _chunks(failures(scope_type, scope_id)), None, NO_STORE)


def _chunks(found: Failures) -> Iterator[bytes]:
    """The JSON in pieces: between two of them the event loop serves others."""
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
    # Names and messages come from the platform; a secret that it gave back must not leave by this door.
    return redact(msgspec.json.encode(value).decode()).encode()
