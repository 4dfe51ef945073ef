"""The state in Redis for a command that works on all keys. No replica may run at the same time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence, Set

from exporter.config.schema import State
from exporter.errors import StateError, StateLocked
from exporter.model import Key
from exporter.state.base import Stored
from exporter.state.redis_client import CLAIM, COMMIT, FORGET, RELEASE, RUN_ID, script
from exporter.state.redis_keys import SCHEMA, Keyspace, connect_to, read_found, read_reply

PATIENCE = 1.6
"""Seconds in which a replica that runs changes its entry in the table of members; it does so twice a second."""


class _Silent:
    def state_roundtrip(self, seconds: float) -> None: ...

    def state_acknowledged(self, replicas: int) -> None: ...


class ExclusiveRedisStore:
    """See `Store`. `open` looks whether a replica runs, and raises `StateLocked` with its name unless `read_only`.

    A key belongs to the command for one commit only, so that replicas that start afterwards can take it at once.
    """

    def __init__(self, state: State) -> None:
        self.resets = 0
        self._state = state
        self._keys = Keyspace(state.key_prefix)
        self._client = connect_to(state, _Silent())
        self._idle: Set[str] = frozenset()
        self._me = f"command.{secrets.token_hex(4)}"

    async def open(self, *, read_only: bool = False) -> None:
        await self._client.connect()
        if read_only:
            return
        before = await self._members()
        self._idle = before.keys()
        if before:
            await asyncio.sleep(PATIENCE)
            after = await self._members()
            running = sorted(name for name, value in after.items() if before.get(name) != value)
            if running:
                names = ", ".join(name.rpartition(".")[0] for name in running)
                raise StateLocked(f"state {self._state.url} is in use by {names}: stop all replicas first")

    async def load(self, key: Key) -> Stored | None:
        ((payload,),) = await self._client.run(("HMGET", self._keys.name(key), "p"))
        return None if payload is None else Stored(payload)

    def ensure(self, key: Key) -> None:
        """It belongs to this process."""

    async def commit(self, key: Key, payload: bytes) -> None:
        values, members = await self._client.run(self._keys.peek(key), ("HGETALL", self._keys.members))
        seen = read_found(values)
        if seen.own in _table(members).keys() - self._idle:
            raise StateError(f"a replica has taken {key} meanwhile: stop all replicas first")
        epoch = max(seen.epoch, int(time.time() * 1000)) + 1
        name = self._keys.name(key)
        claimed, committed, _ = await self._client.run(
            script(CLAIM, name, self._me, seen.own, str(seen.epoch), str(epoch)),
            script(
                COMMIT,
                name,
                self._me,
                str(epoch),
                str(seen.ver + 1),
                RUN_ID,
                str(int(time.time())),
                str(SCHEMA),
                payload,
            ),
            script(RELEASE, name, self._me, str(epoch)),
        )
        if read_reply(claimed)[0] != 1 or read_reply(committed)[0] != 1:
            raise StateError(f"a replica has taken {key} meanwhile: stop all replicas first")

    async def keys(self) -> dict[Key, float]:
        return await self._keys.updated(self._client)

    async def forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            (values,) = await self._client.run(("HMGET", self._keys.name(key), "own", "epoch", "upd"))
            own, epoch, upd = (value.decode() if value else "" for value in values)
            await self._client.run(script(FORGET, self._keys.name(key), own, epoch or "0", upd))

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        return 0

    async def check(self) -> bool:
        return True

    async def size(self) -> int | None:
        return None

    async def close(self) -> None:
        await self._client.close()

    async def _members(self) -> dict[str, str]:
        (flat,) = await self._client.run(("HGETALL", self._keys.members))
        return _table(flat)


def _table(flat: Sequence[bytes]) -> dict[str, str]:
    return dict(zip(map(bytes.decode, flat[::2]), map(bytes.decode, flat[1::2]), strict=True))
