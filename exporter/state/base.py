"""What every store promises, and how a store is chosen by its URL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from exporter.model import Key


class Store(Protocol):
    """Payloads by key. Between `open` and `close` this process is the only one that may commit.

    A commit is atomic and durable when it returns: after `kill -9`, `load` gives either the payload before or after it,
    never a mixture. Everything here raises `StateError` (`StateLocked`, `StateNewer` from `open`) and nothing else.
    """

    resets: int
    """How often `open` had to start from nothing because what it found was damaged."""

    async def open(self) -> None:
        """Take the store for this process."""

    async def load(self, key: Key) -> bytes | None:
        """The payload committed last under `key`, None if there is none."""

    async def commit(self, key: Key, payload: bytes) -> None:
        """Replace the payload of `key`."""

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        """Forget the keys not in `keep` whose last commit is before `older_than` (unix seconds); how many went."""

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
