"""The web configuration in force: read at the start, followed while running, the last good one kept."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from exporter import log
from exporter.config.web_file import WebFile, load_web
from exporter.errors import ConfigError, Problem
from exporter.web.auth import Users
from exporter.web.limiter import TokenBucket
from exporter.web.tls import TlsError, context


class Current(msgspec.Struct, frozen=True):
    """What one version of the file says, ready to be used. `users`: name → bcrypt hash."""

    tls: ssl.SSLContext | None = None
    allowed_sans: frozenset[str] = frozenset()
    headers: Mapping[str, str] = {}
    users: Mapping[str, str] = {}
    limiter: TokenBucket = TokenBucket(0.0, 0)


class WebConfig:
    """Holds the `current` version. `on_reload` is told whether a changed file was taken (True) or is broken (False)."""

    def __init__(self, path: Path | None = None, on_reload: Callable[[bool], None] = lambda _: None) -> None:
        """Read the file; without one everything is open. Raises ConfigError."""
        self.users = Users()
        self.current = Current()
        self._path = path
        self._on_reload = on_reload
        self._files: tuple[Path, ...] = ()
        self._stamp: tuple[object, ...] = ()
        self._broken = False
        if path is not None:
            self._take(*_read(path))

    async def refresh(self) -> tuple[Problem, ...]:
        """Take the files again when one of them changed, or while they are broken. Returns what is wrong with them."""
        if self._path is None:
            return ()
        stamp = await asyncio.to_thread(_stamp, self._files)
        if stamp == self._stamp and not self._broken:
            return ()
        try:
            file, current, stamp = await asyncio.to_thread(_read, self._path)
            self._check_change(file, current)
        except ConfigError as error:
            for problem in error.problems:
                log.get().error("web_config_refused", file=problem.file, field=problem.path, message=str(problem))
            self._broken = True
            self._on_reload(False)
            return error.problems
        self._broken = False
        self._take(file, current, stamp)
        log.get().info("web_config_loaded", file=str(self._path), users=len(current.users), tls=current.tls is not None)
        self._on_reload(True)
        return ()

    def _check_change(self, file: WebFile, current: Current) -> None:
        """A file caught while it is being written looks empty; it must not open the door."""
        if (current.tls is None) != (self.current.tls is None):
            raise ConfigError([file.problem("tls_server_config", "TLS is switched on or off by a restart only")])
        if self.current.users and not current.users:
            raise ConfigError([file.problem("basic_auth_users", "authentication is switched off by a restart only")])

    def _take(self, file: WebFile, current: Current, stamp: tuple[object, ...]) -> None:
        if (file.interval, file.burst) == self.current.limiter.rate:
            current = msgspec.structs.replace(current, limiter=self.current.limiter)
        self._files, self._stamp, self.current = file.files, stamp, current


def _read(path: Path) -> tuple[WebFile, Current, tuple[object, ...]]:
    """The file, what it means, and the stamp of all files: of before they were read, so that no change is missed."""
    stamp = _stamp((path,))
    file = load_web(path)
    stamp += _stamp(file.files[1:])
    problems: list[Problem] = []
    if file.users and importlib.util.find_spec("bcrypt") is None:
        missing = "needs the package bcrypt: pip install 'blueking-exporter[web-auth]'"
        problems.append(file.problem("basic_auth_users", missing))
    tls = None
    if file.tls:
        try:
            tls = context(file.tls)
        except TlsError as error:
            problems.append(file.problem(f"tls_server_config.{error.key}", str(error)))
    if problems:
        raise ConfigError(problems)
    sans = file.tls.client_allowed_sans if file.tls else None
    # An empty list allows nobody; the empty name stands in no certificate.
    allowed = frozenset() if sans is None else frozenset(sans or ("",))
    current = Current(tls, allowed, file.headers, file.users, TokenBucket(file.interval, file.burst))
    return file, current, stamp


def _stamp(files: Sequence[Path]) -> tuple[object, ...]:
    """Differs from the stamp before when a file was changed, replaced or removed."""
    stamp: list[object] = []
    for file in files:
        try:
            stat = os.stat(file)
            stamp.append((stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino))
        except OSError as error:
            stamp.append(error.errno)
    return tuple(stamp)
