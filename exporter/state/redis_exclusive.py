"""The state in Redis for a command that works on all keys. No replica may run at the same time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Set

from exporter.config.schema import State
from exporter.errors import StateError, StateLocked
from exporter.model import Key
from exporter.state.base import Store, Stored
from exporter.state.redis_client import text_fields
from exporter.state.redis_keys import Keyspace, connect_to, read_found, read_reply
from exporter.telemetry import Telemetry

PATIENCE = 1.6
"""Seconds in which a replica that runs changes its entry in the table of members; it does so twice a second."""


class ExclusiveRedisStore(Store):
    """See `Store`. `open` checks whether a replica runs, and raises `StateLocked` with its name unless `read_only`.

    A key belongs to the command for one commit only, so that replicas that start afterwards can take it at once.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._keys = Keyspace(state.key_prefix)
        self._client = connect_to(state, Telemetry())
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
        return await self._keys.load(self._client, key)

    async def commit(self, key: Key, payload: bytes) -> None:
        values, members = await self._client.run(self._keys.peek(key), ("HGETALL", self._keys.members))
        seen = read_found(values)
        if seen.own not in text_fields(members).keys() - self._idle:
            epoch = max(seen.epoch, int(time.time() * 1000)) + 1
            claimed, committed, _ = await self._client.run(
                self._keys.claim(key, self._me, seen, epoch),
                self._keys.commit(key, self._me, epoch, seen.ver + 1, payload, time.time()),
                self._keys.release(key, self._me, epoch),
            )
            if read_reply(claimed)[0] == 1 == read_reply(committed)[0]:
                return
        raise StateError(f"a replica has taken {key} meanwhile: stop all replicas first")

    async def keys(self) -> dict[Key, float]:
        return await self._keys.updated(self._client)

    async def forget(self, keys: Iterable[Key]) -> None:
        await self._keys.forget(self._client, list(keys))

    async def close(self) -> None:
        await self._client.close()

    async def _members(self) -> dict[str, str]:
        (flat,) = await self._client.run(("HGETALL", self._keys.members))
        return text_fields(flat)
