"""What the store of one replica does with keys on a real server: forget old ones, list them, refuse too large ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from exporter.config.schema import State
from exporter.config.state_url import StateUrl
from exporter.errors import StateError, StateTaken
from exporter.model import Key, Scope
from exporter.state.base import Stored
from exporter.state.redis import MOST_PAYLOAD, RedisStore
from exporter.telemetry import Telemetry
from tests.support.components import Redis, Stack

pytestmark = pytest.mark.component

MINE, OLD, OTHERS = (Key("job", Scope("biz", number)) for number in ("1", "2", "3"))
DAY = 86400


@asynccontextmanager
async def replica(server: Redis, prefix: str = "blueking:") -> AsyncIterator[RedisStore]:
    """A replica that has joined and been there for a ttl."""
    url = StateUrl().parse(f"redis://127.0.0.1:{server.port}", Path("/"))
    store = RedisStore(State(url=url, lease_ttl=3.0, key_prefix=prefix), pod="a", telemetry=Telemetry())
    await store.open()
    beating = asyncio.create_task(store.send_heartbeats(lambda key: None))
    try:
        async with asyncio.timeout(30):
            while MINE not in store.held:
                await store.next_heartbeat()
                async for _ in store.claim([MINE, OLD]):
                    pass
        yield store
    finally:
        beating.cancel()
        await asyncio.wait([beating])
        await store.close()


@pytest.mark.parametrize("engine", ["redis", pytest.param("valkey", marks=pytest.mark.slow)])
async def test_keys_are_forgotten_when_nobody_has_or_wants_them(stack: Stack, engine: str) -> None:
    """Purged are keys that are old, not configured, and not those of a replica that is alive. Another prefix is another
    platform's."""
    server = await asyncio.to_thread(stack.redis, engine=engine)
    long_ago = str(int(time.time()) - 8 * DAY)
    async with replica(server, "{one}:") as store:
        for key in (MINE, OLD):
            await store.commit(key, b"payload")
        await store.release([OLD])
        name = "{one}:s:job:biz:"
        # MINE is as old, and OTHERS and the last one have owners who are not alive, or have been seen just now.
        for number, own in (("1", None), ("2", None), ("3", "gone.1"), ("4", "gone.1"), ("5", "")):
            server.ask("HSET", name + number, "upd", long_ago if number != "5" else str(int(time.time())))
            if own is not None:
                server.ask("HSET", name + number, "own", own, "epoch", "5")
        server.ask("HSET", "two:s:job:biz:2", "upd", long_ago)
        assert (await store.keys()).keys() >= {MINE, OLD, OTHERS}

        for _ in range(3):  # this replica has been there long enough to be the one that purges
            await store.next_heartbeat()
        limit = time.time() - 7 * DAY
        assert await store.purge([OTHERS], limit) == 1, "OLD: released, old, not wanted"
        left = {key.scope.bk_scope_id for key in await store.keys()}
        assert left == {"1", "3", "4", "5"}, "an owner who was never seen may be alive, until it has been watched"
        await asyncio.sleep(3.5)
        assert await store.purge([OTHERS], limit) == 1, "the owner of 4 is not"
        assert {key.scope.bk_scope_id for key in await store.keys()} == {"1", "3", "5"}
        assert server.ask("EXISTS", "two:s:job:biz:2") == 1


async def test_what_is_not_held_can_be_read_but_not_committed(stack: Stack) -> None:
    """A payload above 16 MiB is refused without asking the server; another replica's key is not touched."""
    server = await asyncio.to_thread(stack.redis)
    async with replica(server) as store:
        await store.commit(MINE, b"mine")
        with pytest.raises(StateError, match="is larger than"):
            await store.commit(MINE, bytes(MOST_PAYLOAD + 1))
        assert await store.load(MINE) == Stored(b"mine") == await store.read(MINE)
        server.ask("HSET", "blueking:s:job:biz:3", "own", "b.1", "epoch", "9", "p", "theirs")
        assert await store.read(OTHERS) == Stored(b"theirs")
        for attempt in (store.load(OTHERS), store.commit(OTHERS, b"x")):
            with pytest.raises(StateTaken):
                await attempt
        with pytest.raises(StateTaken):
            store.ensure(OTHERS)
        assert server.ask("HGET", "blueking:s:job:biz:3", "p") == b"theirs"
        assert await store.read(Key("job", Scope("biz", "99"))) is None
