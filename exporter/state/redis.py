"""The state of several replicas in one Redis or Valkey. Each key is polled and shown by exactly one replica.

    members      hash   name of a replica → its heartbeat, see leases.py
    s:KEY        hash   own, epoch      who may commit, and the fencing token of that claim; epochs only grow
                        ver             number of the commit, so that a late one cannot undo a newer one
                        run             process of the server that took the commit
                        upd, schema, p  unix seconds, form and bytes of the payload

Two writers exclude each other by compare-and-set on (own, epoch), in scripts on one key each. Clocks only decide when
somebody else may try, and how long a page may be shown. No key expires: a server's clock may be set.

The store may go back in time (a failover that lost writes, a restart from an older snapshot, FLUSHALL). A replica
notices when its own entry is not the one it wrote, or the server is another process. It then goes on under another name
and writes again what it holds, which is the newer copy: a token that is older than its own was superseded by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence, Set
from functools import partial
from typing import Any, Literal

import msgspec

from exporter import log
from exporter.config.schema import State
from exporter.errors import StateError, StateTaken, StateUnreachable
from exporter.model import Key, Scope
from exporter.shard import weight
from exporter.state.base import SCHEMA, Store, Stored
from exporter.state.leases import Assignment, Member, Peers, Phase
from exporter.state.redis_client import BEAT, RUN_ID, Client, Command, RunId, script, text_fields
from exporter.state.redis_keys import Found, Keyspace, budget, connect_to, read_found, read_reply
from exporter.telemetry import Telemetry

MOST_PAYLOAD = 16 * 2**20
"""Bytes of one payload: a larger one would block the server, and all replicas with it."""
CHUNK = 50
"""Keys that are read, claimed or released in one go; a heartbeat fits in between."""
CHUNK_BYTES = 2**20
HEALING = 3
"""Heartbeats within which all that hold a lease have noticed that the store has lost writes."""
FEW = 1000
"""Scopes that are assigned in one go, in some 10 ms; more are in a thread."""

Cause = Literal["join", "dead", "released", "healed"]
"""Why a key was taken: nobody had it, its owner was dead or had released it; or it was held, and the store had lost
that."""


def boot_time() -> float:
    """Seconds since this machine started, including those it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Held(msgspec.Struct):
    """A key that is owned. `payload`: the newest that was sent. `current`: nothing newer can have been shown."""

    epoch: int
    ver: int = 0
    payload: bytes | None = None
    current: bool = True


class _Lease(msgspec.Struct):
    """One unbroken lease. `number` of its newest heartbeat, `confirmed` of the newest that was confirmed; `until`: when
    it lapses; `restarts` of the server when it was confirmed first. `settled`: all that is held is held in its name."""

    name: str
    settled: bool
    restarts: int = 0
    number: int = 0
    confirmed: int = 0
    until: float = float("inf")


