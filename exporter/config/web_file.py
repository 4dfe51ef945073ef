"""The web configuration file: the format of Prometheus' exporter-toolkit, read as strictly as our own.

Deviations, all refused with an error instead of being done half: what Python's ssl cannot do, and what would silently
leave a port open (TLS settings without a certificate, a client CA that is not asked for).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec

from exporter.config.keys import Named, keys
from exporter.config.read import Reader
from exporter.config.secret import Secret
from exporter.config.values import Choice, InvalidValue, KeyFile, Kind, Number
from exporter.config.yaml import Mapping, Node, Scalar, Sequence, find, join, read
from exporter.errors import ConfigError, Problem

CIPHERS = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""Go's names of the suites up to TLS 1.2 and OpenSSL's."""
CIPHERS_TLS13 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""Always on with TLS 1.3; naming them has no effect, in Go neither."""
CURVES = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")
_UNSUPPORTED_AUTH = ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert")
_HASH = re.compile(r"\$2[abxy]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")


class _Pem(Kind):
    """A certificate or key inside the file; never shown."""

    private = True

    def parse(self, value: object, directory: Path) -> Secret:
        if not isinstance(value, str) or "-----BEGIN " not in value:
            raise InvalidValue("want PEM text", shown=False)
        return Secret(value)


class _Header(Kind):
    """The value of a header; empty means unset."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def parse(self, value: object, directory: Path) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # X-XSS-Protection: 0
        if not isinstance(value, str) or not value.isprintable():
            raise InvalidValue("want text without control characters", shown=False)
        if value and self.allowed and value not in self.allowed:
            raise InvalidValue(f"want {' or '.join(self.allowed)}")
        return value


_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class _Cipher(Choice):
    """Go's name of a suite. The list is too long for a message."""

    def parse(self, value: object, directory: Path) -> str:
        try:
            return super().parse(value, directory)
        except InvalidValue as wrong:
            raise InvalidValue("want the name of a secure suite as Go writes it", wrong.suggestion) from None


class _GoDuration(Kind):
    """`1s`, `250ms`, `1m30s`, or a bare 0; seconds."""

    _part = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")

    def parse(self, value: object, directory: Path) -> float:
        if value in (0, "0") and not isinstance(value, bool):
            return 0.0
        if not isinstance(value, str) or len(value) > 64 or not value or self._part.sub("", value):
            raise InvalidValue("want a duration like 1s or 250ms, or 0")
        return sum(float(number) * _GO_UNITS[unit] for number, unit in self._part.findall(value))


class TlsServer(msgspec.Struct, frozen=True):
    """The section `tls_server_config`."""

    cert: Annotated[Secret | None, _Pem(), "Certificate chain as PEM text."] = None
    key: Annotated[Secret | None, _Pem(), "Private key as PEM text."] = None
    client_ca: Annotated[Secret | None, _Pem(), "CA of client certificates as PEM text."] = None
    cert_file: Annotated[Path | None, "Certificate chain."] = None
    key_file: Annotated[Path | None, KeyFile(), "Private key."] = None
    client_ca_file: Annotated[Path | None, "CA of client certificates."] = None
    client_auth_type: Annotated[
        str,
        Choice("NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert", *_UNSUPPORTED_AUTH),
        "Whether clients need a certificate.",
    ] = "NoClientCert"
    client_allowed_sans: Annotated[tuple[str, ...] | None, "Names of which a client certificate must carry one."] = None
    min_version: Annotated[str, Choice(*VERSIONS), "Lowest TLS version."] = "TLS12"
    max_version: Annotated[str, Choice(*VERSIONS), "Highest TLS version."] = "TLS13"
    cipher_suites: Annotated[
        tuple[Annotated[str, _Cipher(*CIPHERS, *CIPHERS_TLS13)], ...], "Suites up to TLS 1.2."
    ] = ()
    prefer_server_cipher_suites: Annotated[bool, "Whose order of suites counts."] = True
    curve_preferences: Annotated[tuple[Annotated[str, Choice(*CURVES)], ...], "One curve."] = ()


class _Headers(msgspec.Struct, frozen=True):
    csp: Annotated[str, _Header(), Named("Content-Security-Policy")] = ""
    frame: Annotated[str, _Header("deny", "sameorigin"), Named("X-Frame-Options")] = ""
    content_type: Annotated[str, _Header("nosniff"), Named("X-Content-Type-Options")] = ""
    xss: Annotated[str, _Header(), Named("X-XSS-Protection")] = ""
    hsts: Annotated[str, _Header(), Named("Strict-Transport-Security")] = ""

    def named(self) -> dict[str, str]:
        named = {name: getattr(self, key.field) for name, key in keys(_Headers).items()}
        return {name: value for name, value in named.items() if value}


class _Http(msgspec.Struct, frozen=True):
    http2: bool = False
    headers: _Headers = _Headers()


class _RateLimit(msgspec.Struct, frozen=True):
    interval: Annotated[float, _GoDuration()] = 0.0
    burst: Annotated[int, Number(whole=True, least=0)] = 0


class _Root(msgspec.Struct, frozen=True):
    tls_server_config: TlsServer | None = None
    http_server_config: _Http = _Http()
    rate_limit: _RateLimit = _RateLimit()


