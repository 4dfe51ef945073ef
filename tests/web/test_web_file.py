"""The web configuration file: what is taken, what is refused and with which words, and what it does on the wire."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import itertools
import json
import os
import site
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from cryptography import x509

from exporter.config import schema
from exporter.errors import ConfigError
from exporter.web.connection import Limits, names
from exporter.web.security import CHECK_FILES, LONGEST_PASSWORD, TokenBucket, Users, WebConfig, credentials
from tests.support.certificates import Authority
from tests.support.components import eventually
from tests.support.paths import ROOT
from tests.support.process import Daemon, Simulated, configuration
from tests.support.web import Running, expose, parsed, resident, running

HASH = bcrypt.hashpw(b"s3cret", bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$", 1)
OTHER = bcrypt.hashpw(b"0ther", bcrypt.gensalt(4)).decode()


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
"""Name → text, the place of the mistake in it, a part of the message."""


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


def test_what_ssl_cannot_do_is_reported_beside_other_problems(write: Callable[[str], Path]) -> None:
    """Contract 2: all errors at once, also where the certificate cannot be read."""
    settings = "client_auth_type: RequestClientCert, curve_preferences: [CurveP256, CurveP384]"
    with pytest.raises(ConfigError) as error:
        WebConfig(write(f"tls_server_config: {{cert_file: none.pem, key_file: none.pem, {settings}}}"))
    keys = ["cert_file", "key_file", "client_auth_type", "curve_preferences"]
    assert [problem.path for problem in error.value.problems] == [f"tls_server_config.{key}" for key in keys]


def test_rules_between_keys_are_reported_beside_other_problems(write: Callable[[str], Path]) -> None:
    """Contract 2: all errors at once, also where one of the keys of a rule is wrong by itself."""
    settings = "cert: x, cert_file: none.pem, client_ca_file: none.pem, min_version: TLS13, max_version: TLS12"
    with pytest.raises(ConfigError) as error:
        WebConfig(write(f"tls_server_config: {{{settings}}}"))
    problems = [str(problem).partition("tls_server_config.")[2] for problem in error.value.problems]
    assert problems == [
        "key: is required: give key_file or key",
        "cert: want PEM text",
        "cert: given beside cert_file; want exactly one of them",
        "cert_file: cannot be read: No such file or directory",
        "client_ca_file: cannot be read: No such file or directory",
        "client_ca_file: has no effect without client_auth_type; want RequireAndVerifyClientCert beside it",
        "max_version: TLS12 is below min_version TLS13",
    ]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The file must exist at the start."""
    with pytest.raises(ConfigError, match=r"web\.yml:1:1: cannot be read: No such file"):
        WebConfig(tmp_path / "web.yml")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["web.yml", "server.crt", "server.key", "ca.pem"])
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_F56_only_regular_files_are_read(
    kind: str, name: str, ca: Authority, write: Callable[[str], Path], tmp_path: Path
) -> None:
    """A pipe, directory, device or socket is refused at once, at the start and while running; the last good version
    stays."""
    ca.issue("server")
    section = f"{PAIR}, client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem"
    file = write(f"tls_server_config: {{{section}}}\n")
    reloads: list[bool] = []
    config = WebConfig(file, reloads.append)
    before = config.current
    (tmp_path / name).rename(tmp_path / "away")
    SPECIAL[kind](tmp_path / name)
    words = "is a directory" if kind == "directory" else "is no regular file"
    (problem,) = await config.refresh()
    assert f"cannot be read: {words}" in str(problem).replace("Is a", "is a")
    assert (reloads, config.current) == ([False], before)
    with pytest.raises(ConfigError, match="cannot be read"):
        WebConfig(file)


def test_F56_reload_and_stop_with_a_pipe_as_web_file(tmp_path: Path, write: Callable[[str], Path]) -> None:
    """The daemon answers a reload with the error, keeps its users, and ends on SIGTERM."""
    file = write(f"basic_auth_users: {{ann: {HASH}}}\n")
    headers = {"Authorization": authorization("ann", "s3cret")}
    with Simulated() as simulated:
        arguments = (f"--web.config.file={file}", "--web.enable-lifecycle")
        with Daemon(tmp_path, configuration(simulated.url), *arguments) as daemon:
            file.unlink()
            os.mkfifo(file)
            status, body = daemon.get("/-/reload", data=b"", headers=headers, timeout=20)
            assert (status, b"web_config_file: cannot be read: is no regular file" in body) == (500, True)
            assert daemon.get("/metrics")[0] == 401
            assert daemon.get("/metrics", headers=headers)[0] == 200
            assert daemon.stop() == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tls_server_config: null\nbasic_auth_users:\n",
        f"tls_server_config: {{{PAIR}, prefer_server_cipher_suites: false, curve_preferences: [CurveP521]}}",
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


