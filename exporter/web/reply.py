"""An answer as a value: handlers return it, the server sends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus

import msgspec

WRITE = 256 * 1024
"""Bytes of one write at most: many enough to be cheap, few enough not to delay others."""
WRITE_TLS = 64 * 1024
"""The same for TLS, of which several layers keep a copy for a slow client."""

SECURITY_HEADERS = {
    "Server": "blueking-exporter",  # without it the library writes its own name and version
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
NO_STORE = {"Cache-Control": "no-store"}
TEXT = "text/plain; charset=utf-8"


class Reply(msgspec.Struct, frozen=True):
    """Status, content type, further headers, and the body in chunks, iterated once.

    `length` is the size of the body in bytes, None when it is not known before it is sent.
    """

    status: int
    content_type: str
    body: Iterable[bytes]
    length: int | None
    headers: Mapping[str, str] = {}


def whole(status: int, content_type: str, body: bytes, headers: Mapping[str, str] = NO_STORE) -> Reply:
    """A reply with this body."""
    return Reply(status, content_type, (body,), len(body), headers)


def text(status: int, message: str = "", headers: Mapping[str, str] = NO_STORE) -> Reply:
    """A short plain answer; without a message the phrase of the status."""
    return whole(status, TEXT, f"{message or HTTPStatus(status).phrase}\n".encode(), headers)


def writes(chunks: Iterable[bytes], size: int = WRITE) -> Iterator[bytes | memoryview]:
    """The chunks, those above `size` bytes cut."""
    for chunk in chunks:
        if len(chunk) <= size:
            yield chunk
        else:
            view = memoryview(chunk)
            yield from (view[start : start + size] for start in range(0, len(chunk), size))
