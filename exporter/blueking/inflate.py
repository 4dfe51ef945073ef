"""Response bodies within a limit, before and after inflating.

The HTTP library would inflate a whole chunk at once: 200 KB of gzip became 200 MB in one call. Here output comes in
steps, the limit is checked after each, and the event loop gets a turn in between.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterable, Iterator

from exporter.errors import ApiError

STEP = 256 * 1024
"""Bytes inflated between two checks of the limit."""


async def read_body(chunks: AsyncIterable[bytes], encoding: str, limit: int) -> bytearray:
    """The whole body, inflated. `limit` (bytes) holds for the received bytes and for the inflated bytes.

    `encoding` is the Content-Encoding: empty, identity, gzip or deflate (with or without zlib header). Anything else is
    refused, also a list of encodings. Raises ApiError `too_large` or `decode`.
    """
    inflater = _inflater(encoding.strip().lower())
    body = bytearray()
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > limit:
            raise ApiError("too_large", f"more than {limit} bytes")
        if inflater is None:
            body += chunk
            continue
        try:
            for piece in inflater.feed(chunk):
                if len(body) + len(piece) > limit:
                    raise ApiError("too_large", f"more than {limit} bytes after inflating")
                body += piece
                await asyncio.sleep(0)
        except zlib.error:
            raise ApiError("decode", f"broken {encoding} body") from None
    if inflater is not None and not inflater.complete:
        raise ApiError("decode", f"truncated {encoding} body")
    return body


def _inflater(encoding: str) -> _Inflater | None:
    if encoding in {"", "identity"}:
        return None
    if encoding in {"gzip", "x-gzip"}:
        return _Inflater(16 + zlib.MAX_WBITS)
    if encoding == "deflate":
        return _Inflater(None)
    raise ApiError("decode", "a Content-Encoding that was not asked for")


class _Inflater:
    """Inflates gzip with any number of members, or deflate. `wbits` None: the first two bytes show the kind of
    deflate."""

    def __init__(self, wbits: int | None) -> None:
        self._wbits = wbits
        self._stream: zlib._Decompress | None = None
        self._head = b""

    @property
    def complete(self) -> bool:
        """Whether the stream ended where a member ends, or has not begun."""
        return self._stream is None and not self._head

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The inflated `data`, in pieces of at most `STEP` bytes."""
        if self._wbits is None:
            self._head += data
            if len(self._head) < 2:
                return
            data, self._head = self._head, b""
            zlib_header = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
            self._wbits = zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS
        full = False
        while data or full:
            if self._stream is None:
                self._stream = zlib.decompressobj(self._wbits)
            piece = self._stream.decompress(data, STEP)
            full = len(piece) == STEP  # there may be more output although all input has been read
            data = self._stream.unconsumed_tail
            if self._stream.eof:
                data, full, self._stream = self._stream.unused_data, False, None
            yield piece
