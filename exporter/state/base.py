"""What every store promises, and how a store is chosen by its URL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from exporter.config.schema import State
from exporter.config.state_url import RedisUrl
from exporter.errors import StateError
from exporter.model import Key
from exporter.shard import Shard

SCHEMA = 2
"""The version of what is stored. This build reads all older ones. An older build refuses a newer one: it would count
again what it does not find. Since 2 the ended executions of JOB are stored apart from the others."""


class Stored(msgspec.Struct, frozen=True):
    """What a store holds of one key.

    `current`: it is what was committed last. False when the store may have gone back in time: then the page may have
    shown more, so counters are shown again after the first poll that has caught up.
    """

    payload: bytes
    current: bool = True


class Store(Protocol):
    """Payloads by key. Between `open` and `close` this process is the only one that may commit.

    A commit is atomic and durable when it returns: after `kill -9`, `load` gives either the payload before or after it,
    never a mixture. Everything here raises `StateError` (`StateLocked`, `StateNewer` from `open`) and nothing else.
    """

    resets: int = 0
    """How often committed payloads were found to be damaged or gone."""

    async def open(self, *, read_only: bool = False) -> None:
        """Take the store for this process. `read_only`: beside the process that has it; nothing is committed."""

    async def load(self, key: Key) -> Stored | None:
        """The payload committed last under `key`, None if there is none."""

    async def load_many(self, keys: Sequence[Key]) -> Mapping[Key, Stored]:
        """What `load` gives for each of these keys that has a payload."""
        found = [(key, await self.load(key)) for key in keys]
        return {key: stored for key, stored in found if stored is not None}

    def ensure(self, key: Key) -> None:
        """Raise `StateError` when a commit of `key` would surely fail now, so that the platform need not be asked."""
        return

    async def commit(self, key: Key, payload: bytes) -> None:
        """Replace the payload of `key`."""

    async def commit_many(self, payloads: Mapping[Key, bytes]) -> Mapping[Key, StateError]:
        """Commit each of them, together where that costs less. Returns the errors of those that failed."""
        outcomes = await asyncio.gather(
            *(self.commit(key, payload) for key, payload in payloads.items()), return_exceptions=True
        )
        errors: dict[Key, StateError] = {}
        for key, outcome in zip(payloads, outcomes, strict=True):
            if isinstance(outcome, StateError):
                errors[key] = outcome
            elif outcome is not None:
                raise outcome
        return errors

    async def keys(self) -> dict[Key, float]:
        """Every key with the time of its last commit, unix seconds."""

    async def forget(self, keys: Iterable[Key]) -> None:
        """Remove these keys."""

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        """Forget the keys not in `keep` whose last commit is before `older_than` (unix seconds). Returns how many."""
        return 0

    async def check(self) -> bool:
        """Look whether the store still has what was committed, and repair it if it can; call it every few seconds.

        False, once, after something was lost: commit every state in memory again.
        """
        return True

    async def size(self) -> int | None:
        """Bytes on disk, None where that means nothing."""
        return None

    async def close(self) -> None:
        """Release the store. Safe to call twice."""


def open_store(state: State, shard: Shard | None = None) -> Store:
    """The store that `state.url` names, for one process that has all of it. Not opened yet.

    `shard`: whose state it must be; None takes that of any. With Redis it is for commands, while no replica runs;
    replicas use `RedisStore`.
    """
    if isinstance(state.url, RedisUrl):
        from exporter.state.redis_exclusive import ExclusiveRedisStore

        return ExclusiveRedisStore(state)
    scheme, _, rest = state.url.partition(":")
    if scheme == "memory":
        from exporter.state.memory import MemoryStore

        return MemoryStore()
    from exporter.state.sqlite import SQLiteStore

    return SQLiteStore(Path(rest), shard, accept_reshard=state.accept_reshard)
