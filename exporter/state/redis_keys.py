"""How keys are named and read in Redis, and the client that a configuration asks for."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from exporter.config.schema import State, Tls
from exporter.config.state_url import RedisUrl
from exporter.config.tls import TlsFileError, client_context
from exporter.model import Key, Scope
from exporter.state.base import SCHEMA, Stored
from exporter.state.redis_client import (
    BEAT,
    CLAIM,
    COMMIT,
    FORGET,
    RELEASE,
    RUN_ID,
    Client,
    Command,
    Credentials,
    RedisClient,
    RunId,
    script,
)
from exporter.telemetry import Telemetry


class Found(msgspec.Struct, frozen=True):
    """Who may commit a key, the number of its newest commit and the form of its payload."""

    own: str
    epoch: int
    ver: int
    schema: int


def read_found(values: Sequence[bytes | None]) -> Found:
    """The answer to `Keyspace.peek`."""
    own, epoch, ver, schema = values
    return Found((own or b"").decode(), int(epoch or 0), int(ver or 0), int(schema or 0))


def read_reply(answer: Sequence[Any]) -> tuple[int, str, int]:
    """Outcome, owner and epoch that a script has returned."""
    code, own, epoch = answer
    return code, own.decode(), int(epoch)


class Keyspace:
    """The keys below one prefix. A key whose name cannot be read is somebody else's."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.members = f"{prefix}members"

    def name(self, key: Key) -> str:
        return f"{self._prefix}s:{key.collector}:{key.scope.bk_scope_type}:{key.scope.bk_scope_id}"

    def peek(self, key: Key) -> Command:
        """What `read_found` reads."""
        return ("HMGET", self.name(key), "own", "epoch", "ver", "schema")

    def claim(self, key: Key, me: str, seen: Found, epoch: int) -> Command:
        return script(CLAIM, self.name(key), me, seen.own, str(seen.epoch), str(epoch))

    def commit(
        self, key: Key, me: str, epoch: int, ver: int, payload: bytes, now: float, run: str | RunId = RUN_ID
    ) -> Command:
        """`now`: unix seconds; `run`: the process of the server that takes the commit."""
        fields = (str(epoch), str(ver), run, str(int(now)), str(SCHEMA), payload)
        return script(COMMIT, self.name(key), me, *fields)

    def release(self, key: Key, me: str, epoch: int) -> Command:
        return script(RELEASE, self.name(key), me, str(epoch))

    async def forget(
        self, client: Client, keys: Sequence[Key], where: Callable[[str, float], bool] = lambda own, updated: True
    ) -> int:
        """Remove those of `keys` for whose owner and time of the last commit (unix seconds) `where` is true, unless
        they change meanwhile. Returns how many."""
        found = await client.run(*(("HMGET", self.name(key), "own", "epoch", "upd") for key in keys)) if keys else []
        commands = []
        for key, values in zip(keys, found, strict=True):
            own, epoch, upd = (value.decode() if value else "" for value in values)
            if where(own, float(upd or 0)):
                commands.append(script(FORGET, self.name(key), own, epoch or "0", upd))
        return sum(await client.run(*commands)) if commands else 0

    async def scan(self, client: Client) -> AsyncIterator[list[Key]]:
        """All keys that have a state, some at a time."""
        pattern = f"{self._prefix}s:*"
        cursor = b"0"
        while True:
            ((cursor, names),) = await client.run(("SCAN", cursor, "MATCH", pattern, "COUNT", 500))
            if keys := [key for name in names if (key := self._parse(name))]:
                yield keys
            if cursor == b"0":
                return

    async def load(self, client: Client, key: Key) -> Stored | None:
        """What has been committed last, whoever has the key."""
        ((payload,),) = await client.run(("HMGET", self.name(key), "p"))
        return None if payload is None else Stored(payload)

    async def updated(self, client: Client) -> dict[Key, float]:
        """Every key that has a payload, and when that was committed, unix seconds."""
        found: dict[Key, float] = {}
        async for keys in self.scan(client):
            times = await client.run(*(("HMGET", self.name(key), "upd") for key in keys))
            found |= {key: float(at) for key, (at,) in zip(keys, times, strict=True) if at is not None}
        return found

    def probe(self) -> list[Command]:
        """Every command that is used, on a key of its own, so that a missing right is found at once."""
        key = f"{self._prefix}probe:{secrets.token_hex(4)}"
        return [
            # First alone: of a command in a script that is forbidden the server does not tell the name.
            ("HSET", key, "probe", "1"),
            ("HGET", key, "probe"),
            ("HMGET", key, "probe"),
            ("HGETALL", key),
            ("HDEL", key, "probe"),
            ("DEL", key),
            script(BEAT, key, "x", "0", "1", "x", "1"),
            script(CLAIM, key, "x", "", "0", "1"),
            script(COMMIT, key, "x", "1", "1", "", "0", str(SCHEMA), b""),
            script(RELEASE, key, "x", "1"),
            script(FORGET, key, "", "1", "0"),
            ("SCAN", "0", "MATCH", key, "COUNT", 1),
            ("WAIT", 0, 1),
            ("DEL", key),
        ]

    def _parse(self, name: bytes) -> Key | None:
        parts = name.decode(errors="replace").removeprefix(f"{self._prefix}s:").split(":")
        return Key(parts[0], Scope(parts[1], parts[2])) if len(parts) == 3 else None  # type: ignore[arg-type]


def budget(state: State) -> float:
    """Seconds for connecting, and for one pipeline: a heartbeat must fail in time for another one."""
    return min(state.lease_ttl / 5, 2.0)


def connect_to(state: State, telemetry: Telemetry) -> RedisClient:
    """The client that `state` describes; it connects when it is used."""
    url = state.url
    assert isinstance(url, RedisUrl)
    return RedisClient(
        url,
        credentials=Credentials(state.username or url.username, state.password or url.password),
        sentinel_credentials=Credentials("", state.sentinel_password),
        tls=_tls(url, state.tls),
        budget=budget(state),
        wait_replicas=int(url.sentinels) if state.wait_replicas is None else state.wait_replicas,
        probe=Keyspace(state.key_prefix).probe(),
        telemetry=telemetry,
    )


def _tls(url: RedisUrl, tls: Tls) -> Callable[[], tuple[ssl.SSLContext, str | None]] | None:
    """What makes the TLS context of one connection, anew each time since the files may have changed."""
    if url.scheme != "rediss" and not (url.sentinels and tls != Tls()):
        return None

    def context() -> tuple[ssl.SSLContext, str | None]:
        try:
            return client_context(tls), tls.server_name
        except TlsFileError as error:
            raise OSError(f"state.tls.{error.key}: {error}") from None

    return context
