"""The web configuration file in use: TLS, users, headers and rate limit. `WebConfig` follows the file.

`config/web_file.py` reads and checks the file; here its values become an SSL context, a check of passwords and a rate
limiter.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import importlib.util
import os
import secrets
import ssl
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from exporter import log
from exporter.config.files import stamp
from exporter.config.secret import Secret
from exporter.config.web_file import CIPHERS, CURVES, VERSIONS, TlsServer, WebFile, load_web
from exporter.errors import ConfigError, Problem

LONGEST_PASSWORD = 72
"""Bytes of a password that bcrypt uses; its library refuses longer ones."""
WAITING = 16
"""Passwords that wait to be checked at most; one check takes about 0.1 s."""
_WRONG_KEPT = 256
# A well-formed hash that no password is known for; the cost is filled in.
_DUMMY = "$2b${cost:02d}$iF/givzoYo2U/5KlER3aVuxKygz8sZN3cmlrKauEoxqOeg22ZQjjK"

_VERSIONS = dict(
    zip(
        VERSIONS,
        (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
        strict=True,
    )
)


# ---- rate limit ------------------------------------------------------------------------------------------------------


class TokenBucket:
    """`burst` requests at once, and one more every `interval` seconds. An interval of 0.0 allows everything."""

    def __init__(self, interval: float, burst: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.rate = (interval, burst)
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._at = monotonic()

    def allow(self) -> bool:
        """Take a token if there is one."""
        interval, burst = self.rate
        if not interval:
            return True
        now = self._monotonic()
        self._tokens = min(burst, self._tokens + (now - self._at) / interval)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


# ---- users -----------------------------------------------------------------------------------------------------------


class Busy(Exception):
    """Too many passwords wait to be checked."""


class Users:
    """Checks passwords against bcrypt hashes, one at a time, in a thread.

    Right and wrong passwords are remembered and not hashed again. Right ones are kept per user, so that many wrong
    ones cannot displace them.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._right: dict[str, bytes] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._one = asyncio.Lock()
        self._waiting = 0

    async def admits(self, authorization: str | None, users: Mapping[str, str]) -> bool:
        """Whether this Authorization header names one of `users` (name → bcrypt hash); always when there are none.

        Raises `Busy` rather than refuse a password that was not checked.
        """
        if not users:
            return True
        user, password = credentials(authorization or "")
        if user is None:
            return False
        known = users.get(user)
        # An unknown user, or a password that cannot be right, takes as long as any other.
        possible = known is not None and len(password) <= LONGEST_PASSWORD and b"\0" not in password
        hashed = known or _DUMMY.format(cost=max(int(one[4:6]) for one in users.values()))
        mark = hmac.digest(self._key, b"\0".join((user.encode(), hashed.encode(), password)), hashlib.sha256)
        if (remembered := self._remembered(user, mark)) is not None:
            return remembered
        if self._waiting >= WAITING:
            raise Busy
        self._waiting += 1
        try:
            async with self._one:
                if (remembered := self._remembered(user, mark)) is not None:
                    return remembered
                right = await asyncio.to_thread(_matches, password if possible else b"-", hashed) and possible
        finally:
            self._waiting -= 1
        self._remember(user, mark, right)
        return right

    def _remembered(self, user: str, mark: bytes) -> bool | None:
        if hmac.compare_digest(self._right.get(user, b""), mark):
            return True
        return False if mark in self._wrong else None

    def _remember(self, user: str, mark: bytes, right: bool) -> None:
        if right:
            self._right[user] = mark
            return
        self._wrong[mark] = None
        while len(self._wrong) > _WRONG_KEPT:
            self._wrong.popitem(last=False)


def credentials(authorization: str) -> tuple[str | None, bytes]:
    """User and password of a Basic authorization; (None, b"") when it is none."""
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None, b""
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (user.decode(), password) if colon else (None, b"")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None, b""


def _matches(password: bytes, hashed: str) -> bool:
    import bcrypt  # the extra web-auth; `_read` has checked that it is installed

    return bcrypt.checkpw(password, hashed.encode())


# ---- the file in use -------------------------------------------------------------------------------------------------


class Current(msgspec.Struct, frozen=True):
    """One version of the file, ready for use. `users`: name → bcrypt hash."""

    tls: ssl.SSLContext | None = None
    allowed_sans: frozenset[str] = frozenset()
    headers: Mapping[str, str] = {}
    users: Mapping[str, str] = {}
    limiter: TokenBucket = TokenBucket(0.0, 0)


