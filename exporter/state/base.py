"""What every store promises, and how a store is chosen by its URL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from exporter.model import Key


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

    resets: int
    """How often the store has found that committed payloads were damaged or gone."""

    async def open(self, *, read_only: bool = False) -> None:
        """Take the store for this process. `read_only`: beside the process that has it; nothing is committed."""

    async def load(self, key: Key) -> Stored | None:
        """The payload committed last under `key`, None if there is none."""

    async def commit(self, key: Key, payload: bytes) -> None:
        """Replace the payload of `key`."""

    async def keys(self) -> dict[Key, float]:
        """Every key with the time of its last commit, unix seconds."""

    async def forget(self, keys: Iterable[Key]) -> None:
        """Remove these keys."""

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        """Forget the keys not in `keep` whose last commit is before `older_than` (unix seconds); how many went."""

    async def check(self) -> bool:
        """Look whether the store still has what was committed, and repair it if it can; call it every few seconds.

        False, once, after something was lost: commit every state in memory again.
        """

    async def size(self) -> int | None:
        """Bytes on disk, None where that means nothing."""

    async def close(self) -> None:
        """Give the store back. Safe to call twice."""


def open_store(url: str) -> Store:
    """The store of a validated `state.url`: `memory:` or `sqlite:PATH`. Not opened yet."""
    scheme, _, rest = url.partition(":")
    if scheme == "memory":
        from exporter.state.memory import MemoryStore

        return MemoryStore()
    from exporter.state.sqlite import SQLiteStore

    return SQLiteStore(Path(rest))
