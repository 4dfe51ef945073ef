"""Check SQLite's write-ahead log, as https://www.sqlite.org/fileformat2.html#the_write_ahead_log describes it.

SQLite ignores the log from the first damaged frame on, and does not report the commits after it.
"""

from __future__ import annotations

import struct
import sys
from array import array
from pathlib import Path

_HEADER = struct.Struct(">I4xI4x8sII")  # magic, page size, salts, checksum
_FRAME = struct.Struct(">4xI8sII")  # pages of the database after a commit, else 0; salts, checksum
_PAGE = 4096
"""SQLite's default, for a log whose own header is damaged."""
_MAGIC = 0x377F0682
"""The last bit tells the byte order of the words that are summed up: 1 for big-endian."""


def ignored_commits(log: Path) -> int:
    """How many commits SQLite would ignore because they, or a frame before them, are damaged. Raises OSError.

    After a power failure this may be one that was never confirmed.
    """
    with log.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return 0
        magic, page, salts, *checksum = _HEADER.unpack(header)
        swap = bool(magic & 1) == (sys.byteorder == "little")
        sums = _checksum(header[:24], (0, 0), swap)
        intact = magic & ~1 == _MAGIC and [*sums] == checksum
        if not intact:
            page, salts = _PAGE, file.read(_FRAME.size)[8:16]
            file.seek(_HEADER.size)
        commits = 0
        while len(frame := file.read(_FRAME.size + page)) == _FRAME.size + page:
            committed, own_salts, *checksum = _FRAME.unpack_from(frame)
            if own_salts != salts:
                # Left of an earlier round of the log, or the salt itself is damaged: then later frames still match.
                intact = False
                continue
            if intact:
                sums = _checksum(frame[_FRAME.size :], _checksum(frame[:8], sums, swap), swap)
                intact = [*sums] == checksum
            if not intact and committed:
                commits += 1
        return commits


def _checksum(data: bytes, sums: tuple[int, int], swap: bool) -> tuple[int, int]:
    words = array("I", data)
    if swap:
        words.byteswap()
    first, second = sums
    pairs = iter(words)
    for word in pairs:
        first = (first + word + second) & 0xFFFFFFFF
        second = (second + next(pairs) + first) & 0xFFFFFFFF
    return first, second