CURVE = """
import pathlib, sys
from exporter.web.security import WebConfig
try:
    WebConfig(pathlib.Path(sys.argv[1]))
except Exception as error:
    print(error)
else:
    print("taken")
"""


@pytest.mark.parametrize("python", ["/usr/bin/python3", sys.executable])
def test_X25519_is_taken_or_refused_by_the_version(python: str, ca: Authority, write: Callable[[str], Path]) -> None:
    """Python can be restricted to X25519 since 3.11.4; an older one, as Debian 12 has it, says so."""
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=False).stdout.split()[-1:]
    if not version or not version[0].startswith("3.11."):
        pytest.skip(f"{python} is no Python 3.11, which the packages of this environment are built for")
    ca.issue("server")
    file = write(f"tls_server_config: {{{PAIR}, curve_preferences: [X25519]}}")
    packages = os.pathsep.join((str(ROOT), *site.getsitepackages()))
    result = subprocess.run(
        [python, "-c", CURVE, file], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": packages},
        check=False,
    )  # fmt: skip
    if int(version[0].split(".")[2]) >= 4:
        assert result.stdout == "taken\n", result.stderr
    else:
        assert result.stdout.startswith(f"{file}:1:"), result.stderr
        assert f"curve_preferences: Python {version[0]} with OpenSSL" in result.stdout
        assert "needs Python 3.11.4; want CurveP256, CurveP384 or CurveP521" in result.stdout


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
    async with running(config, settings=schema.Server(enable_lifecycle=True)) as server:
        for path in ("/", "/metrics", "/-/healthy", "/-/ready", "/api/v1/status", "/api/v1/failures", "/nothing"):
            status, headers, body = await server.get(path)
            assert (status, body) == (401, b"Unauthorized\n")
            assert headers["www-authenticate"].startswith("Basic ")
        assert (await server.get("/-/reload", method="POST"))[0] == 401
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200
        assert (await server.get("/metrics", basic("bob", "0ther")))[0] == 200
        assert (await server.get("/metrics", basic("bob", "s3cret")))[0] == 401
        assert (await server.get("/nothing", basic("ann", "s3cret")))[0] == 404


async def test_health_without_auth(write: Callable[[str], Path]) -> None:
    """With `health_without_auth` only the two health checks need no user; the rate limit covers them."""
    config = write(f"basic_auth_users: {{ann: {HASH}}}\nrate_limit: {{interval: 1h, burst: 9}}\n")
    async with running(config, settings=schema.Server(health_without_auth=True)) as server:
        assert (await server.get("/-/healthy"))[0] == 200
        assert (await server.get("/-/ready", basic("ann", "wrong")))[0] == 200
        for path in ("/", "/metrics", "/api/v1/status", "/-/healthy/", "/-/reload"):
            assert (await server.get(path))[0] == 401
        assert (await server.get("/-/healthy", method="POST"))[0] == 405
        assert (await server.get("/-/healthy"))[0] == 200
        assert (await server.get("/-/healthy"))[0] == 429


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
async def test_F35_unusual_credentials_are_a_401(write: Callable[[str], Path], header: str) -> None:
    """Unknown users, wrong, over-long and broken passwords are refused, never a 500, also when asked twice."""
    async with running(write(f"basic_auth_users: {{ann: {HASH}}}\n")) as server:
        assert (await server.get("/metrics", header))[0] == 401
        assert (await server.get("/metrics", header))[0] == 401


CLIENT = ("192.0.2.1", 40_000)


class Checks:
    """Stands in for bcrypt: counts the checks, each of which takes a moment or, while `held`, until it is released."""

    def __init__(self) -> None:
        self.passwords: list[bytes] = []
        self.costs: list[int] = []
        self.released = threading.Event()
        self.released.set()

    def __call__(self, password: bytes, hashed: str) -> bool:
        self.passwords.append(password)
        self.costs.append(int(hashed[4:6]))
        assert self.released.wait(20)
        time.sleep(0.002)
        return password == b"s3cret"