class WebFile(msgspec.Struct, frozen=True):
    """A valid web configuration file.

    `users`: name → bcrypt hash. `interval` (seconds) and `burst` of the rate limit, 0.0 for none. `files`: absolute,
    everything that was read. `root`: the file as it is written.
    """

    tls: TlsServer | None
    headers: dict[str, str]
    users: dict[str, str]
    interval: float
    burst: int
    files: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    root: Node

    def problem(self, path: str, message: str) -> Problem:
        """A problem about `path`, shown where it or its section is written."""
        return find(self.root, path)[0].place.problem(path, message)


def load_web(path: Path) -> WebFile:
    """Read and check the file. Raises ConfigError with every problem; messages hold no hash and no key."""
    root, problems, _ = read(path)
    directory = root.place.directory
    if isinstance(root, Scalar) and root.value is None:
        root = Mapping(root.place, ())
    # There are no variables in this format, and a bcrypt hash is full of dollar signs.
    reader = Reader(_literal(root), {}, problems, null_is_absent=True)
    users, root = _users(reader), reader.root
    if isinstance(root, Mapping):
        root = Mapping(root.place, tuple(entry for entry in root.entries if entry[0] != "basic_auth_users"))
    file = reader.struct(root, _Root, "")
    if file is not None:
        _check(reader, file)
    if reader.problems or file is None:
        raise ConfigError(sorted(reader.problems, key=lambda problem: (problem.line, problem.column)))
    tls = file.tls_server_config
    named = (tls.cert_file, tls.key_file, tls.client_ca_file) if tls else ()
    return WebFile(
        tls=tls,
        headers=file.http_server_config.headers.named(),
        users=users,
        interval=file.rate_limit.interval,
        burst=file.rate_limit.burst,
        files=(directory / path.name, *(one for one in named if one)),
        warnings=tuple(reader.warnings),
        root=reader.root,
    )


def _literal(node: Node) -> Node:
    if isinstance(node, Scalar):
        return Scalar(node.place, node.value, literal=True)
    if isinstance(node, Sequence):
        return Sequence(node.place, tuple(map(_literal, node.items)))
    return Mapping(node.place, tuple((key, place, _literal(child)) for key, place, child in node.entries))


def _users(reader: Reader) -> dict[str, str]:
    node, written = find(reader.root, "basic_auth_users")
    if not written or node == Scalar(node.place, None, literal=True):
        return {}
    if not isinstance(node, Mapping):
        reader.problem("basic_auth_users", "want a mapping of user names to bcrypt hashes")
        return {}
    users: dict[str, str] = {}
    for name, place, child in node.entries:
        path = join("basic_auth_users", name)
        if not name or ":" in name:
            reader.problems.append(place.problem(path, "a user name is not empty and holds no colon"))
        elif not isinstance(child, Scalar) or not isinstance(child.value, str) or not _HASH.fullmatch(child.value):
            message = "want a bcrypt hash ($2y$..., as htpasswd -nB writes it)"
            reader.problems.append(child.place.problem(path, message))
        else:
            users[name] = child.value
    return users


def _check(reader: Reader, file: _Root) -> None:
    if file.http_server_config.http2:
        reader.problem("http_server_config.http2", "HTTP/2 is not supported; leave it out or say false")
    if file.rate_limit.interval and not file.rate_limit.burst:
        reader.problem("rate_limit.burst", "want at least 1: with 0 every request would be refused")
    if tls := file.tls_server_config:
        _check_support(reader, tls)
        _check_tls(reader, tls)


def _check_support(reader: Reader, tls: TlsServer) -> None:
    """What the format allows and Python's ssl cannot do."""
    if tls.client_auth_type in _UNSUPPORTED_AUTH:
        reader.problem(
            "tls_server_config.client_auth_type",
            f"{tls.client_auth_type} takes certificates without verifying them, which Python's ssl cannot; "
            "want RequireAndVerifyClientCert or VerifyClientCertIfGiven",
        )
    if len(tls.curve_preferences) > 1:
        reader.problem("tls_server_config.curve_preferences", "Python's ssl takes one curve only")


def _check_tls(reader: Reader, tls: TlsServer) -> None:
    """Rules between keys. A rule is left out where one of its keys has a problem of its own that decides it."""

    def problem(key: str, message: str) -> None:
        reader.problem(f"tls_server_config.{key}", message)

    def written(key: str) -> bool:
        node, found = find(reader.root, f"tls_server_config.{key}")
        return found and node != Scalar(node.place, None, literal=True)

    def right(*keys: str) -> bool:
        return all(reader.has_no_problem(f"tls_server_config.{key}") for key in keys)

    for key in ("cert", "key", "client_ca"):
        inline, file = written(key), written(f"{key}_file")
        if inline and file:
            problem(key, f"given beside {key}_file; want exactly one of them")
        elif not inline and not file and key != "client_ca":
            problem(key, f"is required: give {key}_file or {key}")
    if right("client_auth_type"):
        verifies = tls.client_auth_type != "NoClientCert"
        ca = next((key for key in ("client_ca_file", "client_ca") if written(key)), None)
        if ca and not verifies:
            problem(ca, "has no effect without client_auth_type; want RequireAndVerifyClientCert beside it")
        if verifies and not ca:
            problem("client_auth_type", f"{tls.client_auth_type} needs client_ca_file or client_ca")
        if tls.client_allowed_sans is not None and tls.client_auth_type != "RequireAndVerifyClientCert":
            problem("client_allowed_sans", "needs client_auth_type RequireAndVerifyClientCert")
    if right("min_version", "max_version") and VERSIONS.index(tls.min_version) > VERSIONS.index(tls.max_version):
        problem("max_version", f"{tls.max_version} is below min_version {tls.min_version}")
