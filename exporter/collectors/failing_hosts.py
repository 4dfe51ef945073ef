"""Which hosts fail now, since when and why: the fold of streaks that all collectors share.

A host fails while its newest known result is a failure. The unit of a streak is the run of a job on the host (in JOB
the execution): its retries extend nothing, they only bring newer results. Results may arrive in any order.

A host is its `bk_host_id`. A result without one belongs to the host that was last seen with an id at the same address
(cloud and IP); where there is none, the address is the host's identity until a result with an id comes from there.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property

import msgspec
from isal import isal_zlib

from exporter.metrics.family import HOST_LABELS, Family, Labels
from exporter.model import Host

Run = int | str
"""The id of a run; all of a collector are numbers, or all are texts."""
RUNS_KEPT = 16
"""Newest runs of a streak that are remembered, to distinguish a retry from a new run. For an older run that is
retried it is enough to know that it had been read since the streak began: its failures include the host, or
the host did not take part."""
MOST_HOSTS = 100_000
"""Failing hosts of a collector and scope, and hosts whose success is remembered."""
MOST_UNTRACKED = 1000
"""Groups for which it is known how many hosts exceeded the bound."""
BATCH = 4096
"""Results that are sorted, or streaks that are packed, in one batch."""
SMALL = 4096
"""Bytes: a shorter piece is not compressed."""


class HostResult(msgspec.Struct, frozen=True, gc=False):
    """The newest result of one host in one run. `end` in unix seconds; `labels` of a failure, None for a success;
    `read_before`: end of the same run when its results were last read, None the first time."""

    host: Host
    run: Run
    group: str
    end: float
    labels: Labels | None
    read_before: float | None = None


class Streak(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive failures of one host. `host`: as in its newest failure, with an id if one is known; `since` and
    `last`: the ends of its first and newest failure; `runs`: its newest runs with the end of each, oldest first."""

    host: Host
    since: float
    last: float
    count: int
    labels: Labels
    group: str
    runs: tuple[tuple[Run, float], ...]

    @property
    def run(self) -> Run:
        """The run of the newest failure."""
        return self.runs[-1][0]


