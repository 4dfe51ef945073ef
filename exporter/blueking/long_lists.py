"""Long lists of an answer, taken out of it before it is decoded and kept compressed.

One answer of JOB may hold a row for each of a million hosts: 100 MB of JSON, several times that as objects, and one
call of the decoder that blocks the event loop for as long as it takes. Cut into pieces, such a list takes some MB, and
each piece is decoded in a few milliseconds.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import msgspec
from isal import isal_zlib
from msgspec import Raw

PIECE = 256 * 1024
"""Bytes of JSON in a piece, roughly."""
TRIES = 32
"""Cutting is given up after this many places in a row that look like the end of a piece and are not."""
SPACE = 64
"""Most bytes of white space that are accepted between the last row of a list and its end."""

_BETWEEN_ROWS = re.compile(rb"\}\s*(?=,\s*\{)")
_AFTER_LAST_ROW = re.compile(rb"\}\s*(?=\])")
_COMMA = re.compile(rb"\s*,\s*")
_array: msgspec.json.Decoder[list[Raw]] = msgspec.json.Decoder(list[Raw])


class LongList:
    """The rows of a member `name`, kept as compressed JSON arrays of a few thousand rows each."""

    __slots__ = ("_lengths", "_pieces", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._pieces: list[bytes] = []
        self._lengths: list[int] = []

    def add(self, array: bytes, length: int) -> None:
        """Append an array of `length` rows."""
        self._pieces.append(isal_zlib.compress(array, 1))
        self._lengths.append(length)

    def __len__(self) -> int:
        return sum(self._lengths)

    def arrays(self) -> Iterator[tuple[int, bytes]]:
        """The arrays in their order, each with the number of rows before it."""
        for before, piece in zip(itertools.accumulate(self._lengths, initial=0), self._pieces, strict=False):
            yield before, isal_zlib.decompress(piece)

    def arrays_backwards(self) -> Iterator[bytes]:
        """The arrays, the last one first."""
        for piece in reversed(self._pieces):
            yield isal_zlib.decompress(piece)


def count_rows(name: str, array: bytes) -> int:
    """The number of rows in an array, whatever they are. Raises the errors of msgspec."""
    return len(_array.decode(array))


def cut_out(
    body: bytes | bytearray,
    members: Iterable[str],
    row: Callable[[int], bytes],
    count: Callable[[str, bytes], int] = count_rows,
) -> tuple[bytes, list[LongList]] | None:
    """Take the long lists of objects out of a body: the lists under one of the names `members`.

    Returns the body with a single row in place of each list, and the lists. `row` makes that row, as JSON, from the
    number of the list. `count` counts the rows of an array of a list; a `ValidationError` that it raises is passed on.
    Returns None when the body cannot be cut; it may be valid nevertheless.
    """
    names = "|".join(map(re.escape, members)).encode()
    begins = re.compile(rb'[{,]\s*"(%b)"\s*:\s*\[\s*(?=\{)' % names)
    rest: list[bytes | bytearray] = []
    lists: list[LongList] = []
    at = 0
    while found := begins.search(body, at):
        rest += (body[at : found.end()], row(len(lists)))
        name = found[1].decode()
        long_list = LongList(name)
        at, last = found.end(), False
        while not last:
            piece = _piece(body, at, functools.partial(count, name))
            if piece is None:
                return None
            array, length, at, last = piece
            long_list.add(array, length)
            if comma := _COMMA.match(body, at):
                at = comma.end()
        lists.append(long_list)
    return b"".join((*rest, body[at:])), lists


def _piece(body: bytes | bytearray, begin: int, count: Callable[[bytes], int]) -> tuple[bytes, int, int, bool] | None:
    """The rows from `begin` on: as an array, their number, where they end, and whether the list ends there."""
    full = begin + PIECE
    # Searching for a byte takes no time, a pattern as long as a third of the decoding.
    bracket = body.find(b"]", begin, full)
    for last, places in (
        (True, _AFTER_LAST_ROW.finditer(body, max(begin, bracket - SPACE), full) if bracket >= 0 else ()),
        (False, _BETWEEN_ROWS.finditer(body, full)),
        (True, _AFTER_LAST_ROW.finditer(body, full - SPACE)),
    ):
        for place in itertools.islice(places, TRIES):
            array = b"".join((b"[", body[begin : place.end()], b"]"))
            # Everywhere except between two rows a string or bracket is open, so the part before it is not a valid
            # array.
            try:
                return array, count(array), place.end(), last
            except msgspec.ValidationError:
                raise
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
    return None
