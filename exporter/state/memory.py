"""A store that forgets with the process: every start is a new baseline."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.model import Key


class MemoryStore:
    """See `Store`. Nothing outlives the process; a removed scope that returns before its end is continued."""

    def __init__(self) -> None:
        self.resets = 0
        self._payloads: dict[Key, bytes] = {}

    async def open(self) -> None:
        """Nothing to take."""

    async def load(self, key: Key) -> bytes | None:
        return self._payloads.get(key)

    async def commit(self, key: Key, payload: bytes) -> None:
        self._payloads[key] = payload

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        return 0

    async def size(self) -> int | None:
        return None

    async def close(self) -> None:
        """Nothing to give back."""
