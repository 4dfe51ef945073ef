"""Who may use the web server: the web configuration file in use, and what browsers may do.

`config/web_file.py` reads and checks the file; here its values become an SSL context, a check of passwords and a rate
limiter, and `WebConfig` follows the file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import importlib.util
import ipaddress
import os
import platform
import secrets
import ssl
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from aiohttp.web_request import BaseRequest

from exporter import log
from exporter.config.files import read_file, stamp
from exporter.config.secret import Secret
from exporter.config.tls import why
from exporter.config.web_file import CIPHERS, CURVES, VERSIONS, TlsServer, WebFile, load_web
from exporter.errors import ConfigError, Problem

CHECK_FILES = 1.5
"""Seconds between two checks of the files."""
LARGEST_PEM = 2**20
LONGEST_PASSWORD = 72
"""Bytes of a password that bcrypt uses; its library refuses longer ones."""
FAILURES_KEPT = 60.0
"""Seconds for which wrong passwords count against a client."""
REFUSAL_PACE = 4
"""While several clients wait, one refusal is sent in the time of this many checks."""
OLDEST_EVERY = 4
"""Each time after this many checks the oldest waiting check is next; otherwise the newest is."""
_WRONG_KEPT = 256
# A well-formed hash whose password nobody knows; the cost is filled in.
_DUMMY = "$2b${cost:02d}$iF/givzoYo2U/5KlER3aVuxKygz8sZN3cmlrKauEoxqOeg22ZQjjK"

_VERSIONS = dict(
    zip(
        VERSIONS,
        (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
        strict=True,
    )
)


# ---- browsers ------------------------------------------------------------------------------------------------------


def is_cross_site(request: BaseRequest) -> bool:
    """Whether a browser says that a page of another site, or one without an origin, sends the request."""
    own = request.headers.get("Host", "").lower()
    origins = request.headers.getall("Origin", [])
    sites = request.headers.getall("Sec-Fetch-Site", [])
    return any(not own or origin.lower().partition("://")[2] != own for origin in origins) or any(
        site.lower() not in ("same-origin", "none") for site in sites
    )


def requested_host(request: BaseRequest) -> str:
    """The name or address of the Host header as `server.allowed_hosts` has it; "" when there is none, or several."""
    try:
        (host,) = request.headers.getall("Host", [])
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
    return str(ipaddress.ip_address(name)) if is_address(name) else name


def is_address(host: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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


Client = tuple[str, int]
"""Address and port of a client."""


class Users:
    """Checks passwords against bcrypt hashes, one at a time, in a thread.

    A right password is remembered per user, so that a scraper's is hashed once. While many clients guess, a user whose
    password is not remembered yet still gets in soon: `_next` prefers clients that have not guessed, then new ones, and
    refusals are sent more slowly than passwords are checked, so that guesses do not use up all checks.
    """

    def __init__(self, matches: Callable[[bytes, str], bool] | None = None) -> None:
        """`matches(password, hash)` is run in a thread; bcrypt by default."""
        self._matches = matches or _matches
        self._key = secrets.token_bytes(32)
        self._right: dict[str, bytes] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: list[_Check] = []
        self._worker: asyncio.Task[None] | None = None
        self._checks = 0
        self._seconds = 0.0
        """Duration of the newest check."""
        self._refusals = 0
        """How many are delayed now."""
        self._next_refusal = 0.0
        self._failures: Counter[str | Client] = Counter()
        self._failures_since = 0.0

    async def admits(self, authorization: str | None, users: Mapping[str, str], client: Client) -> bool:
        """Whether this Authorization header names one of `users` (name → bcrypt hash)."""
        user, password = credentials(authorization or "")
        if user is None:
            return False
        known = users.get(user)
        # An unknown user, or a password that cannot be right, takes as long as any other.
        possible = known is not None and len(password) <= LONGEST_PASSWORD and b"\0" not in password
        hashed = known or _DUMMY.format(cost=max(int(one[4:6]) for one in users.values()))
        mark = hmac.digest(self._key, b"\0".join((user.encode(), hashed.encode(), password)), hashlib.sha256)
        if hmac.compare_digest(self._right.get(user, b""), mark):
            return True
        if mark not in self._wrong:
            right = await self._check(_Check(client, mark, password if possible else b"-", hashed))
            if right and possible:
                self._right[user] = mark
                return True
            self._wrong[mark] = None
            while len(self._wrong) > _WRONG_KEPT:
                self._wrong.popitem(last=False)
        self._count_failure(client)
        await self._delay_refusal()
        return False

    async def _check(self, check: _Check) -> bool:
        self._waiting.append(check)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="password checks")
        try:
            return await check.result
        finally:
            if check in self._waiting:
                self._waiting.remove(check)

    async def _work(self) -> None:
        """Check the passwords that wait, until none is left. A check whose client has left still runs to its end."""
        while self._waiting:
            check = self._next()
            begin = time.perf_counter()
            try:
                right = await asyncio.to_thread(self._matches, check.password, check.hashed)
            except Exception as error:  # the request fails, the next one is checked
                if not check.result.done():
                    check.result.set_exception(error)
                continue
            self._seconds = time.perf_counter() - begin
            for one in (check, *self._waiting):
                if one.mark == check.mark and not one.result.done():
                    one.result.set_result(right)
            self._waiting = [one for one in self._waiting if not one.result.done()]

    def _next(self) -> _Check:
        """The check whose turn it is.

        The client with the fewest failures goes first: of its address, then of its connection. Among equal ones the
        newest goes first, so that a queue of guesses delays nobody; now and then the oldest does, so that a steady flow
        of new guesses delays nobody for ever.
        """
        self._checks += 1
        fewest = min(map(self._rank, self._waiting))
        equal = [check for check in self._waiting if self._rank(check) == fewest]
        check = equal[-1 if self._checks % OLDEST_EVERY else 0]
        self._waiting.remove(check)
        return check

    def _rank(self, check: _Check) -> tuple[int, int]:
        return self._failures[check.client[0]], self._failures[check.client]

    def _count_failure(self, client: Client) -> None:
        now = time.monotonic()
        if now - self._failures_since > FAILURES_KEPT:
            self._failures.clear()
            self._failures_since = now
        self._failures[client[0]] += 1
        self._failures[client] += 1

    async def _delay_refusal(self) -> None:
        """While other clients wait too, send one refusal in the time of `REFUSAL_PACE` checks."""
        if not self._waiting and not self._refusals:
            return
        # Each refusal that is delayed has its place in time; those that have been given up leave no gap.
        now, interval = time.monotonic(), REFUSAL_PACE * self._seconds
        self._refusals += 1
        self._next_refusal = min(max(self._next_refusal, now) + interval, now + interval * self._refusals)
        try:
            await asyncio.sleep(self._next_refusal - now)
        finally:
            self._refusals -= 1


class _Check(msgspec.Struct, eq=False):
    """One password that waits to be checked."""

    client: Client
    mark: bytes
    """The same for the same user, hash and password."""
    password: bytes
    hashed: str
    result: asyncio.Future[bool] = msgspec.field(default_factory=lambda: asyncio.get_running_loop().create_future())


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
        self.warnings: tuple[Problem, ...] = ()
        self._path = path
        self._on_reload = on_reload
        self._files: tuple[Path, ...] = ()
        self._stamps: tuple[object, ...] = ()
        self._broken = False
        if path is not None:
            self._use(*_read(path))

    async def follow(self) -> None:
        """Use changed files from the second look on at which they are the same: one that is being written is not read.

        Runs until it is cancelled.
        """
        if self._path is None:
            return
        before = self._stamps
        while True:
            await asyncio.sleep(CHECK_FILES)
            stamps = await asyncio.to_thread(_stamps, self._files)
            if stamps == before:
                await self.refresh()
            before = stamps

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
        self.warnings = file.warnings


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
        _set_curve(made, tls.curve_preferences[0])
    _load_certificate(made, tls)
    if tls.client_auth_type != "NoClientCert":
        required = tls.client_auth_type == "RequireAndVerifyClientCert"
        made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        try:
            with _pem_file(tls.client_ca, tls.client_ca_file) as authority:
                made.load_verify_locations(authority)
        except (OSError, ValueError) as error:
            key = "client_ca_file" if tls.client_ca_file else "client_ca"
            raise TlsError(key, f"is no CA certificate: {why(error)}") from None
    return made


def _set_curve(made: ssl.SSLContext, curve: str) -> None:
    try:
        made.set_ecdh_curve(CURVES[curve])
    except (ValueError, ssl.SSLError):
        here = f"Python {platform.python_version()} with {ssl.OPENSSL_VERSION}"
        known = "want CurveP256, CurveP384 or CurveP521, or leave it out"
        if curve == "X25519":
            known = f"{curve} alone needs Python 3.11.4; {known}: then {curve} is preferred"
        raise TlsError("curve_preferences", f"{here} cannot be restricted to {curve}; {known}") from None


def _load_certificate(made: ssl.SSLContext, tls: TlsServer) -> None:
    try:
        with _pem_file(tls.cert, tls.cert_file) as certificate, _pem_file(tls.key, tls.key_file) as key:
            # Without a password OpenSSL would ask the terminal for that of an encrypted key.
            made.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        name = "cert_file" if tls.cert_file else "cert"
        raise TlsError(name, f"certificate and key cannot be used: {why(error)}") from None


@contextmanager
def _pem_file(inline: Secret | None, file: Path | None) -> Iterator[str]:
    """A file that OpenSSL can read without waiting: a copy in memory of the value or of the regular file."""
    pem = inline.reveal().encode() if inline else read_file(file, LARGEST_PEM) if file else b""
    if len(pem) > LARGEST_PEM:
        raise ValueError("is larger than 1 MiB")
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
