"""One process per state file, whatever name each process has for the file.

Two locks, both released by the kernel when the process ends, however it ends:

FILE.lock   taken before FILE exists; it holds the process id for the error message
FILE        locked itself, so that no link to it and no removed lock file lets a second process in
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from exporter import log
from exporter.errors import StateError, StateLocked

NO_LOCKS = (
    "the file system seems to have no file locks (NFS, SMB or FUSE without them):"
    " keep the state on a local disk, or use redis (state.url)"
)
_SQLITE = 0x40000000
"""The first of the bytes that SQLite locks; it never writes the page around them."""


def _claim(start: int, length: int) -> bytes:
    """`struct flock` of Linux with 64-bit offsets: exclusive."""
    return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)


_FLOCK = "hhqqi4x"
_OURS = _claim(_SQLITE + 1024, 1)
"""Held by the open file, so that nothing but its end releases it."""
_NAMED = _claim(_SQLITE + 1023, 1)
"""Held by the process, so that the kernel tells others its id; like SQLite's own locks, which are in the same range."""
_ANY_NAMED = _claim(_SQLITE, 1024)


class StateLock:
    """The locks of one state file. `path` is absolute and no symbolic link."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[Path, int] = {}

    def take(self) -> None:
        """Take both locks; a file that is missing is created.

        Called again, it locks what was removed or replaced since. Raises `StateLocked`, `StateError` and OSError.
        """
        self._take(self._path.with_name(f"{self._path.name}.lock"), self._lock_marker)
        self._take(self._path, self._lock_file)

    def holds_file(self) -> bool:
        """Whether the file at the path is the one that is locked."""
        return self._holds(self._path)

    def first_bytes(self, length: int) -> bytes:
        """How the locked file begins, whatever SQLite's log says about that page.

        Another open file would do harm: closing it drops SQLite's locks.
        """
        return os.pread(self._held[self._path], length, 0)

    def busy(self) -> StateLocked:
        """What to raise when SQLite says that another process has the file."""
        return StateLocked(f"state {self._path} is held by another process ({_holder(self._held[self._path])})")

    def release(self) -> None:
        """Release both. SQLite must have closed the file: closing it here also drops SQLite's locks."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _holds(self, path: Path) -> bool:
        try:
            return path in self._held and os.path.samestat(os.fstat(self._held[path]), os.lstat(path))
        except FileNotFoundError:
            return False

    def _take(self, path: Path, lock: Callable[[int], None]) -> None:
        # Twice when the file is removed after it was opened.
        while not self._holds(path):
            file = self._open(path)
            try:
                lock(file)
            except BaseException:
                os.close(file)
                raise
            if path in self._held:
                os.close(self._held.pop(path))
            self._held[path] = file

    def _open(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise StateError(f"state {self._path}: {path} is a symbolic link; remove it") from None
            raise
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            os.close(file)
            raise StateError(f"state {self._path}: {path} is no regular file")
        if found.st_mode & 0o077:
            try:
                os.fchmod(file, 0o600)
            except OSError as error:
                log.get().warning("state_file_open_to_others", file=str(path), message=str(error.strerror))
        return file

    def _lock_marker(self, file: int) -> None:
        found, content = os.fstat(file), os.pread(file, 64, 0)
        if found.st_nlink > 1 or found.st_size > 64 or not re.fullmatch(rb"[0-9]*\n?", content):
            raise StateError(f"state {self._path}: {self._path}.lock is no lock file of this program; remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._refusal(error, lambda: f"pid {content.decode().strip() or 'unknown'}") from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)

    def _lock_file(self, file: int) -> None:
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _OURS)
            fcntl.fcntl(file, fcntl.F_SETLK, _NAMED)
        except OSError as error:
            raise self._refusal(error, lambda: _holder(file)) from None
        if os.fstat(file).st_nlink > 1:
            consequence = "opened by another name after a kill, it lacks the newest commits"
            log.get().warning("state_file_hard_linked", file=str(self._path), consequence=consequence)

    def _refusal(self, error: OSError, holder: Callable[[], str]) -> StateError:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return StateLocked(f"state {self._path} is held by another process ({holder()})")
        return StateError(f"state {self._path} cannot be locked: {error.strerror}; {NO_LOCKS}")


def _holder(file: int) -> str:
    """The process that has the file, for a message; unknown when it is in another container."""
    kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, _ANY_NAMED))
    return f"pid {pid}" if kind != fcntl.F_UNLCK and pid > 0 else "pid unknown"
