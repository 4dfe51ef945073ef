"""A model in Python of the scripts of `exporter.state.redis_client`, and a server that uses it.

A test compares this model with real servers; other tests use it to run replicas in virtual time with faults.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from typing import Any

from exporter.errors import StateUnreachable
from exporter.state.redis_client import BEAT, CLAIM, COMMIT, FORGET, RELEASE, RUN_ID, Command

Hash = dict[str, bytes]


class Model:
    """The data of one server."""

    def __init__(self, run_id: str = "run-1") -> None:
        self.run_id = run_id
        self.data: dict[str, Hash] = {}

    def run(self, command: Command) -> Any:
        name, *rest = command
        if name == "EVAL":
            text, _, key, *arguments = rest
            sent = [self.run_id.encode() if part is RUN_ID else _bytes(part) for part in arguments]
            found = self.data.get(str(key), {})
            answer = getattr(self, _SCRIPTS[str(text)])(found, *sent)
            self._put(str(key), found)
            return answer
        found = self.data.get(str(rest[0]), {})
        if name == "HMGET":
            return [found.get(str(field)) for field in rest[1:]]
        assert name == "HDEL", name
        gone = sum(found.pop(str(field), None) is not None for field in rest[1:])
        self._put(str(rest[0]), found)
        return gone

    def _put(self, key: str, found: Hash) -> None:
        if found:
            self.data[key] = found
        else:
            self.data.pop(key, None)

    def beat(self, table: Hash, me: bytes, confirmed: bytes, value: bytes, *gone: bytes) -> list[Any]:
        before = table.get(me.decode(), b"0")
        if int(before.split(b":")[0]) < int(confirmed):
            return [0, self._flat(table)]
        table[me.decode()] = value
        for name, its in zip(gone[::2], gone[1::2], strict=True):
            if table.get(name.decode()) == its:
                del table[name.decode()]
        return [1, self._flat(table)]

    @staticmethod
    def _flat(table: Hash) -> list[bytes]:
        return [part for name, its in table.items() for part in (name.encode(), its)]

    def claim(self, key: Hash, me: bytes, own: bytes, epoch: bytes, new: bytes) -> list[Any]:
        if (key.get("own", b""), key.get("epoch", b"0")) != (own, epoch):
            return [0, key.get("own", b""), key.get("epoch", b"0")]
        key.update(own=me, epoch=new)
        return [1, me, new]

    def commit(
        self, key: Hash, me: bytes, epoch: bytes, ver: bytes, run: bytes, upd: bytes, schema: bytes, payload: bytes
    ) -> list[Any]:
        stands = [key.get("own", b""), key.get("epoch", b"0")]
        if stands != [me, epoch]:
            return [0, *stands]
        if int(key.get("ver", b"0")) >= int(ver):
            return [2, *stands]
        key.update(ver=ver, run=run, upd=upd, schema=schema, p=payload)
        return [1, *stands]

    def release(self, key: Hash, me: bytes, epoch: bytes) -> int:
        if (key.get("own"), key.get("epoch")) != (me, epoch):
            return 0
        key["own"] = b""
        return 1

    def forget(self, key: Hash, own: bytes, epoch: bytes, upd: bytes) -> int:
        if (key.get("own", b""), key.get("epoch", b"0"), key.get("upd", b"")) != (own, epoch, upd):
            return 0
        gone = int(bool(key))
        key.clear()
        return gone


_SCRIPTS = {BEAT: "beat", CLAIM: "claim", COMMIT: "commit", RELEASE: "release", FORGET: "forget"}


def _bytes(part: Any) -> bytes:
    return part if isinstance(part, bytes) else str(part).encode()


class Server:
    """A server in virtual time. `paused`: it answers nothing and works off what came when it continues."""

    def __init__(self) -> None:
        self.model = Model()
        self.going = asyncio.Event()
        self.going.set()
        self.snapshot = copy.deepcopy(self.model.data)

    def save(self) -> None:
        self.snapshot = copy.deepcopy(self.model.data)

    def restart(self, *, lose: bool) -> None:
        """As another process; `lose`: with what was saved last."""
        self.model.run_id = f"run-{int(self.model.run_id[4:]) + 1}"
        if lose:
            self.model.data = copy.deepcopy(self.snapshot)

    def flush(self) -> None:
        self.model.data.clear()


class ModelClient:
    """A client of `Server`. `lossy`: the share of requests whose answer is lost; `cut`: it cannot reach the server."""

    def __init__(self, server: Server, chance: random.Random, budget: float) -> None:
        self.server = server
        self.lossy = 0.0
        self.cut = False
        self.going = asyncio.Event()
        self.going.set()
        self.restarts = 1
        self._seen = server.model.run_id
        self._chance = chance
        self._budget = budget
        self._line = asyncio.Lock()
        self._late: set[asyncio.Task[list[Any]]] = set()

    @property
    def run_id(self) -> str:
        return self._seen

    async def connect(self) -> None:
        """Always connected."""

    async def close(self) -> None:
        for task in self._late:
            task.cancel()
        if self._late:
            await asyncio.wait(self._late)

    async def run(self, *commands: Command, urgent: bool = False) -> list[Any]:
        work = asyncio.create_task(self._travel(commands))
        self._late.add(work)
        work.add_done_callback(self._late.discard)
        try:
            async with asyncio.timeout(self._budget):
                answers = await asyncio.shield(work)
        except TimeoutError:
            await self.going.wait()
            raise StateUnreachable("no answer") from None
        await self.going.wait()
        return answers

    async def _travel(self, commands: Sequence[Command]) -> list[Any]:
        if self.cut or self._chance.random() < self.lossy / 2:
            await asyncio.sleep(1e9)  # never arrives
        async with self._line:
            await asyncio.sleep(self._chance.uniform(0.0005, 0.01))
            await self.server.going.wait()
            if self.server.model.run_id != self._seen:
                self._seen = self.server.model.run_id
                self.restarts += 1
            answers = [self.server.model.run(command) for command in commands]
        if self._chance.random() < self.lossy / 2:
            await asyncio.sleep(1e9)  # the answer is lost
        await asyncio.sleep(self._chance.uniform(0.0005, 0.01))
        return answers