class RedisStore(Store):
    """See `Store`, for one of several replicas: it may load and commit what it has claimed.

    `pod`: the name of this replica, which a restart keeps. `every`: seconds between two heartbeats. `waiting`: keys
    that the newest `claim` could not have yet, without those that a replica of another group has.
    """

    def __init__(
        self,
        state: State,
        *,
        pod: str,
        telemetry: Telemetry,
        boot: Callable[[], float] = boot_time,
        wall: Callable[[], float] = time.time,
        client: Client | None = None,
    ) -> None:
        self.every = min(0.5, state.lease_ttl / 10)
        self.waiting = 0
        self._group = ""
        self._pod = pod
        self._keys = Keyspace(state.key_prefix)
        self._ttl = state.lease_ttl
        self._telemetry = telemetry
        self._boot = boot
        self._wall = wall
        self._peers = Peers(state.lease_ttl)
        self._held: dict[Key, _Held] = {}
        self._unanswered: dict[Key, int] = {}
        self._names: set[str] = set()
        self._lease = self._new_lease(settled=True)
        self._phase: Phase = "join"
        self._released = 0
        self._valid_until = float("-inf")
        self._broken = self._lost_writes = False
        self._answers = True
        """Whether the newest heartbeat was confirmed."""
        self._cautious = False
        self._on_lost: Callable[[Key], None] = lambda key: None
        self._dead_entries: list[str] = []
        self._sent = float("-inf")
        self._sending = asyncio.Lock()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._heartbeat_sent = asyncio.Event()
        self._claim_signature: object = None
        self._claimed_at = float("-inf")
        self._assigned: frozenset[Scope] = frozenset()
        self._assigned_for: object = None
        self._scopes = Assignment()
        self._same_pod = Assignment()
        self._budget = budget(state)
        self._client = client or connect_to(state, telemetry)

    async def open(self, *, read_only: bool = False) -> None:
        """Reach the server; `send_heartbeats` tries again one that cannot be reached. Raises StateError for one that
        does not fit."""
        try:
            await self._client.connect()
        except StateUnreachable as error:
            log.get().warning("state_unreachable", reason=str(error), consequence="nothing is polled until it answers")

    async def close(self) -> None:
        """Leave the table of members and close the connection."""
        if self._lease.confirmed:
            with contextlib.suppress(StateError, TimeoutError):
                async with asyncio.timeout(self._budget / 2):
                    await self._client.run(("HDEL", self._keys.members, self._lease.name), urgent=True)
        await self._client.close()

    # What is asked and changed by key

    async def load(self, key: Key) -> Stored | None:
        hold = self._hold(key)
        return None if hold.payload is None else Stored(hold.payload, hold.current)

    async def read(self, key: Key) -> Stored | None:
        """What the owner of the key, this replica or another, has committed last."""
        return await self._keys.load(self._client, key)

    def ensure(self, key: Key) -> None:
        self._hold(key)
        if not self.valid:
            raise StateUnreachable("the lease has lapsed: the state does not answer")
        if not self._answers:
            raise StateUnreachable("the newest heartbeat was not confirmed: the state does not answer")

    async def commit(self, key: Key, payload: bytes) -> None:
        if len(payload) > MOST_PAYLOAD:
            raise StateError(f"a state of {len(payload)} bytes is larger than {MOST_PAYLOAD}")
        hold = self._hold(key)
        for _ in range(2):
            await self._until_settled()
            if self._held.get(key) is not hold:
                break
            hold.payload = payload
            (answer,) = await self._client.run(self._commit(key, hold))
            code, own, epoch = read_reply(answer)
            if code == 1:
                hold.current = True
                return
            if not self._superseded(hold, own, epoch):
                self._drop(key)
                break
            self._break_lease(lost_writes=True)
        raise StateTaken(f"another replica has taken over {key}")

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        """See `Store`. One replica does it for all; keys of replicas that are alive stay."""
        takers = self._peers.takers(self._group)
        if not takers or self._lease.name != max(takers, key=lambda one: weight(one.name, "purge")).name:
            return 0
        kept, forgotten = set(keep), 0

        def unwanted(own: str, updated: float) -> bool:
            return updated < older_than and (not own or not self._peers.alive(own, self._boot()))

        async for keys in self._keys.scan(self._client):
            gone = [key for key in keys if key not in kept]
            forgotten += await self._keys.forget(self._client, gone, unwanted)
        return forgotten

    async def keys(self) -> dict[Key, float]:
        return await self._keys.updated(self._client)

    async def forget(self, keys: Iterable[Key]) -> None:
        raise StateError("a running replica forgets nothing")

    # Sharing

    def configure(self, sha256: str) -> None:
        """Set which configuration is in use. Replicas with another one may not know the same scopes: they keep what
        they have, and nothing else is assigned to them."""
        self._group = f"{SCHEMA}-{sha256[:12]}"

    @property
    def held(self) -> Set[Key]:
        """The keys that nobody else may have."""
        return self._held.keys()

    @property
    def valid(self) -> bool:
        """Whether what is held may be shown at this moment."""
        return self._boot() < self._valid_until

    @property
    def remaining(self) -> float:
        """Seconds that the lease still holds, 0.0 when it has lapsed."""
        return max(0.0, self._valid_until - self._boot())

    @property
    def joined(self) -> bool:
        """Whether a heartbeat has been confirmed since the start."""
        return self._phase != "join"

    @property
    def name(self) -> str:
        return self._lease.name

    def members(self) -> list[Member]:
        """All replicas that are alive, this one included."""
        return self._peers.members()

    async def send_heartbeats(self, lost: Callable[[Key], None]) -> None:
        """Send heartbeats until cancelled. `lost` is called with each key that another replica has taken.

        It must remove the key from the page before it returns.
        """
        self._on_lost = lost
        while True:
            began = self._boot()
            try:
                async with self._sending:
                    await (self._renew() if self._broken else self._heartbeat())
                self._answers = True
            except _LeaseBroken:
                continue
            except StateError as error:
                self._answers = False
                if isinstance(error, StateUnreachable):
                    log.get().warning("state_unreachable", reason=str(error))
                else:
                    log.get().error("state_refused", reason=str(error))
            self._heartbeat_sent.set()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self.every - (self._boot() - began))):
                    await self._wake.wait()

    async def next_heartbeat(self) -> None:
        """Wait for the next heartbeat."""
        self._heartbeat_sent.clear()
        await self._heartbeat_sent.wait()

    async def assigned(self, scopes: Sequence[Scope]) -> frozenset[Scope] | None:
        """Those of `scopes` that this replica should have; None while that is not known."""
        if not self.valid or self._phase != "ready" or not self._lease.settled:
            return None
        takers = self._peers.takers(self._group)
        pods = frozenset(one.pod for one in takers)
        # Several replicas of one pod name: on one machine, or a restarted one whose former lease has not lapsed.
        same_pod = frozenset(one.name for one in takers if one.pod == self._pod) - {self._lease.name}
        if self._assigned_for != (scopes, pods, same_pod):
            work = partial(self._assign, scopes, pods, same_pod)
            self._assigned = work() if len(scopes) <= FEW else await asyncio.to_thread(work)
            self._assigned_for = (scopes, pods, same_pod)
        return self._assigned

    async def claim(self, keys: Sequence[Key]) -> AsyncIterator[list[Key]]:
        """Claim those of `keys` that have no owner, some at a time; they can be loaded then. The store is read only
        after a change that may have released one, and three times per ttl."""
        now = self._boot()
        signature = (
            frozenset(keys),
            frozenset(self._peers.names()),
            frozenset((one.name, one.released, one.phase) for one in self._peers.members()),
            self._peers.watched(now),
            self._may_claim(now),
        )
        await self._release_unanswered()
        if not keys:
            self.waiting = 0
        if not keys or (signature == self._claim_signature and now - self._claimed_at < self._ttl / 3):
            return
        waiting = 0
        try:
            for part in _parts(keys):
                async with self._sending:
                    taken, missing = await self._claim(part)
                waiting += missing
                if taken:
                    yield taken
            self._claim_signature, self._claimed_at, self.waiting = signature, now, waiting
        except _LeaseBroken:
            pass
        except StateError as error:
            log.get().warning("state_claim_failed", reason=str(error))

    async def _release_unanswered(self) -> None:
        """Release the keys that claims without an answer may have taken; otherwise no replica would poll them."""
        with contextlib.suppress(StateError):
            while self._unanswered:
                async with self._sending:
                    part = list(self._unanswered.items())[:CHUNK]
                    name = self._lease.name
                    await self._client.run(*(self._keys.release(key, name, epoch) for key, epoch in part))
                    for key, _ in part:
                        del self._unanswered[key]

    async def release(self, keys: Sequence[Key]) -> None:
        """Give back keys that are neither polled nor shown any more. Those for which that fails are still `held`."""
        for part in _parts(keys):
            async with self._sending:
                if self._broken:
                    raise StateUnreachable("the lease has lapsed")
                held = [(key, self._held[key]) for key in part if key in self._held]
                await self._client.run(*(self._keys.release(key, self._lease.name, hold.epoch) for key, hold in held))
                for key, _ in held:
                    del self._held[key]
                self._released += len(held)
        if keys:
            await self.send_heartbeat()

    async def leave(self) -> None:
        """Tell the other replicas that this one is about to release all its keys."""
        self._phase = "leave"
        await self.send_heartbeat()

    async def send_heartbeat(self) -> None:
        """Send a heartbeat now, because this replica's entry has changed. Never raises."""
        with contextlib.suppress(StateError, _LeaseBroken):
            async with self._sending:
                if not self._broken:
                    await self._heartbeat()

    # Heartbeats

    async def _heartbeat(self, *peeks: Command) -> list[Any]:
        """Send a heartbeat after `peeks`, in the same pipeline, and return what those have found.

        Raises _LeaseBroken when the lease has lapsed before the answer, or the store has lost writes: then the table
        says nothing about what was found, and `_renew` is next.
        """
        lease = self._lease
        lease.number += 1
        me = Member(lease.name, lease.number, self._released, self._phase, self._group)
        sent = self._boot()
        confirmed = str(lease.confirmed)
        heartbeat = script(BEAT, self._keys.members, me.name, confirmed, me.value, *self._dead_entries)
        answers = await self._client.run(*peeks, heartbeat, urgent=True)
        received = self._boot()
        written, flat = answers.pop()
        table = text_fields(flat)
        lost_writes = not written or (lease.confirmed > 0 and self._client.restarts != lease.restarts)
        if lost_writes or received > lease.until:
            self._break_lease(lost_writes=lost_writes)
            raise _LeaseBroken
        self._peers.observe(table, sent, received)
        # Not its own former names: what is held in them could be taken from it as soon as they are gone.
        gone = [name for name in self._peers.dead_in(table) if name not in self._names]
        self._dead_entries = [text for name in gone for text in (name, table[name])]
        lease.confirmed, lease.restarts, lease.until = lease.number, self._client.restarts, sent + self._ttl
        self._sent = sent
        if lease.settled:
            self._valid_until = lease.until
        if self._phase == "join" and self._may_claim(sent):
            self._phase = "ready"
        return answers

    async def _renew(self) -> None:
        """Go on under another name after a break, with all that is held and that nobody else has taken."""
        self._peers.mark_dead(self._lease.name)
        self._peers.restart(lost_writes=self._lost_writes)
        self._lease = self._new_lease(settled=False)
        self._unanswered.clear()  # claimed in a name that is gone
        self._cautious = self._lost_writes
        await self._heartbeat()
        if self._lost_writes and not self.valid:
            # Replicas whose lease has not lapsed have newer copies and write them first.
            await asyncio.sleep(HEALING * self.every)
        for part in _parts(list(self._held), lambda key: len(self._held[key].payload or b"")):
            await self._reclaim(part)
        former = self._names - {self._lease.name}
        await self._client.run(("HDEL", self._keys.members, *former), urgent=True)
        self._names = {self._lease.name}
        self._lease.settled = True
        await self._heartbeat()
        self._broken = self._lost_writes = False
        self._settled.set()

    async def _reclaim(self, keys: Sequence[Key]) -> None:
        found = map(read_found, await self._heartbeat(*map(self._keys.peek, keys)))
        commands: list[Command] = []
        claims: list[tuple[Key, _Held, int, bool, int]] = []
        left: list[Key] = []
        for key, seen in zip(keys, found, strict=True):
            hold = self._held.get(key)
            if hold is None:
                continue
            if not self._superseded(hold, seen.own, seen.epoch):
                self._drop(key)
                continue
            healed = seen.epoch < hold.epoch
            if healed and not self.valid:
                if not self._lost_writes:
                    self._lost_writes = True
                    raise _LeaseBroken
                # Another replica may have continued from it. The held copy may still be the best one.
                commands += self._put_back(key, hold, seen)
                left.append(key)
                continue
            epoch = max(seen.epoch, hold.epoch, int(self._wall() * 1000)) + 1
            claims.append((key, hold, epoch, healed, len(commands)))
            commands.append(self._keys.claim(key, self._lease.name, seen, epoch))
            if hold.payload is not None and (healed or seen.ver < hold.ver):
                hold.ver = max(hold.ver, seen.ver)
                commands.append(self._commit(key, hold, epoch))
        answers = await self._client.run(*commands) if commands else []
        for key in left:
            self._drop(key)
        for key, hold, epoch, healed, position in claims:
            if read_reply(answers[position])[0] == 1:
                hold.epoch = epoch
                if healed:
                    self._telemetry.takeover("healed")
            else:
                self._drop(key)

    async def _claim(self, keys: Sequence[Key]) -> tuple[list[Key], int]:
        """The keys that were taken, and how many could not be, though no replica of another group has them."""
        if self._broken:
            raise _LeaseBroken
        found = map(read_found, await self._heartbeat(*map(self._keys.peek, keys)))
        now, sent = self._boot(), self._sent
        if not self.valid:
            return [], len(keys)
        missing = 0
        wanted: list[tuple[Key, int, Cause]] = []
        commands: list[Command] = []
        for key, seen in zip(keys, found, strict=True):
            if seen.schema > SCHEMA:
                log.get().error("state_newer", field=str(key), schema=seen.schema, known=SCHEMA)
                continue
            cause = self._free(seen, now, sent)
            if key in self._held:
                continue
            if cause is None:
                missing += not self._peers.belongs_to_others(seen.own, self._group)
                continue
            epoch = max(seen.epoch, int(self._wall() * 1000)) + 1
            wanted.append((key, epoch, cause))
            commands.append(self._keys.claim(key, self._lease.name, seen, epoch))
            commands.append(("HMGET", self._keys.name(key), "run", "ver", "p"))
        self._unanswered |= {key: epoch for key, epoch, _ in wanted}
        answers = await self._client.run(*commands) if commands else []
        for key, _, _ in wanted:
            del self._unanswered[key]
        taken = []
        for (key, epoch, cause), claimed, (run, ver, payload) in zip(wanted, answers[::2], answers[1::2], strict=True):
            if read_reply(claimed)[0] != 1:
                missing += 1
                continue
            current = payload is None or run.decode() == self._client.run_id
            self._held[key] = _Held(epoch, int(ver or 0), payload, current)
            self._telemetry.takeover(cause)
            taken.append(key)
        return taken, missing

    def _put_back(self, key: Key, hold: _Held, seen: Found) -> list[Command]:
        """Write back the held state for the next owner of the key, with an epoch that any newer claim exceeds. It
        carries no run id of a server, because it may be older than what was shown."""
        if hold.payload is None:
            return []
        name, epoch = self._lease.name, hold.epoch
        hold.ver = max(hold.ver, seen.ver)
        commit = self._commit(key, hold, run="")
        return [self._keys.claim(key, name, seen, epoch), commit, self._keys.release(key, name, epoch)]

    def _free(self, seen: Found, now: float, sent: float) -> Cause | None:
        """Why a key may be taken, None when it may not. A key that never had an owner may be one whose owner has not
        noticed yet that the store is empty."""
        alive = bool(seen.own) and seen.own not in self._names and self._peers.alive(seen.own, now)
        if alive or not self._may_claim(sent):
            return None
        if not seen.own:
            return ("released" if seen.epoch else "join") if seen.epoch or self._peers.watched(sent) else None
        return "dead"

    def _may_claim(self, sent: float) -> bool:
        """Whether what the store says of others can be believed: soon after the start, or after a break; one ttl after
        the store has lost writes, since what it says now may be from before."""
        return self._peers.watched(sent) if self._cautious else self._peers.age(sent) >= HEALING * self.every

    def _superseded(self, hold: _Held, own: str, epoch: int) -> bool:
        """Whether a claim that stands in the store is this replica's, or older than what it holds."""
        return own in self._names or epoch < hold.epoch

    def _drop(self, key: Key) -> None:
        if self._held.pop(key, None) is not None:
            self._telemetry.fenced()
            log.get().warning(
                "scope_lost", scope=str(key.scope), collector=key.collector, message="another replica has taken it"
            )
            self._on_lost(key)

    def _break_lease(self, *, lost_writes: bool) -> None:
        """The lease has lapsed, or the store has lost writes: nothing is committed until `_renew`."""
        self._lost_writes |= lost_writes
        if self._broken:
            return
        if lost_writes:
            self._telemetry.state_rollback()
            log.get().warning("state_lost_writes", consequence="what is held is written again")
        else:
            log.get().warning("lease_lapsed", consequence="nothing is shown until every scope has been claimed again")
        self._broken = True
        self._lease.settled = False
        self._settled.clear()
        self._wake.set()

    # Helpers

    def _assign(self, scopes: Sequence[Scope], pods: Iterable[str], same_pod: Collection[str]) -> frozenset[Scope]:
        named = {str(scope): scope for scope in scopes}
        assigned = self._scopes.of(self._pod, pods, tuple(named))
        if same_pod:
            assigned = self._same_pod.of(self._lease.name, same_pod, tuple(sorted(assigned)))
        return frozenset(named[name] for name in assigned)

    def _new_lease(self, *, settled: bool) -> _Lease:
        lease = _Lease(f"{self._pod}.{secrets.token_hex(4)}", settled=settled)
        self._names.add(lease.name)
        return lease

    def _hold(self, key: Key) -> _Held:
        try:
            return self._held[key]
        except KeyError:
            raise StateTaken(f"another replica has {key}") from None

    async def _until_settled(self) -> None:
        try:
            async with asyncio.timeout(self._budget):
                await self._settled.wait()
        except TimeoutError:
            raise StateUnreachable("the lease has lapsed: the state does not answer") from None

    def _commit(self, key: Key, hold: _Held, epoch: int | None = None, run: str | RunId = RUN_ID) -> Command:
        assert hold.payload is not None
        hold.ver += 1
        name = self._lease.name
        return self._keys.commit(key, name, epoch or hold.epoch, hold.ver, hold.payload, self._wall(), run)


class _LeaseBroken(Exception):
    """The lease has lapsed, or the store has lost writes."""


def _parts(keys: Sequence[Key], size: Callable[[Key], int] = lambda key: 0) -> Iterator[list[Key]]:
    """`keys` in parts that are handled in one go."""
    part: list[Key] = []
    total = 0
    for key in keys:
        total += size(key)
        if part and (len(part) == CHUNK or total > CHUNK_BYTES):
            yield part
            part, total = [], size(key)
        part.append(key)
    if part:
        yield part