def authorization(user: str, password: str) -> str:
    return basic(user, password).partition(" ")[2]


async def test_F35_unknown_users_cost_as_much_as_known_ones() -> None:
    """A known user, an unknown one and a password that cannot be right cost one check of the same strength each; a
    password that was right or wrong before costs none."""
    users = {"ann": HASH.replace("$04$", "$08$"), "bob": OTHER}
    checks = Checks()
    door = Users(checks)
    for user, password in (("ann", "wrong"), ("nobody", "wrong"), ("ann", "x" * 80), ("ann", "s3cret\0")):
        assert not await door.admits(authorization(user, password), users, CLIENT)
    assert await door.admits(authorization("ann", "s3cret"), users, CLIENT)
    assert checks.costs == [8, 8, 8, 8, 8]
    assert await door.admits(authorization("ann", "s3cret"), users, CLIENT)
    assert not await door.admits(authorization("ann", "wrong"), users, CLIENT)
    assert len(checks.costs) == 5
    await door.admits(authorization("ann", "s3cret"), {"ann": OTHER}, CLIENT)
    assert len(checks.costs) == 6, "right for another hash is not remembered"


@pytest.mark.parametrize("keep", [True, False], ids=["on one connection each", "on a new connection each time"])
async def test_F63_guesses_do_not_lock_a_right_user_out(keep: bool) -> None:
    """While forty clients guess at full speed from the same address, users whose passwords are right, and that nobody
    remembers, get in after a few checks, not after those of all who wait."""
    checks = Checks()
    door = Users(checks)
    users = {"ann": HASH} | {f"user {number}": HASH for number in range(20)}
    ports = itertools.count(1)

    async def guess(number: int) -> None:
        port = next(ports)
        for turn in itertools.count():
            port = port if keep else next(ports)
            assert not await door.admits(authorization("ann", f"{number} {turn}"), users, (CLIENT[0], port))

    guessers = [asyncio.create_task(guess(number)) for number in range(40)]
    waited = []
    for number in range(20):
        before = len(checks.passwords)
        while len(checks.passwords) < before + 10:  # noqa: ASYNC110 - threads have no events for the loop
            await asyncio.sleep(0.001)
        before = len(checks.passwords)
        assert await door.admits(authorization(f"user {number}", "s3cret"), users, (CLIENT[0], next(ports)))
        waited.append(len(checks.passwords) - before)
    for guesser in guessers:
        guesser.cancel()
    assert sorted(waited)[10] <= 5
    assert max(waited) <= 20


async def test_F63_guesses_from_another_address_wait() -> None:
    """A client that has not guessed goes first: after the check that is running."""
    checks = Checks()
    door = Users(checks)
    users = {"ann": HASH, "bob": HASH}
    checks.released.clear()
    guesses = [
        asyncio.create_task(door.admits(authorization("ann", f"{number}"), users, ("192.0.2.66", number)))
        for number in range(10)
    ]
    await asyncio.to_thread(eventually, lambda: checks.passwords)
    checks.released.set()
    await guesses[0]
    before = len(checks.passwords)
    assert await door.admits(authorization("bob", "s3cret"), users, CLIENT)
    assert checks.passwords[before - 1 :].index(b"s3cret") <= 2
    assert set(await asyncio.gather(*guesses)) == {False}


async def test_F63_the_same_password_is_checked_once() -> None:
    """Ten first scrapes of one user at once are one check."""
    checks = Checks()
    door = Users(checks)
    scrapes = (door.admits(authorization("ann", "s3cret"), {"ann": HASH}, CLIENT) for _ in range(10))
    assert await asyncio.gather(*scrapes) == [True] * 10
    assert len(checks.passwords) == 1


async def test_a_check_that_breaks_fails_its_request_only(write: Callable[[str], Path]) -> None:
    """An error inside a check is a 500 for that request; the next one is checked."""

    def matches(password: bytes, hashed: str) -> bool:
        if password == b"odd":
            raise RuntimeError("broken")
        return password == b"s3cret"

    config = WebConfig(write(f"basic_auth_users: {{ann: {HASH}}}\n"))
    config.users = Users(matches)
    async with running(config) as server:
        assert (await server.get("/metrics", basic("ann", "odd")))[0] == 500
        assert (await server.get("/metrics", basic("ann", "wrong")))[0] == 401
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200


