"""A secret value that is never printed."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from exporter.config.files import read_file, stamp

MAX_BYTES = 64 * 1024


class Secret:
    """A password or token, given as text or as a file that may change while the process runs.

    Printing, formatting and copying into a log give `***`; pickling and serialising fail. Two secrets are equal when
    they come from the same source: the same text, or the same file whatever it holds by now.
    """

    __slots__ = ("_file", "_stamp", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        self._file: Path | None = None
        self._stamp: tuple[int, ...] = ()

    @classmethod
    def from_file(cls, file: Path) -> Secret:
        """Read `file`, without its trailing line break. Raises OSError, or ValueError when its content is no secret."""
        secret = cls("")
        secret._file = file
        secret._stamp = stamp(file)
        secret._value = _read(file)
        return secret

    @property
    def file(self) -> Path | None:
        """The file with the value, None when the value is in the configuration."""
        return self._file

    def reveal(self) -> str:
        """The value as it is now.

        A file is read again when it has changed. While it is unusable, the last good value stays in use.
        """
        if self._file is not None:
            try:
                found = stamp(self._file)
                if found != self._stamp:
                    self._value = _read(self._file)
                    self._stamp = found
            except (OSError, ValueError):
                pass  # while a file is being replaced the working token stays
        return self._value

    def __str__(self) -> str:
        return "***"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        if self._file is not None or other._file is not None:
            return self._file == other._file
        return self._value == other._value

    def __hash__(self) -> int:
        return hash(self._file if self._file is not None else self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not serialised")


def _read(file: Path) -> str:
    data = read_file(file, MAX_BYTES)
    if len(data) > MAX_BYTES:
        raise ValueError("is larger than 64 KiB")
    try:
        value = data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        # `from None`: the cause carries the bytes of the file
        raise ValueError("is not UTF-8 text") from None
    if not value:
        raise ValueError("is empty")
    if any(character < " " or character == "\x7f" for character in value):
        raise ValueError("holds control characters")
    return value
