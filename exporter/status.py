"""The data of the landing page, /failures and /api/v1, built from the states of the pollers."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import msgspec

from exporter import log
from exporter.collectors.base import Collector, CollectorState, shown_id
from exporter.collectors.failing_hosts import FailingHosts, Run, Streak
from exporter.fleet import Fleet
from exporter.metrics.family import Labels
from exporter.model import Key
from exporter.poller import Poller

T = TypeVar("T")
D = TypeVar("D", covariant=True)

MANY = 100
"""Hosts of a scope that are sorted once for all requests until its next poll."""

State = Literal["failing", "stale", "starting", "ok"]
"""As in `Poller.status`."""


class OfPoller(msgspec.Struct, frozen=True, kw_only=True):
    """Something that one collector says of one scope."""

    collector: str
    bk_scope_type: str
    bk_scope_id: str


class PollerStatus(OfPoller, frozen=True, kw_only=True):
    """One collector of one scope. Points in time are unix seconds, durations seconds, None means not yet or not known.

    `reason`, `message` and `request_id` (for BlueKing's own logs) are those of the newest attempt when it failed, else
    empty; the message carries no secret.
    `age` counts from the last success, `next_poll` from now (0.0: due or running). `failing_hosts` is the exact number.
    """

    name: str
    state: State
    last_success: float | None = None
    age: float | None = None
    reason: str = ""
    message: str = ""
    next_poll: float | None = None
    interval: float = 0.0
    failing_hosts: int | None = None
    series: int = 0
    request_id: str = ""


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that is alive, as this one sees it. `phase`: join, ready or leave; `configuration`: the same for
    replicas that share their work; `self`: this process."""

    name: str
    phase: str
    configuration: str
    self: bool


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole process. `started` in unix seconds, `uptime` in seconds, `series` of the whole page. `replicas`: with a
    store that is shared.

    `pollers` stays the last member: the JSON is written in pieces.
    """

    version: str
    started: float
    uptime: float
    ready: bool
    series: int = 0
    replicas: tuple[ReplicaStatus, ...] = ()
    pollers: Sequence[PollerStatus] = msgspec.field(default=(), name="watches")


class FailingExecution(OfPoller, frozen=True, kw_only=True):
    """A recent execution (JOB), job (NodeMan) or workflow (NodeMan V3) that failed. `end_time` in unix seconds, `url`:
    its page."""

    status: str
    name: str = ""
    job_instance_id: int | None = None
    job_id: int | None = None
    workflow_id: str | None = None
    end_time: float | None = None
    url: str | None = None

    @property
    def run_id(self) -> int | str | None:
        return self.job_instance_id or self.job_id or self.workflow_id


class FailingHost(OfPoller, frozen=True, kw_only=True):
    """A host that is failing now. `since` in unix seconds, `consecutive` the failures in a row; ids and `url` are those
    of the newest failing execution. `reason` of NodeMan is the step that failed."""

    bk_cloud_id: str
    bk_host_id: str
    ip: str
    code: str
    reason: str
    since: float
    consecutive: int
    job_instance_id: int | None = None
    job_id: int | None = None
    workflow_id: str | None = None
    url: str | None = None

    @property
    def run_id(self) -> int | str | None:
        return self.job_instance_id or self.job_id or self.workflow_id


class FailureReason(msgspec.Struct, frozen=True, order=True):
    """Why hosts fail, as in `FailingHost`."""

    collector: str
    code: str
    reason: str


class FailureFilter(msgspec.Struct, frozen=True):
    """Which failures are wanted; an empty text matches everything.

    `code` is that of a host or, where it has none, its `reason`; executions have none. `text` is searched, in any case,
    in the name of the scope; in address, host id, code and reason of a host; in name, status and id of an execution.
    """

    bk_scope_type: str = ""
    bk_scope_id: str = ""
    collector: str = ""
    code: str = ""
    text: str = ""


class Failures(msgspec.Struct, frozen=True):
    """What fails now: `executions` newest first, `hosts` oldest streak first, `reasons` with their number of hosts, the
    most frequent first. `names`: scope type and id → name of the scopes. `unread`: pollers whose newest poll was not
    complete or that have not polled yet; what they knew before is among the rest. `untracked`: hosts of the scopes that
    fail beyond the bound per scope and are not among `hosts`. `visible`: False when nothing may be shown now."""

    executions: Sequence[FailingExecution] = ()
    hosts: Sequence[FailingHost] = ()
    reasons: Sequence[tuple[FailureReason, int]] = ()
    names: Mapping[tuple[str, str], str] = {}
    unread: int = 0
    untracked: int = 0
    visible: bool = True


def poller_statuses(fleet: Fleet) -> Sequence[PollerStatus]:
    """How the polls of every poller go, computed when they are read."""
    names = {scope: one.name for scope, one in fleet.scopes.items()}
    pollers = list(fleet.pollers.values())
    return _Described(pollers, lambda poller: _poller_status(poller, names.get(poller.key.scope, "")))


class _Described(Sequence[D], Generic[T, D]):
    """`describe` of each item, computed when it is read: a client that reads slowly keeps only the items."""

    def __init__(self, items: Sequence[T], describe: Callable[[T], D]) -> None:
        self._items = items
        self._describe = describe

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> D: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[D]: ...
    def __getitem__(self, index: int | slice) -> D | Sequence[D]:
        if isinstance(index, int):
            return self._describe(self._items[index])
        return [self._describe(item) for item in self._items[index]]


def _poller_status(poller: Poller, name: str) -> PollerStatus:
    state = poller.state
    fresh = poller.exposed.fresh(poller.report)
    return PollerStatus(
        **_of(poller.collector),
        name=name,
        state=poller.status,
        last_success=state.last_success if state else None,
        age=poller.age,
        reason=poller.reason or "",
        message=log.redact(poller.message),
        request_id=poller.request_id,
        next_poll=poller.wait,
        interval=poller.collector.interval,
        failing_hosts=len(poller.collector.failing_hosts(state).streaks) if state and fresh else None,
        series=poller.exposed.series,
    )


class FailureFinder:
    """Finds the current failures. It works in a thread, since tens of thousands of hosts may fail."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sorted: dict[Key, tuple[FailingHosts, Sequence[Streak]]] = {}

    async def find(self, wanted: FailureFilter) -> Failures:
        """The failures that match."""
        names: dict[tuple[str, str], str] = {
            (scope.bk_scope_type, scope.bk_scope_id): one.name for scope, one in self._fleet.scopes.items()
        }
        pollers = [
            poller
            for poller in self._fleet.pollers.values()
            if wanted.collector in ("", poller.key.collector)
            and wanted.bk_scope_type in ("", poller.key.scope.bk_scope_type)
            and wanted.bk_scope_id in ("", poller.key.scope.bk_scope_id)
        ]
        unread = sum(poller.status != "ok" for poller in pollers)
        self._sorted = {key: kept for key, kept in self._sorted.items() if key in self._fleet.pollers}
        return await asyncio.to_thread(self._find, wanted, pollers, names, unread)

    def _find(
        self,
        wanted: FailureFilter,
        pollers: Sequence[Poller],
        names: Mapping[tuple[str, str], str],
        unread: int,
    ) -> Failures:
        text = wanted.text.lower()
        executions: list[FailingExecution] = []
        hosts: list[tuple[Collector, Sequence[Streak]]] = []
        reasons: Counter[FailureReason] = Counter()
        untracked = 0
        for poller in pollers:
            collector, state = poller.collector, poller.state
            if state is None:
                continue
            scope = collector.scope
            of_scope = text in names.get((scope.bk_scope_type, scope.bk_scope_id), "").lower()
            searched = "" if of_scope else text
            streaks = self._oldest_first(collector, state)
            if wanted.code or searched:
                streaks = [one for one in streaks if _matches(collector, one, wanted.code, searched)]
            hosts.append((collector, streaks))
            untracked += collector.failing_hosts(state).hosts_untracked()
            for labels, count in Counter(streak.labels for streak in streaks).items():
                code, reason = _code_and_reason(collector, labels)
                reasons[FailureReason(collector.name, code, reason)] += count
            if not wanted.code:
                executions += [one for one in _failing_executions(collector, state) if _mentions(one, searched)]
        executions.sort(key=_newest_execution, reverse=True)
        ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        return Failures(executions, _Hosts(hosts), ordered, names, unread, untracked)

    def _oldest_first(self, collector: Collector, state: CollectorState) -> Sequence[Streak]:
        # A client that reads slowly refers to this list; all share a long one until the next poll.
        key, hosts = Key(collector.name, collector.scope), collector.failing_hosts(state)
        kept, streaks = self._sorted.get(key, (None, ()))
        if kept is not hosts:
            streaks = sorted(hosts.streaks.values(), key=_since)
            if len(streaks) > MANY:
                self._sorted[key] = hosts, streaks
        return streaks


class _Hosts(Sequence[FailingHost]):
    """The streaks of several collectors, oldest first; a host is described when it is read."""

    def __init__(self, found: Sequence[tuple[Collector, Sequence[Streak]]]) -> None:
        self._found = [(collector, streaks) for collector, streaks in found if streaks]

    def __len__(self) -> int:
        return sum(len(streaks) for _, streaks in self._found)

    def __iter__(self) -> Iterator[FailingHost]:
        return (_failing_host(collector, streak) for collector, streak in self._merged())

    @overload
    def __getitem__(self, index: int) -> FailingHost: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FailingHost]: ...
    def __getitem__(self, index: int | slice) -> FailingHost | Sequence[FailingHost]:
        if isinstance(index, int):
            index = range(len(self))[index]
            return self[index : index + 1][0]
        start, stop, step = index.indices(len(self))
        return [_failing_host(*one) for one in itertools.islice(self._merged(), start, stop, step)]

    def _merged(self) -> Iterator[tuple[Collector, Streak]]:
        sources = [zip(itertools.repeat(collector), streaks) for collector, streaks in self._found]
        return heapq.merge(*sources, key=lambda one: one[1].since)