async def test_F63_a_client_that_left_is_not_checked(write: Callable[[str], Path]) -> None:
    """Guesses of closed connections are dropped, but for the one that is being checked."""
    config = WebConfig(write(f"basic_auth_users: {{ann: {HASH}}}\n"))
    config.users = Users(checks := Checks())
    checks.released.clear()
    async with running(config) as server:
        first = asyncio.create_task(server.get("/metrics", basic("ann", "first")))
        await asyncio.to_thread(eventually, lambda: checks.passwords)
        open_files = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"GET / HTTP/1.1\r\nHost: a\r\n{basic('ann', str(number))}\r\n\r\n".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        await asyncio.to_thread(eventually, lambda: len(os.listdir("/proc/self/fd")) == open_files)
        last = asyncio.create_task(server.get("/metrics", basic("ann", "s3cret")))
        checks.released.set()
        assert (await first)[0] == 401
        assert (await last)[0] == 200
        assert checks.passwords == [b"first", b"s3cret"]


def test_credentials() -> None:
    """The scheme is case-insensitive, the password may hold colons."""
    encoded = base64.b64encode("änn:a:b".encode()).decode()
    assert credentials(f"bAsIc {encoded}") == ("änn", b"a:b")
    assert credentials("") == (None, b"")


# ---- headers and rate limit ------------------------------------------------------------------------------------------


async def test_F63_every_guess_gets_its_answer(write: Callable[[str], Path]) -> None:
    """Over HTTP: many guesses at once are a 401 each, and a right password gets in meanwhile."""
    async with running(write(f"basic_auth_users: {{ann: {HASH}}}\n")) as server:
        guesses = asyncio.gather(*(server.get("/metrics", basic("ann", f"guess {n}")) for n in range(60)))
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 200
        assert {status for status, _, _ in await guesses} == {401}


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
    """After the burst requests are a 429, before any password is checked."""
    async with running(write(f"rate_limit: {{interval: 1h, burst: 3}}\nbasic_auth_users: {{ann: {HASH}}}\n")) as server:
        assert [(await server.get("/metrics"))[0] for _ in range(4)] == [401, 401, 401, 429]
        assert (await server.get("/metrics", basic("ann", "s3cret")))[0] == 429


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
        answer = await asyncio.wait_for(reader.read(), 30)
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
        assert await asyncio.gather(*silent) == [b"", b""]


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


async def until(probe: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits until the coroutine function is true."""
    async with asyncio.timeout(seconds):
        while not await probe():  # noqa: ASYNC110 - what is waited for happens outside of this process's view
            await asyncio.sleep(0.1)


async def test_F35_certificate_and_users_rotate_without_a_reload(ca: Authority, write: Callable[[str], Path]) -> None:
    """A new certificate, then a new password and a new header, are in use within 5 s (F55)."""
    assert 3 * CHECK_FILES < 5, "a change is seen, seen again unchanged, and read"
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


async def test_F55_the_authority_of_clients_rotates(
    ca: Authority, write: Callable[[str], Path], tmp_path: Path
) -> None:
    """A client CA that is replaced in place is used for new connections; the old one no longer counts."""
    ca.issue("server")
    old = ca.issue("prometheus")
    (tmp_path / "new").mkdir()
    authority = Authority(tmp_path / "new")
    new = authority.issue("prometheus")
    section = f"{PAIR}, client_auth_type: RequireAndVerifyClientCert, client_ca_file: clients.pem"
    (tmp_path / "clients.pem").write_bytes(ca.file.read_bytes())
    async with running(write(f"tls_server_config: {{{section}}}")) as server:
        assert (await fetch(server, client(ca, old)))[0] == 200
        (tmp_path / "clients.pem").write_bytes(authority.file.read_bytes())

        async def rotated() -> bool:
            try:
                return (await fetch(server, client(ca, new)))[0] == 200
            except OSError:
                return False

        await until(rotated)
        with pytest.raises(OSError, match=r"alert|closed|reset"):
            await fetch(server, client(ca, old))


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