class Untracked(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Hosts that failed in a run and exceed the bound. `end`: of the newest of these failures."""

    run: Run
    end: float
    hosts: int


class FailingHosts(msgspec.Struct, frozen=True, dict=True, omit_defaults=True):
    """The hosts that fail, at most `MOST_HOSTS`. Values derived from the streaks are computed on first use.

    `cleared` remembers when hosts succeeded, so that an older failure that arrives late is ignored. `untracked`: hosts
    that exceed the bound, by group, or by run where there are no groups.

    In a stored state, `rows` are the streaks and `ids` the addresses of hosts that no streak shows. `listed` are the
    streaks in a state of an older build that had no `rows`.
    """

    listed: dict[str, Streak] = msgspec.field(default_factory=dict, name="streaks")
    cleared: dict[str, float] = {}
    ids: dict[str, str] = {}
    rows: tuple[bytes, ...] = ()
    untracked: dict[str, Untracked] = {}

    @classmethod
    def of(
        cls,
        streaks: dict[str, Streak],
        cleared: dict[str, float],
        addresses: dict[str, str],
        untracked: dict[str, Untracked],
    ) -> FailingHosts:
        """`streaks` and `cleared` by identity; `addresses`: the ids of these hosts by address."""
        shown = _shown_addresses(streaks)
        ids = {address: id for address, id in addresses.items() if shown.get(address) != id}
        hosts = cls(cleared=cleared, ids=ids, rows=_packed(streaks), untracked=untracked)
        vars(hosts).update(streaks=streaks, addresses=addresses)
        return hosts

    @cached_property
    def streaks(self) -> dict[str, Streak]:
        """By host identity."""
        return self.listed | _unpacked(self.rows)

    @cached_property
    def addresses(self) -> dict[str, str]:
        """The `bk_host_id` of the hosts in `streaks` and `cleared`, by their address."""
        return _shown_addresses(self.streaks) | self.ids

    def fold(
        self, results: Iterable[HostResult], *, now: float, ttl: float, settled: float, most: int = MOST_HOSTS
    ) -> FailingHosts:
        """Apply results. Drop streaks whose newest failure is older than `ttl`, and successes before `settled`: no
        result older than that time can arrive any more.

        Results may come in any order. They are sorted in batches, so very many results should roughly be in the order
        of time. At most `most` hosts are tracked, and at most as many successes are remembered, the newest ones.
        """
        results = iter(results)
        batch = list(itertools.islice(results, BATCH))
        if not batch:
            # Most scopes have no failing host: nothing is derived to find that out.
            empty = not (self.rows or self.listed or self.cleared or self.untracked)
            if empty or (self._oldest_failure >= now - ttl and self._oldest_success >= settled):
                return self
        fold = _Fold(self, now - ttl, most)
        while batch:
            fold.apply(sorted(batch, key=lambda result: (result.end, result.run)))
            batch = list(itertools.islice(results, BATCH))
        return fold.result(settled)

    def without_runs(self, runs: Iterable[int]) -> FailingHosts:
        """The same hosts without these run ids in their streaks, because the platform has given the ids to other
        runs."""
        other_numbers: dict[Run, int] = {run: ~run for run in runs}
        if not other_numbers:
            return self
        streaks = {
            identity: msgspec.structs.replace(
                streak, runs=tuple((other_numbers.get(run, run), end) for run, end in streak.runs)
            )
            for identity, streak in self.streaks.items()
        }
        return FailingHosts.of(streaks, self.cleared, self.addresses, self.untracked)

    def groups(self) -> Mapping[str, float]:
        """The groups (plans, names) of the newest failures, whose successes are worth asking for, each with the
        earliest beginning of a streak in it."""
        return self._groups

    def runs(self) -> Set[Run]:
        """The runs of the newest failures."""
        return self._runs

    def by_labels(self) -> Mapping[Labels, float]:
        """How many hosts fail, by the labels of their newest failure."""
        return self._by_labels

    def oldest(self, limit: int) -> Sequence[Streak]:
        """The streaks that began first, oldest first, at most `limit`."""
        known: tuple[int, Sequence[Streak]] = vars(self).get("_oldest", (-1, ()))
        if known[0] != limit:
            found = heapq.nsmallest(limit, self.streaks.values(), key=lambda streak: (streak.since, streak.host))
            known = vars(self)["_oldest"] = (limit, found)
        return known[1]

    def hosts_untracked(self) -> int:
        """How many failing hosts are known to exceed the bound."""
        return sum(one.hosts for one in self.untracked.values())

    def prepare(self) -> None:
        """Compute the derived values now. Call it in a thread for very many hosts."""
        self.groups()
        self.runs()
        self.by_labels()
        _ = self.addresses, self._oldest_failure, self._oldest_success

    @cached_property
    def _oldest_failure(self) -> float:
        ends = (one.end for one in self.untracked.values())
        return min(itertools.chain((streak.last for streak in self.streaks.values()), ends), default=math.inf)

    @cached_property
    def _oldest_success(self) -> float:
        return min(self.cleared.values(), default=math.inf)

    @cached_property
    def _groups(self) -> Mapping[str, float]:
        groups: dict[str, float] = {}
        for streak in self.streaks.values():
            groups[streak.group] = min(streak.since, groups.get(streak.group, streak.since))
        return groups

    @cached_property
    def _runs(self) -> Set[Run]:
        return {streak.run for streak in self.streaks.values()}

    @cached_property
    def _by_labels(self) -> Mapping[Labels, float]:
        counted: dict[Labels, float] = {}
        for streak in self.streaks.values():
            counted[streak.labels] = counted.get(streak.labels, 0.0) + 1.0
        return counted


def _shown_addresses(streaks: Mapping[str, Streak]) -> dict[str, str]:
    return {
        address: id
        for id, streak in streaks.items()
        if streak.host.bk_host_id == id and (address := streak.host.address)
    }


class _Fold:
    """One application of results, the mutable side of `FailingHosts.fold`. `since`: older failures are forgotten."""

    def __init__(self, hosts: FailingHosts, since: float, most: int) -> None:
        self.hosts = hosts
        self.since = since
        self.most = most
        self.streaks = {identity: streak for identity, streak in hosts.streaks.items() if streak.last >= since}
        self.cleared = dict(hosts.cleared)
        self.addresses = dict(hosts.addresses)
        self.untracked = dict(hosts.untracked)
        self.exceeding: dict[str, Untracked] = {}

    def apply(self, results: Iterable[HostResult]) -> None:
        """Apply results in this order, which should be that of their ends."""
        for result in results:
            host = result.host
            identity = self._identity(host)
            if self.untracked:
                self._forget_older_run(result)
            if result.labels is None:
                _clear(self.streaks, self.cleared, identity, result.end)
            elif result.end > self.cleared.get(identity, -math.inf):
                self._add(identity, result, result.labels)
            if host.bk_host_id and (identity in self.streaks or identity in self.cleared):
                self.addresses[host.address] = identity
        if len(self.cleared) > 2 * self.most:
            self._forget_successes()

    def result(self, settled: float) -> FailingHosts:
        """The hosts without streaks older than `since` and successes before `settled`; the old object if it is
        equal."""
        streaks = {identity: streak for identity, streak in self.streaks.items() if streak.last >= self.since}
        self.cleared = {identity: end for identity, end in self.cleared.items() if end >= settled}
        self._forget_successes()
        addresses = {
            address: id for address, id in self.addresses.items() if address and (id in streaks or id in self.cleared)
        }
        untracked, hosts = self._all_untracked(), self.hosts
        before = (hosts.streaks, hosts.cleared, hosts.addresses, hosts.untracked)
        if (streaks, self.cleared, addresses, untracked) == before:
            return hosts
        return FailingHosts.of(streaks, self.cleared, addresses, untracked)

    def _identity(self, host: Host) -> str:
        """The identity of the host. Results kept under its address, without an id, now belong to this identity."""
        address = host.address
        if not host.bk_host_id:
            return self.addresses.get(address, address)
        if address and (address in self.streaks or address in self.cleared):
            _adopt(host, self.streaks, self.cleared)
        return host.bk_host_id

    def _add(self, identity: str, result: HostResult, labels: Labels) -> None:
        """Add a failure. A host beyond the bound is only counted."""
        streak = self.streaks.get(identity)
        if streak is not None or len(self.streaks) < self.most:
            self.streaks[identity] = _extend(streak, result, labels)
            return
        name = _place(result)
        known = self.exceeding.get(name)
        if known is None or (known.run != result.run and known.end <= result.end):
            self.exceeding[name] = Untracked(result.run, result.end, 1)
        elif known.run == result.run:
            self.exceeding[name] = Untracked(result.run, max(known.end, result.end), known.hosts + 1)

    def _forget_older_run(self, result: HostResult) -> None:
        known = self.untracked.get(_place(result))
        if known is not None and known.run != result.run and known.end < result.end:
            del self.untracked[_place(result)]

    def _all_untracked(self) -> dict[str, Untracked]:
        """The untracked hosts of earlier folds and of this one. A retry of a run does not increase its number."""
        found = dict(self.untracked)
        for name, one in self.exceeding.items():
            before = found.get(name)
            if before is not None and before.run == one.run:
                found[name] = Untracked(one.run, max(one.end, before.end), max(one.hosts, before.hosts))
            elif before is None or before.end <= one.end:
                found[name] = one
        recent = ((name, one) for name, one in found.items() if one.end >= self.since)
        return dict(heapq.nlargest(MOST_UNTRACKED, recent, key=lambda item: (item[1].end, item[0])))

    def _forget_successes(self) -> None:
        if len(self.cleared) <= self.most:
            return
        # Numbers alone are sorted: one call of a sort with a key holds the event loop for 100 ms, also from a thread.
        oldest_kept = sorted(self.cleared.values())[-self.most]
        kept = {identity: end for identity, end in self.cleared.items() if end > oldest_kept}
        as_old = (item for item in self.cleared.items() if item[1] == oldest_kept)
        self.cleared = kept | dict(itertools.islice(as_old, self.most - len(kept)))


def _place(result: HostResult) -> str:
    return result.group or str(result.run)


class _Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A streak in a state. `labels` and `group` are numbers in the lists of its piece; `identity` "" is the host's."""

    bk_cloud_id: str
    bk_host_id: str
    ip: str
    since: float
    last: float
    count: int
    labels: int
    group: int
    runs: tuple[tuple[Run, float], ...]
    identity: str = ""


class _Piece(msgspec.Struct, array_like=True, gc=False):
    labels: list[Labels]
    groups: list[str]
    rows: list[_Row]


_ZLIB = 0x78
"""The first byte of a compressed piece; msgpack's first byte of a `_Piece` is another."""


def _packed(streaks: Mapping[str, Streak]) -> tuple[bytes, ...]:
    """Pack the streaks in pieces, so that neither packing nor unpacking blocks other threads for long."""
    items = iter(streaks.items())
    pieces = []
    while some := list(itertools.islice(items, BATCH)):
        labels: dict[Labels, int] = {}
        groups: dict[str, int] = {}
        rows = [
            _Row(
                *(streak.host.bk_cloud_id, streak.host.bk_host_id, streak.host.ip),
                *(streak.since, streak.last, streak.count),
                labels.setdefault(streak.labels, len(labels)),
                groups.setdefault(streak.group, len(groups)),
                streak.runs,
                "" if identity == streak.host.identity else identity,
            )
            for identity, streak in some
        ]
        piece = msgspec.msgpack.encode(_Piece(list(labels), list(groups), rows))
        pieces.append(isal_zlib.compress(piece, 1) if len(piece) > SMALL else piece)
    return tuple(pieces)


def _unpacked(pieces: Iterable[bytes]) -> dict[str, Streak]:
    streaks: dict[str, Streak] = {}
    for packed in pieces:
        plain = isal_zlib.decompress(packed) if packed[0] == _ZLIB else packed
        piece = msgspec.msgpack.decode(plain, type=_Piece)
        for row in piece.rows:
            host = Host(row.bk_cloud_id, row.bk_host_id, row.ip)
            labels, group = piece.labels[row.labels], piece.groups[row.group]
            streaks[row.identity or host.identity] = Streak(
                host, row.since, row.last, row.count, labels, group, row.runs
            )
    return streaks


def _adopt(host: Host, streaks: dict[str, Streak], cleared: dict[str, float]) -> None:
    """Move what is kept under the address of a host to its id, which is known now."""
    identity = host.bk_host_id
    parts = [streak for key in (host.address, identity) if (streak := streaks.pop(key, None))]
    ends = [end for key in (host.address, identity) if (end := cleared.pop(key, None)) is not None]
    if parts:
        streaks[identity] = _merged(parts, host)
    for end in ends:
        _clear(streaks, cleared, identity, end)


def _merged(parts: Sequence[Streak], host: Host) -> Streak:
    """One streak out of several that belong to the same host."""
    newest = max(parts, key=lambda streak: (streak.last, streak.run))
    ends: dict[Run, float] = {}
    for run, end in itertools.chain.from_iterable(streak.runs for streak in parts):
        ends[run] = max(end, ends.get(run, end))
    twice = sum(len(streak.runs) for streak in parts) - len(ends)
    return msgspec.structs.replace(
        newest,
        host=newest.host if newest.host.bk_host_id else host,
        since=min(streak.since for streak in parts),
        count=sum(streak.count for streak in parts) - twice,
        runs=_newest_runs(ends),
    )


def _clear(streaks: dict[str, Streak], cleared: dict[str, float], identity: str, end: float) -> None:
    """The host succeeded at `end`."""
    cleared[identity] = max(end, cleared.get(identity, end))
    streak = streaks.get(identity)
    if streak and end >= streak.last:
        del streaks[identity]
    elif streak and end >= streak.since:
        streaks[identity] = _begin_after(streak, end)


def _extend(streak: Streak | None, result: HostResult, labels: Labels) -> Streak:
    if streak is None:
        return Streak(result.host, result.end, result.end, 1, labels, result.group, ((result.run, result.end),))
    ends = dict(streak.runs)
    known = result.run in ends or (
        len(ends) == RUNS_KEPT and result.read_before is not None and result.read_before >= streak.since
    )
    ends[result.run] = max(result.end, ends.get(result.run, result.end))
    newest = (result.end, result.run) >= (streak.last, streak.run)
    has_id, had_id = bool(result.host.bk_host_id), bool(streak.host.bk_host_id)
    return Streak(
        result.host if has_id > had_id or (newest and has_id == had_id) else streak.host,
        min(streak.since, result.end),
        max(streak.last, result.end),
        streak.count + (not known),
        labels if newest else streak.labels,
        result.group if newest else streak.group,
        _newest_runs(ends),
    )


def _newest_runs(ends: Mapping[Run, float]) -> tuple[tuple[Run, float], ...]:
    return tuple(sorted(ends.items(), key=lambda run: (run[1], run[0])))[-RUNS_KEPT:]


def _begin_after(streak: Streak, success: float) -> Streak:
    """The rest of a streak after a success inside it that became known late."""
    runs = tuple(run for run in streak.runs if run[1] > success)
    return msgspec.structs.replace(streak, since=min(end for _, end in runs), count=len(runs), runs=runs)


def families(prefix: str, labels: tuple[str, ...], of: str, of_zh: str) -> tuple[Family, Family]:
    """The two gauges of failing hosts that every collector has; samples come from `count` and `detail` below."""
    return (
        Family(
            f"{prefix}_hosts_failing",
            "gauge",
            labels,
            f"Hosts whose newest result in {of} is a failure, exact also where the detail is capped.",
            f"最近一次{of_zh}结果为失败的主机数，明细被截断时仍然准确。",
            sticky=True,
        ),
        Family(
            f"{prefix}_host_failing_since_timestamp_seconds",
            "gauge",
            (*HOST_LABELS, *labels),
            "End of the first failure of the present streak of a failing host; absent when it does not fail.",
            "失败主机当前连续失败的起始时间；主机恢复后该序列消失。",
            detail=True,
        ),
    )


def since(hosts: FailingHosts, limit: int) -> Mapping[Labels, float]:
    """Samples of `…_host_failing_since_timestamp_seconds`, oldest streak first."""
    return {
        (streak.host.bk_cloud_id, streak.host.bk_host_id, streak.host.ip, *streak.labels): streak.since
        for streak in hosts.oldest(limit)
    }


def consecutive(hosts: FailingHosts, limit: int) -> Mapping[Labels, float]:
    """Samples of `…_host_consecutive_failures`, oldest streak first."""
    return {
        (streak.host.bk_cloud_id, streak.host.bk_host_id, streak.host.ip): float(streak.count)
        for streak in hosts.oldest(limit)
    }