def _newest_execution(one: FailingExecution) -> tuple[float, int, str]:
    return one.end_time or 0.0, one.job_instance_id or one.job_id or 0, one.workflow_id or ""


def _since(streak: Streak) -> float:
    return streak.since


def _matches(collector: Collector, streak: Streak, code: str, text: str) -> bool:
    own_code, reason = _code_and_reason(collector, streak.labels)
    if code and code != (own_code or reason):
        return False
    host = streak.host
    return text in host.ip.lower() or text in host.bk_host_id or text in own_code.lower() or text in reason.lower()


def _mentions(execution: FailingExecution, text: str) -> bool:
    return text in execution.name.lower() or text in execution.status or text in str(execution.run_id or "")


def _code_and_reason(collector: Collector, labels: Labels) -> tuple[str, str]:
    named = dict(zip(collector.failure_labels, labels, strict=True))
    return named["code"], named.get("reason") or named.get("step", "")


def _failing_executions(collector: Collector, state: CollectorState) -> list[FailingExecution]:
    return [
        FailingExecution(
            **_of(collector),
            status=failed.status,
            name=failed.name,
            end_time=failed.end,
            url=collector.url(failed.id) or None,
            **_run_id(collector, failed.id),
        )
        for failed in collector.failed_executions(state)
    ]


def _failing_host(collector: Collector, streak: Streak) -> FailingHost:
    code, reason = _code_and_reason(collector, streak.labels)
    return FailingHost(
        **_of(collector),
        bk_cloud_id=streak.host.bk_cloud_id,
        bk_host_id=streak.host.bk_host_id,
        ip=streak.host.ip,
        code=code,
        reason=reason,
        since=streak.since,
        consecutive=streak.count,
        url=collector.url(streak.run) or None,
        **_run_id(collector, streak.run),
    )


def _of(collector: Collector) -> dict[str, Any]:
    scope = collector.scope
    return {"collector": collector.name, "bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}


def _run_id(collector: Collector, run: Run) -> dict[str, Any]:
    """The member that holds the id of a run."""
    return {collector.run_id: shown_id(run)} if collector.run_id else {}
