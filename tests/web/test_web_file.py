"""The web configuration file: what is taken, what is refused and with which words, and what it does on the wire."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from exporter.errors import ConfigError
from exporter.web.connection import Limits, names
from exporter.web.security import LONGEST_PASSWORD, WAITING, Busy, TokenBucket, Users, WebConfig, credentials
from tests.support.paths import ROOT
from tests.support.web import Running, expose, parsed, resident, running

HASH = bcrypt.hashpw(b"s3cret", bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$", 1)
OTHER = bcrypt.hashpw(b"0ther", bcrypt.gensalt(4)).decode()


class Authority:
    """A CA that signs certificates into files of `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._sign(self._name, self._key.public_key(), [], ca=True))

    def _sign(self, subject: x509.Name, key: Any, sans: list[x509.GeneralName], *, ca: bool = False) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        if not ca:
            both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, sans: list[x509.GeneralName] | None = None) -> tuple[Path, Path]:
        """Certificate and key files for `name`, replaced in one step like those of a rotation."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        sans = sans or [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for file, data in zip(files, (self._sign(subject, key.public_key(), sans), pem), strict=True):
            temporary = file.with_suffix(".new")
            temporary.write_bytes(data)
            temporary.replace(file)
        return files


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the web configuration file."""

    def write(text: str) -> Path:
        file = tmp_path / "web.yml"
        file.write_text(text)
        return file

    return write


def basic(user: str, password: str | bytes) -> str:
    raw = user.encode() + b":" + (password if isinstance(password, bytes) else password.encode())
    return f"Authorization: Basic {base64.b64encode(raw).decode()}"


# ---- what is taken and what is refused -------------------------------------------------------------------------------

PAIR = "cert_file: server.crt, key_file: server.key"
REFUSED = {
    "unknown section": ("tls_server: {}", "tls_server", "tls_server: unknown key (did you mean"),
    "unknown key": (f"tls_server_config: {{{PAIR}, min_versio: TLS13}}", "min_versio", "unknown key (did you mean"),
    "not a mapping": ("- a", "-", "want a mapping"),
    "no certificate": ("tls_server_config: {min_version: TLS13}", "{", "cert: is required: give cert_file or cert"),
    "empty pair": ('tls_server_config: {cert_file: "", key_file: ""}', '""', "cert_file: want a path"),
    "missing file": ("tls_server_config: {cert_file: gone, key_file: server.key}", "gone", "cannot be read"),
    "both": (f"tls_server_config: {{{PAIR}, cert: '-----BEGIN X'}}", "'-----", "cert: given beside cert_file"),
    "swapped": ("tls_server_config: {cert_file: server.key, key_file: server.crt}", "server.key", "cannot be used"),
    "wrong key": (
        "tls_server_config: {cert_file: server.crt, key_file: other.key}",
        "server.crt",
        "key values mismatch",
    ),
    "request": (
        f"tls_server_config: {{{PAIR}, client_auth_type: RequestClientCert}}",
        "Request",
        "without verifying them",
    ),
    "any": (
        f"tls_server_config: {{{PAIR}, client_auth_type: RequireAnyClientCert, client_ca_file: ca.pem}}",
        "RequireAny",
        "without verifying them",
    ),
    "auth without ca": (
        f"tls_server_config: {{{PAIR}, client_auth_type: RequireAndVerifyClientCert}}",
        "RequireAnd",
        "needs client_ca_file or client_ca",
    ),
    "ca without auth": (f"tls_server_config: {{{PAIR}, client_ca_file: ca.pem}}", "ca.pem", "has no effect without"),
    "sans without auth": (f"tls_server_config: {{{PAIR}, client_allowed_sans: [a]}}", "[a]", "needs client_auth_type"),
    "curves": (f"tls_server_config: {{{PAIR}, curve_preferences: [CurveP256, X25519]}}", "[", "takes one curve only"),
    "unknown curve": (f"tls_server_config: {{{PAIR}, curve_preferences: [P256]}}", "P256", "want CurveP256"),
    "versions": (
        f"tls_server_config: {{{PAIR}, min_version: TLS13, max_version: TLS12}}",
        "TLS12",
        "TLS12 is below min_version TLS13",
    ),
    "unknown suite": (f"tls_server_config: {{{PAIR}, cipher_suites: [RC4-MD5]}}", "RC4", "as Go writes it"),
    "suites of another version": (
        f"tls_server_config: {{{PAIR}, max_version: TLS12, cipher_suites: [TLS_AES_128_GCM_SHA256]}}",
        "[TLS",
        "none of them exists in TLS12",
    ),
    "http2": ("http_server_config: {http2: true}", "true", "HTTP/2 is not supported"),
    "header": ("http_server_config: {headers: {X-Powered-By: me}}", "X-Powered-By", "unknown key"),
    "header value": ("http_server_config: {headers: {X-Frame-Options: maybe}}", "maybe", "want deny or sameorigin"),
    "injection": ('http_server_config: {headers: {X-XSS-Protection: "a\\r\\nb: c"}}', '"a', "without control"),
    "plain password": ("basic_auth_users: {ann: s3cret}", "s3cret", "want a bcrypt hash"),
    "old hash": ("basic_auth_users: {ann: $1$abc$def}", "$1", "want a bcrypt hash"),
    "user with colon": (f"basic_auth_users: {{'a:b': {HASH}}}", "'a:b'", "holds no colon"),
    "same user twice": (f"basic_auth_users: {{ann: {HASH}, 'ann': {HASH}}}", "'ann'", "given twice"),
    "burst of nothing": ("rate_limit: {interval: 1s}", "{", "want at least 1"),
    "interval": ("rate_limit: {interval: soon, burst: 1}", "soon", "want a duration like 1s"),
}
"""Name → text, the place in it that is to blame, a part of the message."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_place(name: str, ca: Authority, write: Callable[[str], Path]) -> None:
    """Each mistake is one line FILE:LINE:COL: path: message; no hash, password or key is in it."""
    ca.issue("server")
    ca.issue("other")
    text, blamed, message = REFUSED[name]
    file = write(f"\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        WebConfig(file)
    (problem,) = (one for one in caught.value.problems if message in str(one))
    assert str(problem).startswith(f"{file}:2:{text.index(blamed) + 1}: ")
    assert "s3cret" not in str(caught.value)
    assert HASH not in str(caught.value)


def test_all_problems_at_once(write: Callable[[str], Path]) -> None:
    """Every mistake of the file is reported, in the order of the file."""
    text = "a: 1\nhttp_server_config: {http2: true}\nbasic_auth_users: {ann: x}\nrate_limit: {burst: x}\n"
    with pytest.raises(ConfigError) as caught:
        WebConfig(write(text))
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The file must exist at the start."""
    with pytest.raises(ConfigError, match=r"web\.yml:1:1: cannot be read: No such file"):
        WebConfig(tmp_path / "web.yml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tls_server_config: null\nbasic_auth_users:\n",
        f"tls_server_config: {{{PAIR}, prefer_server_cipher_suites: false, curve_preferences: [X25519]}}",
        f"tls_server_config: {{{PAIR}, cipher_suites: [TLS_AES_128_GCM_SHA256]}}",
        f"tls_server_config: {{{PAIR}, min_version: TLS10, max_version: TLS11}}",
        f"tls_server_config: {{{PAIR}, client_auth_type: VerifyClientCertIfGiven, client_ca_file: ca.pem}}",
        "http_server_config: {http2: false, headers: {X-Frame-Options: '', Strict-Transport-Security: max-age=1}}",
        f"basic_auth_users: {{ann: {HASH}, bob: {OTHER}}}\nrate_limit: {{interval: 1.5s, burst: 20}}",
        "rate_limit: {interval: 0, burst: 0}",
    ],
)
def test_taken(text: str, ca: Authority, write: Callable[[str], Path]) -> None:
    """Files that exporter-toolkit takes are taken."""
    ca.issue("server")
    WebConfig(write(text))


def test_certificates_inside_the_file(ca: Authority, write: Callable[[str], Path]) -> None:
    """cert, key and client_ca may stand in the file as text."""
    certificate, key = ca.issue("server")
    section = {
        "cert": certificate.read_text(),
        "key": key.read_text(),
        "client_ca": ca.file.read_text(),
        "client_auth_type": "RequireAndVerifyClientCert",
    }
    config = WebConfig(write(json.dumps({"tls_server_config": section})))
    assert config.current.tls is not None
    assert config.current.tls.verify_mode == ssl.CERT_REQUIRED
    section["key"] = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    with pytest.raises(ConfigError, match="certificate and key cannot be used") as caught:
        WebConfig(write(json.dumps({"tls_server_config": section})))
    assert "AAAA" not in str(caught.value)


# ---- users -----------------------------------------------------------------------------------------------------------


async def test_users_protect_every_path(write: Callable[[str], Path]) -> None:
    """Without the right password every path is a 401 that asks for one, unknown paths and the reload too."""
    config = write(f"basic_auth_users: {{ann: {HASH}, bob: {OTHER}}}\n")
    async with running(config, enable_lifecycle=True) as server:
        for path in ("/", "/metrics", "/-/healthy", "/-/ready", "/api/v1/status", "/api/v1/failures", "/nothing"):
            status, headers, body = await server.get(path)
            assert (status, body) == (401, b"Unauthorized\n")
            assert headers["www-authenticate"].startswith("Basic ")
        assert (await server.get("/-/reload", method="POST"))[0] == 401
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200
        assert (await server.get("/metrics", basic("bob", "0ther")))[0] == 200
        assert (await server.get("/metrics", basic("bob", "s3cret")))[0] == 401
        assert (await server.get("/nothing", basic("ann", "s3cret")))[0] == 404


@pytest.mark.parametrize(
    "header",
    [
        basic("ann", "wrong"),
        basic("nobody", "s3cret"),
        basic("ann", ""),
        basic("", "s3cret"),
        basic("ann", b"s3cret\0"),
        basic("ann", b"s3cret\0more"),
        basic("ann", "x" * 80),
        basic("ann", "s3cret" + "x" * (LONGEST_PASSWORD * 3)),
        basic("ann", b"\xff\xfe"),
        "Authorization: Basic ???",
        "Authorization: Basic " + base64.b64encode(b"no colon").decode(),
        "Authorization: Basic " + base64.b64encode(b"\xff:x").decode(),
        "Authorization: Basic",
        "Authorization: Bearer s3cret",
        "Authorization: \xff",
        "X: y",
    ],
)
async def test_F35_odd_credentials_are_a_401(write: Callable[[str], Path], header: str) -> None:
    """Unknown users, wrong, over-long and broken passwords are refused, never a 500, also when asked twice."""
    async with running(write(f"basic_auth_users: {{ann: {HASH}}}\n")) as server:
        assert (await server.get("/metrics", header))[0] == 401
        assert (await server.get("/metrics", header))[0] == 401


async def test_F35_unknown_users_cost_as_much_as_known_ones() -> None:
    """Time does not tell whether a user exists; a password that was right before costs nothing."""
    users = {"ann": bcrypt.hashpw(b"s3cret", bcrypt.gensalt(8)).decode()}

    async def took(door: Users, user: str, password: str) -> float:
        begin = time.perf_counter()
        await door.admits(basic(user, password).partition(" ")[2], users)
        return time.perf_counter() - begin

    door = Users()
    await took(door, "ann", "warm up")
    known = min([await took(door, "ann", f"wrong {number}") for number in range(5)])
    unknown = min([await took(door, "nobody", f"wrong {number}") for number in range(5)])
    long = min([await took(door, "ann", "x" * (80 + number)) for number in range(5)])
    assert 0.5 < unknown / known < 2
    assert 0.5 < long / known < 2
    await took(door, "ann", "s3cret")
    assert min([await took(door, "ann", "s3cret") for _ in range(5)]) < known / 10


async def test_F35_guesses_do_not_lock_the_scraper_out() -> None:
    """While others guess, who was let in before is let in at once; nobody is told to be wrong without a look."""
    users = {"ann": bcrypt.hashpw(b"s3cret", bcrypt.gensalt(6)).decode()}
    door = Users()
    right = basic("ann", "s3cret").partition(" ")[2]
    assert await door.admits(right, users)
    guesses = [asyncio.create_task(door.admits(basic("ann", f"{n}").partition(" ")[2], users)) for n in range(400)]
    await asyncio.sleep(0)
    begin = time.perf_counter()
    assert await door.admits(right, users)
    assert time.perf_counter() - begin < 0.05
    verdicts = await asyncio.gather(*guesses, return_exceptions=True)
    assert True not in verdicts
    assert 0 < verdicts.count(False) <= WAITING
    assert sum(isinstance(verdict, Busy) for verdict in verdicts) == 400 - verdicts.count(False)
    assert not await door.admits(right, {"ann": HASH.replace("$2y$04", "$2y$05")})


def test_credentials() -> None:
    """The scheme is case-insensitive, the password may hold colons."""
    encoded = base64.b64encode("änn:a:b".encode()).decode()
    assert credentials(f"bAsIc {encoded}") == ("änn", b"a:b")
    assert credentials("") == (None, b"")


# ---- headers and rate limit ------------------------------------------------------------------------------------------


async def test_F35_too_many_guesses_at_once_are_told_to_come_back(write: Callable[[str], Path]) -> None:
    """Over HTTP: 503 with Retry-After, not a 401 for a password that nobody has looked at."""
    async with running(write(f"basic_auth_users: {{ann: {HASH}}}\n")) as server:
        answers = await asyncio.gather(*(server.get("/metrics", basic("ann", f"guess {n}")) for n in range(60)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {401, 503}
        assert all(headers.get("retry-after") == "1" for status, headers, _ in answers if status == 503)
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200


async def test_a_number_is_a_header_value_too(write: Callable[[str], Path]) -> None:
    """`X-XSS-Protection: 0` is what is usually written, without quotes."""
    async with running(write("http_server_config: {headers: {X-XSS-Protection: 0}}\n")) as server:
        assert (await server.get("/-/healthy"))[1]["x-xss-protection"] == "0"


async def test_headers_are_fixed_on_every_answer(write: Callable[[str], Path]) -> None:
    """Configured headers are on every answer, the 401 too; one of ours gives way to the configured value."""
    fixed = "Strict-Transport-Security: max-age=9, X-Frame-Options: deny, Content-Security-Policy: a"
    text = f"http_server_config: {{headers: {{{fixed}}}}}\n"
    async with running(write(f"{text}basic_auth_users: {{ann: {HASH}}}\n")) as server:
        for path, extra in (("/", basic("ann", "s3cret")), ("/metrics", "X: y"), ("/nothing", basic("ann", "s3cret"))):
            _, headers, _ = await server.get(path, extra)
            assert headers["strict-transport-security"] == "max-age=9"
            assert headers["x-frame-options"] == "deny"
            assert headers["content-security-policy"] == "a"
            assert headers["x-content-type-options"] == "nosniff"


async def test_rate_limit(write: Callable[[str], Path]) -> None:
    """After the burst requests are a 429, before any password is looked at; with time one more is let through."""
    async with running(
        write(f"rate_limit: {{interval: 500ms, burst: 3}}\nbasic_auth_users: {{ann: {HASH}}}\n")
    ) as server:
        assert [(await server.get("/metrics"))[0] for _ in range(4)] == [401, 401, 401, 429]
        await asyncio.sleep(0.6)
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200


def test_token_bucket() -> None:
    """Never more than the burst, one token per interval, everything without an interval."""
    now = 0.0
    bucket = TokenBucket(2.0, 2, lambda: now)
    assert [bucket.allow() for _ in range(3)] == [True, True, False]
    now = 1.9
    assert not bucket.allow()
    now = 2.1
    assert [bucket.allow() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [bucket.allow() for _ in range(3)] == [True, True, False]
    assert all(TokenBucket(0.0, 0).allow() for _ in range(100))


# ---- TLS -------------------------------------------------------------------------------------------------------------


def client(ca: Authority, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca.file)
    if pair:
        context.load_cert_chain(*pair)
    return context


async def fetch(server: Running, context: ssl.SSLContext) -> tuple[int, ssl.SSLObject]:
    """The status of /metrics over TLS, and the connection's facts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    try:
        facts: ssl.SSLObject = writer.get_extra_info("ssl_object")
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        if not answer:
            raise ConnectionResetError("closed without an answer")
        return parsed(answer)[0], facts
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_tls_versions_suites_and_curve(ca: Authority, write: Callable[[str], Path]) -> None:
    """Only what is configured is agreed on."""
    ca.issue("server")
    suite = "cipher_suites: [TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256], curve_preferences: [CurveP384]"
    async with running(write(f"tls_server_config: {{{PAIR}, max_version: TLS12, {suite}}}")) as server:
        status, facts = await fetch(server, client(ca))
        assert (status, facts.version()) == (200, "TLSv1.2")
        assert (facts.cipher() or ("",))[0] == "ECDHE-ECDSA-CHACHA20-POLY1305"
        other = client(ca)
        other.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        other.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError, match=r"alert|closed|reset|^$"):
            await fetch(server, other)
        other = client(ca)
        other.set_ecdh_curve("prime256v1")
        with pytest.raises(OSError, match=r"alert|closed|reset|^$"):
            await fetch(server, other)
    async with running(write(f"tls_server_config: {{{PAIR}, min_version: TLS13}}")) as server:
        assert (await fetch(server, client(ca)))[1].version() == "TLSv1.3"
        older = client(ca)
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError, match=r"alert|closed|reset|^$"):
            await fetch(server, older)
        assert b"HTTP/1.1 200" not in await server.raw(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")


async def test_client_certificates(ca: Authority, write: Callable[[str], Path], tmp_path: Path) -> None:
    """Required: only with one of the CA. If given: without one too, but not with one of another CA."""
    ca.issue("server")
    good = ca.issue("prometheus")
    (tmp_path / "else").mkdir()
    foreign = Authority(tmp_path / "else", "foreign").issue("mallory")
    required = f"tls_server_config: {{{PAIR}, client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem}}"
    async with running(write(required)) as server:
        assert (await fetch(server, client(ca, good)))[0] == 200
        for pair in (None, foreign):
            with pytest.raises(OSError, match=r"alert|closed|reset"):
                await fetch(server, client(ca, pair))
    async with running(write(required.replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven"))) as server:
        for allowed in (good, None):
            assert (await fetch(server, client(ca, allowed)))[0] == 200
        with pytest.raises(OSError, match=r"alert|closed|reset"):
            await fetch(server, client(ca, foreign))


async def test_allowed_names_of_clients(ca: Authority, write: Callable[[str], Path]) -> None:
    """A certificate of the right CA needs one of the names too: DNS, IP address, e-mail or URI, exactly."""
    ca.issue("server")
    section = f"{PAIR}, client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem"
    allowed = "[prom.example.com, 10.1.2.3, 2001:db8::1, ops@example.com, 'spiffe://a/prom']"
    async with running(write(f"tls_server_config: {{{section}, client_allowed_sans: {allowed}}}")) as server:
        for number, san in enumerate(
            [
                x509.DNSName("prom.example.com"),
                x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
                x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
                x509.RFC822Name("ops@example.com"),
                x509.UniformResourceIdentifier("spiffe://a/prom"),
            ]
        ):
            pair = ca.issue(f"good{number}", [x509.DNSName("other"), san])
            assert (await fetch(server, client(ca, pair)))[0] == 200
        for number, san in enumerate([x509.DNSName("prom.example.com.evil"), x509.DNSName("example.com")]):
            with pytest.raises(OSError, match=r"alert|closed|reset"):
                await fetch(server, client(ca, ca.issue(f"bad{number}", [san])))
    async with running(write(f"tls_server_config: {{{section}, client_allowed_sans: []}}")) as server:
        with pytest.raises(OSError, match=r"alert|closed|reset"):
            await fetch(server, client(ca, ca.issue("nobody")))


def test_names_of_a_certificate_without_any() -> None:
    """A certificate without alternative names has none, whatever its common name; a broken address is left out."""
    assert names({"subject": ((("commonName", "prom.example.com"),),)}) == set()
    assert names({"subjectAltName": (("IP Address", "<invalid>"), ("DNS", "a"))}) == {"a"}


async def test_F31_silent_tls_clients_are_cut(ca: Authority, write: Callable[[str], Path]) -> None:
    """A client that never speaks TLS is closed in time, and others are served meanwhile."""
    ca.issue("server")
    limits = Limits(head_timeout=0.5)
    async with running(write(f"tls_server_config: {{{PAIR}}}"), limits=limits) as server:
        silent = [asyncio.create_task(server.raw(data)) for data in (b"", b"\x16\x03\x01")]
        assert (await fetch(server, client(ca)))[0] == 200
        begin = time.monotonic()
        assert await asyncio.gather(*silent) == [b"", b""]
        assert time.monotonic() - begin < 2


SLOW_TLS = """
import socket, ssl, sys
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
held = []
for _ in range(20):
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect(("127.0.0.1", int(sys.argv[1])))
    held.append(context.wrap_socket(plain))
    held[-1].sendall(b"GET /metrics HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
print("asked", flush=True)
sys.stdin.read()
"""


async def test_F30_slow_tls_readers_cost_little_and_end(ca: Authority, write: Callable[[str], Path]) -> None:
    """Over TLS, too, a client that reads nothing of a 10 MB page costs under 1 MiB, and is cut in time."""
    ca.issue("server")
    big = [b"a_metric 1\n" * 50_000] * 20
    limits = Limits(write_timeout=1.5)
    async with running(write(f"tls_server_config: {{{PAIR}}}"), limits=limits, exposition=expose(big)) as server:
        await fetch(server, client(ca))
        before = resident()
        slow = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SLOW_TLS, str(server.port), stdin=-1, stdout=-1
        )
        assert slow.stdout
        assert await slow.stdout.readline() == b"asked\n"
        await asyncio.sleep(0.5)
        assert (resident() - before) / 20 < 1 << 20
        assert (await fetch(server, client(ca)))[0] == 200
        await slow.communicate(b"")


# ---- while running ---------------------------------------------------------------------------------------------------


async def until(probe: Callable[[], Any], seconds: float = 5.0) -> None:
    """Waits until the coroutine function is true: within 5 s, as promised."""
    async with asyncio.timeout(seconds):
        while not await probe():  # noqa: ASYNC110 - what is waited for happens outside of this process's view
            await asyncio.sleep(0.1)


async def test_F35_certificate_and_users_rotate_without_a_reload(ca: Authority, write: Callable[[str], Path]) -> None:
    """A new certificate, then a new password and a new header, are in force within 5 s; keep-alive clients stay."""
    ca.issue("server")
    reloads: list[bool] = []
    path = write(f"tls_server_config: {{{PAIR}}}\n")
    async with running(WebConfig(path, reloads.append)) as server:

        async def serial() -> object:
            return ((await fetch(server, client(ca)))[1].getpeercert() or {})["serialNumber"]

        first = await serial()
        ca.issue("server")

        async def rotated() -> bool:
            return await serial() != first

        await until(rotated)
        write(f"tls_server_config: {{{PAIR}}}\nbasic_auth_users: {{ann: {HASH}}}\n")

        async def protected() -> bool:
            return (await fetch(server, client(ca)))[0] == 401

        await until(protected)
        assert reloads
        assert all(reloads)


async def test_F35_a_broken_file_keeps_the_last_good_one(ca: Authority, write: Callable[[str], Path]) -> None:
    """Broken, removed, emptied and half-rotated files change nothing and are reported; a good one is taken again."""
    certificate, key = ca.issue("server")
    good = f"tls_server_config: {{{PAIR}}}\nbasic_auth_users: {{ann: {HASH}}}\n"
    path = write(good)
    reloads: list[bool] = []
    config = WebConfig(path, reloads.append)
    before = config.current

    def mismatch() -> None:
        key.write_bytes(ca.issue("other")[1].read_bytes())

    breakages: list[Callable[[], object]] = [
        lambda: write("tls_server_config: ["),
        path.unlink,
        lambda: write(""),
        lambda: write(f"tls_server_config: {{{PAIR}}}\n"),
        lambda: write(f"basic_auth_users: {{ann: {HASH}}}\n"),
        lambda: write(good.replace("$2y$", "$9z$")),
        mismatch,
        certificate.unlink,
    ]
    for number, breakage in enumerate(breakages, 1):
        if number == 7:
            write(good)
        breakage()
        await config.refresh()
        assert reloads == [False] * number
        assert config.current is before
    ca.issue("server")
    await config.refresh()
    assert reloads[-1]
    assert config.current is not before
    calls = len(reloads)
    await config.refresh()
    assert len(reloads) == calls, "nothing changed, nothing is read"


async def test_rate_limit_survives_other_changes(write: Callable[[str], Path]) -> None:
    """A change of a header does not refill the bucket; a change of the limit does."""
    config = WebConfig(write("rate_limit: {interval: 1h, burst: 1}\n"))
    assert config.current.limiter.allow()
    write("rate_limit: {interval: 1h, burst: 1}\nhttp_server_config: {headers: {X-Frame-Options: deny}}\n")
    await config.refresh()
    assert config.current.headers == {"X-Frame-Options": "deny"}
    assert not config.current.limiter.allow()
    write("rate_limit: {interval: 1h, burst: 2}\n")
    await config.refresh()
    assert config.current.limiter.allow()


def test_users_without_the_extra_are_refused(write: Callable[[str], Path]) -> None:
    """Where bcrypt is not installed the file is refused with the name of the extra."""
    script = (
        "import sys, pathlib\n"
        "sys.modules['bcrypt'] = None\n"
        "from exporter.web.security import WebConfig\n"
        "WebConfig(pathlib.Path(sys.argv[1]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(write(f"basic_auth_users: {{ann: {HASH}}}\n"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ,
    )
    assert "basic_auth_users: needs the package bcrypt: pip install 'blueking-exporter[web-auth]'" in result.stderr
