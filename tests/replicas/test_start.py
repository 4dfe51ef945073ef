"""Stores that do not fit: one clear line and exit 1, or a warning, and never the password."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from exporter.config.schema import State, Tls
from exporter.config.secret import Secret
from exporter.config.state_url import StateUrl
from exporter.errors import StateError, StateUnreachable
from exporter.state.redis_keys import connect_to
from exporter.telemetry import Telemetry
from tests.support.certificates import Authority
from tests.support.components import ENGINES, Redis, Stack, eventually, free_port
from tests.support.process import BIZ, Daemon, Simulated, command, configuration

pytestmark = pytest.mark.component

PASSWORD = "hunter2-canary"
RIGHTS = ("eval", "hset", "hget", "hmget", "hgetall", "hdel", "del", "scan", "info", "role", "wait")
"""What docs/en/scale-out.md says that the user needs."""


def connect(url: str, **state: Any) -> None:
    """Connect as a start does, and say PING by a pipeline. Raises StateError."""

    async def once() -> None:
        client = connect_to(State(url=StateUrl().parse(url, Path("/")), lease_ttl=3.0, **state), Telemetry())
        try:
            await client.connect()
            await client.run(("HMGET", "blueking:none", "own"))
        finally:
            await client.close()
            await asyncio.sleep(0.05)  # asyncio closes what failed in the TLS handshake a little later

    asyncio.run(once())


def refused(url: str, **state: Any) -> str:
    with pytest.raises(StateError) as caught:
        connect(url, **state)
    assert not isinstance(caught.value, StateUnreachable), "it would be tried again"
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def address(server: Redis, credentials: str = "", db: int = 0) -> str:
    return f"redis://{credentials}127.0.0.1:{server.port}/{db}"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_password_is_refused(stack: Stack, tmp_path: Path, engine: str) -> None:
    """None, a wrong one, a wrong user; the right one is taken from the address, a value or a file."""
    server = stack.redis("--requirepass", "the-right-one", engine=engine)
    for credentials in ("", f":{PASSWORD}@", f"somebody:{PASSWORD}@"):
        told = f"state redis://127.0.0.1:{server.port}/0: user or password is refused"
        assert refused(address(server, credentials)).startswith(told)
    secret = tmp_path / "password"
    secret.write_text("the-right-one\n")
    connect(address(server, ":the-right-one@"))
    connect(address(server), password=Secret("the-right-one"))
    connect(address(server, db=3), password=Secret.from_file(secret), username="default")


@pytest.mark.parametrize("engine", ENGINES)
def test_each_missing_right_is_named(stack: Stack, engine: str) -> None:
    """A user with the documented rights works; without any one of them the connection fails and names it."""
    server = stack.redis(engine=engine)

    def allow(*rights: str) -> None:
        rules = ["resetkeys", "~blueking:*", "-@all", *(f"+{right}" for right in rights)]
        server.ask("ACL", "SETUSER", "exporter", "reset", "on", ">right", *rules)

    allow(*RIGHTS)
    connect(address(server, "exporter:right@"))
    for missing in RIGHTS:
        allow(*(right for right in RIGHTS if right != missing))
        told = refused(address(server, "exporter:right@"))
        assert "a right is missing" in told
        assert missing in told.lower()
    allow(*RIGHTS)
    assert "a right is missing" in refused(address(server, "exporter:right@"), key_prefix="other:")
    server.ask("FLUSHALL")
    connect(address(server, "exporter:right@"))
    assert server.ask("KEYS", "*") == [], "the probe leaves nothing"


def test_servers_that_cannot_keep_the_state_are_refused(stack: Stack) -> None:
    """A replica, a cluster, one that evicts any key when its memory is full."""
    primary = stack.redis()
    replica = stack.redis("--replicaof", f"127.0.0.1 {primary.port}")
    assert "the server is a replica, its primary is needed" in refused(address(replica))
    cluster = stack.redis("--cluster-enabled", "yes")
    assert "Redis Cluster is not supported" in refused(address(cluster))
    primary.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    connect(address(primary))  # without a limit nothing is evicted
    primary.ask("CONFIG", "SET", "maxmemory", "100mb")
    assert "maxmemory-policy allkeys-lru evicts counts" in refused(address(primary))


INFO = b"redis_version:%b\r\nredis_mode:standalone\r\nrun_id:x\r\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (INFO % b"6.2.14", "the server has version 6.2.14, at least 7.0 is needed"),
        (INFO % b"5.0.7", "the server has version 5.0.7"),
        (None, "the server does not speak the protocol of Redis"),
    ],
)
async def test_an_old_server_and_no_server(answer: bytes | None, told: str) -> None:
    """Too old by its INFO; or something that is no Redis, such as a web server."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        # To CLIENT SETINFO twice, ROLE and INFO.
        ok, role = b"+OK\r\n", b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"
        info = answer and b"$%d\r\n%b\r\n" % (len(answer), answer)
        writer.write(ok * 2 + role + info if info else b"HTTP/1.1 400 Bad Request\r\n\r\n")
        while await reader.read(4096):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = StateUrl().parse(f"redis://127.0.0.1:{port}", Path("/"))
        client = connect_to(State(url=url), Telemetry())
        with pytest.raises(StateError, match=told):
            await client.connect()
        await client.close()
        await asyncio.sleep(0.05)  # until `serve` has noticed


