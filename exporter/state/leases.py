"""Which replicas are alive and which keys belong to each of them, without any I/O.

A replica writes its entry in the table of members at every heartbeat, with a growing number. The others see it
change; they compare no clocks. A replica may show its scopes until `ttl` after it *sent* the newest heartbeat that was
confirmed in time. If another replica has seen an entry unchanged for longer than that, the writer of the entry shows
nothing any more. All times here are seconds of one machine's CLOCK_BOOTTIME, which also counts while it is suspended.

A replica keeps its name for one unbroken lease. After a break it uses a new name: a name that was found dead stays
dead, and a claim that was decided before the break cannot take the keys that the replica holds after it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import msgspec

from exporter.shard import weight

Phase = Literal["join", "ready", "leave"]
PHASES: tuple[Phase, ...] = get_args(Phase)

MARGIN = 1 / 30
"""Share of the ttl by which two clocks may drift apart within one ttl."""
SETTLED = 2
"""A new replica must be seen ready for this many heartbeats before others give scopes to it."""


class Assignment:
    """Rendezvous hashing of the same items over changing names; each name's weights are computed once."""

    def __init__(self) -> None:
        self._items: Sequence[str] = ()
        self._weights: dict[str, array[int]] = {}

    def of(self, me: str, names: Iterable[str], items: Sequence[str]) -> frozenset[str]:
        """The items that belong to `me`, which is one of `names`. Takes long for many items: not for the event loop."""
        if items != self._items:
            self._items, self._weights = items, {}
        weights = {
            name: self._weights.get(name) or array("Q", (weight(name, item) for item in items))
            for name in sorted({me, *names})
        }
        self._weights = weights
        highest = map(max, zip(*weights.values(), strict=True))
        return frozenset(item for item, mine, most in zip(items, weights[me], highest, strict=True) if mine == most)


class Member(msgspec.Struct, frozen=True):
    """One entry of the table. `released`: scopes it has given back so far; `group`: what it shares with replicas that
    have the same configuration and the same form of states."""

    name: str
    number: int
    released: int
    phase: Phase
    group: str

    @property
    def value(self) -> str:
        return f"{self.number}:{self.released}:{self.phase}:{self.group}"

    @property
    def pod(self) -> str:
        """What a restart keeps."""
        return self.name.rpartition(".")[0]


def member(name: str, value: str) -> Member | None:
    """The entry under `name`, None when it is none of ours."""
    parts = value.split(":")
    if len(parts) != 4 or not (parts[0].isdecimal() and parts[1].isdecimal()) or parts[2] not in PHASES:
        return None
    return Member(name, int(parts[0]), int(parts[1]), parts[2], parts[3])


class _Seen(msgspec.Struct):
    """`changed`: when the value was first seen; `ready`: heartbeats in a row at which it was ready."""

    value: str
    changed: float
    ready: int = 0


class Peers:
    """What one replica knows about the others: who is alive, who is dead."""

    MOST_DEAD = 10_000

    def __init__(self, ttl: float) -> None:
        self._patience = ttl * (1 + MARGIN)
        self._seen: dict[str, _Seen] = {}
        self._dead: dict[str, None] = {}
        self._began = float("inf")

    def restart(self, *, lost_writes: bool) -> None:
        """Begin anew: what was seen may not be true any more, so every replica may be alive.

        `lost_writes`: the store has lost writes, so a former name of a replica that is alive may own something again.
        Otherwise the dead stay dead.
        """
        self._seen.clear()
        self._began = float("inf")
        if lost_writes:
            self._dead.clear()

    def observe(self, table: Mapping[str, str], sent: float, received: float) -> None:
        """Take the table of a heartbeat that was sent and answered at these times, by a store that lost no writes since
        the one before."""
        first = self._began == float("inf")
        self._began = min(self._began, received)
        for name, value in table.items():
            if name in self._dead:
                continue  # a late packet from a replica that is gone
            seen = self._seen.setdefault(name, _Seen("", received))
            if seen.value != value:
                seen.value, seen.changed = value, received
            entry = member(name, value)
            # A replica that existed before this watch began is not new.
            seen.ready = (SETTLED if first else seen.ready + 1) if entry and entry.phase == "ready" else 0
        for name, seen in list(self._seen.items()):
            # Nobody is removed from the table alive: it left, or another replica has waited for long enough.
            if sent - seen.changed > self._patience or (name not in table and seen.value):
                self.mark_dead(name)

    def alive(self, name: str, now: float) -> bool:
        """Whether `name` may still show what it owns. One that was never seen may, until it has been watched."""
        if name not in self._dead:
            self._seen.setdefault(name, _Seen("", now))
        return name in self._seen

    def mark_dead(self, name: str) -> None:
        """Regard `name` as dead from now on."""
        self._seen.pop(name, None)
        self._dead[name] = None
        while len(self._dead) > self.MOST_DEAD:
            del self._dead[next(iter(self._dead))]

    def names(self) -> list[str]:
        """The names of all replicas that count as alive."""
        return list(self._seen)

    def watched(self, sent: float) -> bool:
        """Whether everybody who was alive when this watch began would have been seen by a heartbeat sent then."""
        return self.age(sent) > self._patience

    def age(self, now: float) -> float:
        """Seconds since this watch began; negative before."""
        return now - self._began

    def dead_in(self, table: Mapping[str, str]) -> list[str]:
        """Those in `table` whose entries may be removed."""
        return [name for name in table if name in self._dead]

    def members(self) -> list[Member]:
        """The entries of all who are alive."""
        return [entry for name, seen in self._seen.items() if (entry := member(name, seen.value))]

    def belongs_to_others(self, name: str, group: str) -> bool:
        """Whether `name` is alive and of another group."""
        entry = member(name, self._seen[name].value) if name in self._seen else None
        return entry is not None and entry.group != group

    def takers(self, group: str) -> list[Member]:
        """The replicas that may get scopes: ready for some heartbeats, and of the same group."""
        found = self.members()
        return [one for one in found if one.group == group and self._seen[one.name].ready >= SETTLED]