class WebConfig:
    """The web configuration file: `current` is its last good version. `on_reload` is called after each change, with
    whether the new version is good."""

    def __init__(self, path: Path | None = None, on_reload: Callable[[bool], None] = lambda _: None) -> None:
        """Read the file; without one everything is open. Raises ConfigError."""
        self.users = Users()
        self.current = Current()
        self._path = path
        self._on_reload = on_reload
        self._files: tuple[Path, ...] = ()
        self._stamps: tuple[object, ...] = ()
        self._broken = False
        if path is not None:
            self._use(*_read(path))

    async def refresh(self) -> tuple[Problem, ...]:
        """Read the files again when one of them has changed or the last version is broken. Returns its problems."""
        if self._path is None:
            return ()
        stamps = await asyncio.to_thread(_stamps, self._files)
        if stamps == self._stamps and not self._broken:
            return ()
        try:
            file, current, stamps = await asyncio.to_thread(_read, self._path)
            self._check_change(file, current)
        except ConfigError as error:
            for problem in error.problems:
                log.get().error("web_config_refused", file=problem.file, field=problem.path, message=str(problem))
            self._broken = True
            self._on_reload(False)
            return error.problems
        self._broken = False
        self._use(file, current, stamps)
        log.get().info("web_config_loaded", file=str(self._path), users=len(current.users), tls=current.tls is not None)
        self._on_reload(True)
        return ()

    def _check_change(self, file: WebFile, current: Current) -> None:
        """Refuse to switch off protection: a file that is being written looks empty."""
        if (current.tls is None) != (self.current.tls is None):
            raise ConfigError([file.problem("tls_server_config", "TLS is switched on or off by a restart only")])
        if self.current.users and not current.users:
            raise ConfigError([file.problem("basic_auth_users", "authentication is switched off by a restart only")])

    def _use(self, file: WebFile, current: Current, stamps: tuple[object, ...]) -> None:
        if (file.interval, file.burst) == self.current.limiter.rate:
            current = msgspec.structs.replace(current, limiter=self.current.limiter)
        self._files, self._stamps, self.current = file.files, stamps, current


def _read(path: Path) -> tuple[WebFile, Current, tuple[object, ...]]:
    """The file, its values ready for use, and the stamps of all files from before they were read."""
    stamps = _stamps((path,))
    file = load_web(path)
    stamps += _stamps(file.files[1:])
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
    # An empty list allows nobody: no certificate has the empty name.
    allowed = frozenset() if sans is None else frozenset(sans or ("",))
    current = Current(tls, allowed, file.headers, file.users, TokenBucket(file.interval, file.burst))
    return file, current, stamps


def _stamps(files: Sequence[Path]) -> tuple[object, ...]:
    return tuple(stamp(file) for file in files)


# ---- TLS -------------------------------------------------------------------------------------------------------------


class TlsError(Exception):
    """OpenSSL refuses a value of `tls_server_config`. `key`: which one."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def context(tls: TlsServer) -> ssl.SSLContext:
    """A fresh context, so that no session of an older certificate or CA can be resumed. Raises TlsError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["http/1.1"])
    made.options |= ssl.OP_NO_RENEGOTIATION
    lowest = tls.min_version
    suites = [CIPHERS[name] for name in tls.cipher_suites if name in CIPHERS]
    if tls.cipher_suites and not suites:
        # Only suites of TLS 1.3 are allowed, so an older version could agree on none.
        if tls.max_version != "TLS13":
            raise TlsError("cipher_suites", f"none of them exists in {tls.max_version}")
        lowest = "TLS13"
    level = "@SECLEVEL=0" if tls.min_version in ("TLS10", "TLS11") else ""
    if suites or level:
        made.set_ciphers(":".join(suites or ["DEFAULT"]) + (f":{level}" if level else ""))
    if not tls.prefer_server_cipher_suites:
        made.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TLS10 is asked for by name
        made.minimum_version = _VERSIONS[lowest]
        made.maximum_version = _VERSIONS[tls.max_version]
    if tls.curve_preferences:
        try:
            made.set_ecdh_curve(CURVES[tls.curve_preferences[0]])
        except (ValueError, ssl.SSLError):
            raise TlsError("curve_preferences", "this Python's OpenSSL does not take the curve") from None
    _certificate(made, tls)
    if tls.client_auth_type != "NoClientCert":
        required = tls.client_auth_type == "RequireAndVerifyClientCert"
        made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        key = "client_ca_file" if tls.client_ca_file else "client_ca"
        try:
            made.load_verify_locations(tls.client_ca_file, cadata=tls.client_ca.reveal() if tls.client_ca else None)
        except (OSError, ValueError) as error:
            raise TlsError(key, f"is no CA certificate: {_why(error)}") from None
    return made


def _certificate(made: ssl.SSLContext, tls: TlsServer) -> None:
    key = "cert_file" if tls.cert_file else "cert"
    with ExitStack() as open_files:
        try:
            cert = tls.cert_file or open_files.enter_context(_as_file(tls.cert))
            private = tls.key_file or open_files.enter_context(_as_file(tls.key))
            # Without a password OpenSSL would ask the terminal for that of an encrypted key.
            made.load_cert_chain(cert, private, password=lambda: "")
        except (OSError, ValueError) as error:
            raise TlsError(key, f"certificate and key cannot be used: {_why(error)}") from None


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "not PEM"


@contextmanager
def _as_file(secret: Secret | None) -> Iterator[Path]:
    # ssl reads certificates from files only; this one has no name on any disk.
    assert secret is not None
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, secret.reveal().encode())
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
