"""Open files that people or other programs write: configuration, scope files, secrets, certificates.

Only regular files are opened. Opening a pipe waits for its writer, and opening a device may have effects.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting.

    Raises OSError, also for a directory, and ValueError for a pipe, a socket or a device.
    """
    _check(os.stat(path))
    # The file may have been replaced since: O_NONBLOCK keeps even a pipe from blocking.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check(os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return open(file, "rb")


def read_file(path: Path, limit: int) -> bytes:
    """The first `limit` + 1 bytes of a regular file: more than `limit` tells that it is too large. Raises as
    `open_file`."""
    with open_file(path) as file:
        return file.read(limit + 1)


def stamp(path: Path | str) -> tuple[int, ...]:
    """A value that differs when the file was changed, replaced, removed or became unreadable. Never raises."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        return (getattr(error, "errno", None) or 0,)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def reason(error: OSError | ValueError) -> str:
    """Why a file could not be read, without its name."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def _check(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is no regular file")


def open_to_others(path: Path) -> bool:
    """Whether every user of the machine may read the file, as far as its own mode tells."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False