def test_a_sentinel_that_does_not_know_the_name(stack: Stack) -> None:
    """The sentinel's own words; with the right name its server is reached, by TCP or by a socket of this machine."""
    server = stack.redis()
    sentinel = stack.sentinel(server)
    known = f"redis+sentinel://127.0.0.1:{sentinel.port},127.0.0.1:{free_port()}"
    assert f"the sentinel 127.0.0.1:{sentinel.port}: No such master with that name" in refused(f"{known}/other")
    with pytest.raises(StateUnreachable, match="0 of 1 replicas have acknowledged"):
        connect(f"{known}/blueking")  # it has no replica, and 1 is the default
    with pytest.raises(StateUnreachable):
        connect(f"redis+sentinel://127.0.0.1:{free_port()}/blueking")


def test_a_socket_of_this_machine(stack: Stack, tmp_path: Path) -> None:
    """unix:// reaches a server by its socket, with password and database."""
    path = tmp_path / "redis.sock"
    stack.redis("--unixsocket", str(path), "--requirepass", "right")
    connect(f"unix://:right@{path}?db=1")
    assert "user or password is refused" in refused(f"unix://:{PASSWORD}@{path}")


def test_tls_is_verified(stack: Stack, tmp_path: Path) -> None:
    """rediss:// with the right authority; another one, another name, and the authorities of the system are refused."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    cert, key = authority.issue("store", [x509.DNSName("store")])
    server = stack.redis(
        "--tls-port", str(port := free_port()), "--tls-cert-file", str(cert), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(authority.file), "--tls-auth-clients", "no",
    )  # fmt: skip
    assert server.ask("PING")
    url = f"rediss://127.0.0.1:{port}"
    connect(url, tls=Tls(ca_file=authority.file, server_name="store"))
    connect(url, tls=Tls(insecure_skip_verify=True))
    for wrong in (Tls(ca_file=authority.file), Tls(ca_file=other.file, server_name="store"), Tls(server_name="store")):
        assert "certificate verify failed" in refused(url, tls=wrong)


def daemon(folder: Path, simulated: Simulated, url: str, **state: Any) -> Daemon:
    return Daemon(folder, configuration(simulated.url, state={"url": url, "lease_ttl": "3s", **state}))


def test_the_daemon_ends_with_one_line(stack: Stack, tmp_path: Path, simulated: Simulated) -> None:
    """Exit 1 and no traceback, for a store that does not fit."""
    server = stack.redis("--requirepass", "right")
    done = command("run", f"--config.file={daemon(tmp_path, simulated, address(server, f':{PASSWORD}@')).file}")
    (line,) = [line for line in done.stderr.splitlines() if "level=warning" not in line]
    assert done.returncode == 1
    assert line.startswith(f"blueking-exporter: state redis://127.0.0.1:{server.port}/0: user or password is refused")
    assert PASSWORD not in done.stderr


def test_a_store_that_is_not_there_yet_is_waited_for(stack: Stack, tmp_path: Path, simulated: Simulated) -> None:
    """Started before its store: it listens, is not ready, says so once, shows nothing of any scope, and begins when the
    store comes. A store without persistence and with eviction of expiring keys is warned about."""
    port = free_port()
    with daemon(tmp_path, simulated, f"redis://127.0.0.1:{port}") as running:
        eventually(lambda: "event=state_unreachable" in running.log)
        assert running.get("/-/ready")[0] == 503
        assert not [name for name, labels in running.metrics() if dict(labels).get("bk_scope_id")]
        stack.redis("--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru", port=port)
        running.wait_success(BIZ)
        running.wait_ready()
        assert running.log.count("event=state_unreachable") <= 2
        for event in ("state_may_be_evicted policy=volatile-lru", "state_not_persistent"):
            assert f"event={event}" in running.log


def test_nothing_listens_on_a_port_that_a_test_gives(stack: Stack) -> None:
    """A port that no server listens on is a store that may come: never a refusal."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(StateUnreachable):
            connect(f"redis://127.0.0.1:{closed.getsockname()[1]}")
