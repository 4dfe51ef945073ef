"""A store that is lost with the process: every start is a new baseline."""

from __future__ import annotations

import time
from collections.abc import Iterable

from exporter.model import Key
from exporter.state.base import Store, Stored


class MemoryStore(Store):
    """See `Store`. Nothing outlives the process; a removed scope that returns before its end is continued."""

    def __init__(self) -> None:
        self._payloads: dict[Key, bytes] = {}
        self._updated: dict[Key, float] = {}

    async def open(self, *, read_only: bool = False) -> None:
        """There is nothing to open."""

    async def load(self, key: Key) -> Stored | None:
        payload = self._payloads.get(key)
        return None if payload is None else Stored(payload)

    async def commit(self, key: Key, payload: bytes) -> None:
        self._payloads[key] = payload
        self._updated[key] = time.time()

    async def keys(self) -> dict[Key, float]:
        return dict(self._updated)

    async def forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._payloads.pop(key, None)
            self._updated.pop(key, None)

    async def close(self) -> None:
        """There is nothing to release."""
