"""The truth: what happened in JOB, and what a correct exporter must have counted.

The world writes an entry for each event; `truth` computes the metrics from the entries, by the rules of the metric
reference. Apart from the words of BlueKing it shares no code with the exporter, so that both are unlikely to have the
same error.

It assumes that the exporter sees every run. Runs that begin *and* end between two polls are one run for the exporter
and two runs here: let at least one poll happen between two ends of the same execution before comparing. An exporter
reads steps a few more times if they still run after their execution has ended. Until it has stopped doing so,
`Truth.pending` is not 0 and nothing can be compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from exporter.model import (
    HOST_ALREADY_SUCCEEDED,
    HOST_SUCCESS,
    HOST_WAITING,
    LAUNCH_MODES,
    STEP_TYPES,
    TASK_TYPES,
    UNKNOWN,
    Host,
    Scope,
    host_reason,
    job_outcome,
    job_status_slug,
)

HostResults = Literal["failed", "all", "none"]
SCRIPT_STEP = 1
SUCCESS = 3
FAILED_STEP = frozenset({4, 9})
RUNNING_STEP = frozenset({2, 10})
RUNNING_HOST = 7
DAY_MS = 86_400_000
FUTURE_MS = 300_000
"""ms: a time further in the future is invalid."""
Refusal = Literal["", "for good", "for now"]


@dataclass(frozen=True, slots=True)
class HostResult:
    """The result of one target in one attempt of a step. `host` None: a container."""

    host: Host | None
    code: int
    exit_code: int | None
    end_ms: int | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt of a step, as it was when a run of the execution ended."""

    step_id: int
    execute_count: int
    step_type: int
    status: int
    end_ms: int | None
    results: tuple[HostResult, ...]

    @property
    def running(self) -> bool:
        """Whether the platform showed it as running when the execution had ended."""
        return self.status in RUNNING_STEP or any(result.code == RUNNING_HOST for result in self.results)


@dataclass(frozen=True, slots=True)
class Change:
    """A new status of an execution, with times as the platform shows them. `attempts`: if it has ended. `gone`: the
    platform no longer knows it."""

    at_ms: int
    status: int
    start_ms: int | None = None
    end_ms: int | None = None
    attempts: tuple[Attempt, ...] = ()
    gone: bool = False
    without_hosts: bool = False
    """The API returns no host results."""

    @property
    def ended(self) -> bool:
        return job_outcome(self.status, self.end_ms is not None) is not None


@dataclass(slots=True)
class Record:
    """All changes of one execution, in the order of time. `known_ms`: when the list first shows it. `status_refused`:
    whether the platform refuses its status. `look_up_refused`: the list shows it by its creation time only, not by its
    id or status."""

    id: int
    scope: Scope
    name: str
    plan_id: int
    task_type: int
    launch_mode: int
    create_ms: int
    known_ms: int
    status_refused: Refusal = ""
    look_up_refused: bool = False
    changes: list[Change] = field(default_factory=list)

    @property
    def plan(self) -> object:
        """The plan of the execution, or its name if it has no plan."""
        return self.plan_id if self.plan_id > 0 else self.name


@dataclass(frozen=True)
class Failing:
    """A host that is failing. `since`: unix seconds of the first failure of the streak of `consecutive` executions."""

    code: int
    reason: str
    since: float
    consecutive: int


@dataclass
class Truth:
    """Expected values of the metrics, keyed by their labels in the order given here.

    created[task_type, launch_mode]; finished[task_type, launch_mode, status]; host_failures[code, reason];
    step_failures[step_type]; exit_codes[exit_code] (all of them, not the first 64); unfinished[task_type, status];
    oldest_unfinished[status] and last_finished[outcome] in unix seconds, the latter over the whole history, of which
    an exporter knows no success from before the lookback of its baseline;
    durations and waits[task_type] = (count, sum of seconds); hosts_failing[code, reason]; watched_finished[job_name,
    outcome], watched_since[job_name] in unix seconds; watched_duration[job_name] = (end of the execution, seconds).
    truncated: executions without all of their host results; pending: those of which that is not decided yet.
    """

    created: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    reopened: int = 0
    lost: int = 0
    unfinished: Counter[tuple[str, str]] = field(default_factory=Counter)
    oldest_unfinished: dict[str, float] = field(default_factory=dict)
    last_finished: dict[str, float] = field(default_factory=dict)
    durations: dict[str, tuple[int, float]] = field(default_factory=dict)
    waits: dict[str, tuple[int, float]] = field(default_factory=dict)
    watched_unfinished: Counter[str] = field(default_factory=Counter)
    watched_since: dict[str, float] = field(default_factory=dict)
    watched_finished: dict[tuple[str, str], float] = field(default_factory=dict)
    watched_duration: dict[str, tuple[float, float]] = field(default_factory=dict)
    truncated: int = 0
    pending: int = 0
    step_failures: Counter[str] = field(default_factory=Counter)
    host_results: int = 0
    host_failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    exit_codes: Counter[str] = field(default_factory=Counter)
    hosts_failing: Counter[tuple[str, str]] = field(default_factory=Counter)
    failing: dict[Host, Failing] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The same as JSON: a list of objects of labels and `value` wherever there are labels."""

        def rows(values: Mapping[Any, int], *names: str) -> list[dict[str, object]]:
            return [{**dict(zip(names, key, strict=True)), "value": value} for key, value in sorted(values.items())]

        return {
            "created": rows(self.created, "task_type", "launch_mode"),
            "finished": rows(self.finished, "task_type", "launch_mode", "status"),
            "reopened": self.reopened,
            "lost": self.lost,
            "unfinished": rows(self.unfinished, "task_type", "status"),
            "oldest_unfinished": self.oldest_unfinished,
            "last_finished": self.last_finished,
            "durations": {name: {"count": count, "sum": total} for name, (count, total) in self.durations.items()},
            "waits": {name: {"count": count, "sum": total} for name, (count, total) in self.waits.items()},
            "truncated": self.truncated,
            "step_failures": dict(self.step_failures),
            "host_results": self.host_results,
            "host_failures": rows(self.host_failures, "code", "reason"),
            "exit_codes": dict(self.exit_codes),
            "hosts_failing": rows(self.hosts_failing, "code", "reason"),
            "failing": [
                {
                    "bk_cloud_id": host.bk_cloud_id, "bk_host_id": host.bk_host_id, "ip": host.ip,
                    "code": str(state.code), "reason": state.reason,
                    "since": state.since, "consecutive": state.consecutive,
                }
                for host, state in sorted(self.failing.items())
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Exporter:
    """The configuration of the exporter, on which the truth depends. Durations in seconds.

    `dialect` v3 (the ESB too): no IPv6 addresses, and no host results of an execution that has a container. `watch`:
    job_name → name of the executions. `asks_again`: for how long, at most, the exporter reads steps that still run.
    """

    host_results: HostResults = "failed"
    dialect: Literal["v4", "v3"] = "v4"
    failing_host_ttl: float = 49 * 3600
    lookback: float = 600
    max_unfinished_age: float = 7 * 86400
    watch: Mapping[str, str] = field(default_factory=dict)
    asks_again: float = 300


@dataclass(frozen=True, slots=True)
class _Run:
    """One end of an execution; `again`: the steps of the same end are read once more."""

    record: Record
    at_ms: int
    change: Change
    again: bool = False


DEFAULT = Exporter()


class Ledger:
    """The entries of all scopes."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.begins_ms = 0
        """Executions that ended before this time may have been dropped."""
        self._by_scope: dict[Scope, list[Record]] = {}

    def created(self, record: Record) -> None:
        self.records[record.id] = record
        self._by_scope.setdefault(record.scope, []).append(record)

    def changed(self, execution: int, change: Change) -> None:
        self.records[execution].changes.append(change)

    def forget(self, until_ms: int, known: Container[int]) -> None:
        """Drop what was created before `until_ms`, except these executions."""
        before = len(self.records)
        for scope, records in self._by_scope.items():
            self._by_scope[scope] = [one for one in records if one.create_ms >= until_ms or one.id in known]
        self.records = {one.id: one for records in self._by_scope.values() for one in records}
        if len(self.records) < before:
            self.begins_ms = until_ms

    def truth(
        self,
        scope: Scope,
        since_ms: int,
        until_ms: int,
        exporter: Exporter = DEFAULT,
    ) -> Truth:
        """The values that an exporter must show at `until_ms`, if it made its baseline at `since_ms`.

        Executions that had ended before the baseline are not counted. Executions that were unfinished then are not in
        `created` and are counted when they end. Raises ValueError if a part of the entries has been dropped.
        """
        if since_ms < self.begins_ms:
            raise ValueError(f"the ledger begins at {self.begins_ms} ms")
        truth = Truth()
        runs: list[_Run] = []
        baseline: dict[int, set[tuple[int, int]]] = {}
        for record in self._by_scope.get(scope, ()):
            if record.known_ms > until_ms:
                continue
            if record.known_ms > since_ms:
                truth.created[_task_type(record), LAUNCH_MODES.get(record.launch_mode, UNKNOWN)] += 1
            baseline[id(record)] = _Follower(record, since_ms, until_ms, exporter, truth, runs).follow()
        runs.sort(key=lambda run: (run.at_ms, run.record.id))
        if exporter.dialect == "v3":
            runs = [replace(run, change=_as_v3(run.change)) for run in runs]
        streaks = _examine(runs, baseline, exporter, until_ms, truth)
        _show_failing(streaks, until_ms, exporter.failing_host_ttl, truth)
        return truth


def _as_v3(change: Change) -> Change:
    """The change as the v3 API shows it."""
    results = [result for attempt in change.attempts for result in attempt.results]
    if any(result.host is None for result in results):
        attempts = tuple(replace(attempt, results=()) for attempt in change.attempts)
        return replace(change, attempts=attempts, without_hosts=True)

    def seen(result: HostResult) -> HostResult:
        host = result.host
        if host is None or ":" not in host.ip:
            return result
        return replace(result, host=Host(host.bk_cloud_id, host.bk_host_id, ""))

    return replace(
        change,
        attempts=tuple(
            replace(attempt, results=tuple(seen(result) for result in attempt.results)) for attempt in change.attempts
        ),
    )


def _task_type(record: Record) -> str:
    return TASK_TYPES.get(record.task_type, UNKNOWN)


def _known(time_ms: int | None, now_ms: int) -> int | None:
    """A time of the platform; None for an invalid one: 0, negative, or far in the future."""
    return time_ms if time_ms is not None and 0 < time_ms <= now_ms + FUTURE_MS else None


class _Follower:
    """Adds the changes of one execution to a truth, and its new runs to `runs`."""

    def __init__(
        self, record: Record, since_ms: int, until_ms: int, exporter: Exporter, truth: Truth, runs: list[_Run]
    ) -> None:
        self.record = record
        self.until_ms = until_ms
        self.exporter = exporter
        self.truth = truth
        self.runs = runs
        visible_until = record.create_ms + exporter.lookback * 1000 if record.look_up_refused else math.inf
        seen = [
            (at, change)
            for change in record.changes
            if (at := max(change.at_ms, record.known_ms)) <= min(until_ms, visible_until)
        ]
        self.before = [change for at, change in seen if at <= since_ms]
        self.news = [(at, change) for at, change in seen if at > since_ms]
        self.task_type = _task_type(record)
        self.ended = self.timed = self.started = False
        self.end_ms: int | None = None
        self.last: Change | None = None

    def follow(self) -> set[tuple[int, int]]:
        """Returns the attempts (step, execute_count) of a run that had ended before the baseline."""
        old = self._take_baseline()
        for at, change in self.news:
            self._take(at, change)
        self._show_unfinished()
        return old

    def _take_baseline(self) -> set[tuple[int, int]]:
        """Take the outcome of the changes before the baseline; nothing else of them is known."""
        for change in self.before:
            self._mark_finished(change, self._end(change), first=False)
        if not self.before:
            return set()
        last = self.last = self.before[-1]
        self.started = self._start(last) is not None
        self.ended = self.timed = last.ended
        self.end_ms = self._end(last)
        return {(attempt.step_id, attempt.execute_count) for attempt in last.attempts} if last.ended else set()

    def _take(self, at_ms: int, change: Change) -> None:
        truth, record = self.truth, self.record
        self.last = change
        if change.gone:
            truth.lost += not self.ended
            return
        self._observe_wait(change)
        if not change.ended:
            truth.reopened += self.ended
            self.ended = False
            return
        end = self._end(change)
        again = self.ended
        if self.ended and None not in (self.end_ms, end) and end != self.end_ms:
            truth.reopened += 1
            again = False
        if not again:
            mode = LAUNCH_MODES.get(record.launch_mode, UNKNOWN)
            truth.finished[self.task_type, mode, job_status_slug(change.status)] += 1
        self.runs.append(_Run(record, at_ms, change, again))
        self._mark_finished(change, end, first=not self.timed)
        if not self.timed and end is not None:
            self.timed = True
            start = self._start(change)
            if start is not None and end >= start:
                _observe(truth.durations, self.task_type, (end - start) / 1000)
        self.ended, self.end_ms = True, end if end is not None else self.end_ms

    def _observe_wait(self, change: Change) -> None:
        start = self._start(change)
        if start is None or self.started or self.timed or self.ended:
            return
        self.started = True
        if start >= self.record.create_ms:
            _observe(self.truth.waits, self.task_type, (start - self.record.create_ms) / 1000)

    def _mark_finished(self, change: Change, end: int | None, *, first: bool) -> None:
        outcome = job_outcome(change.status, change.end_ms is not None)
        if outcome is None or end is None:
            return
        truth = self.truth
        truth.last_finished[outcome] = max(truth.last_finished.get(outcome, 0.0), end / 1000)
        start = self._start(change)
        for job in self._watched():
            truth.watched_finished[job, outcome] = max(truth.watched_finished.get((job, outcome), 0.0), end / 1000)
            if first and start is not None and start <= end and end / 1000 >= truth.watched_duration.get(job, (0,))[0]:
                truth.watched_duration[job] = (end / 1000, (end - start) / 1000)

    def _show_unfinished(self) -> None:
        last, record, truth = self.last, self.record, self.truth
        if last is None or last.gone or self.ended:
            return
        if self.until_ms - record.create_ms > self.exporter.max_unfinished_age * 1000:
            truth.lost += 1
            return
        slug, created = job_status_slug(last.status), record.create_ms / 1000
        truth.unfinished[self.task_type, slug] += 1
        truth.oldest_unfinished[slug] = min(truth.oldest_unfinished.get(slug, created), created)
        since = (self._start(last) or record.create_ms) / 1000
        for job in self._watched():
            truth.watched_unfinished[job] += 1
            truth.watched_since[job] = min(truth.watched_since.get(job, since), since)

    def _watched(self) -> list[str]:
        return [job for job, name in self.exporter.watch.items() if name == self.record.name]

    def _start(self, change: Change) -> int | None:
        start = _known(change.start_ms, change.at_ms)
        return start if start is not None and start >= self.record.create_ms - DAY_MS else None

    def _end(self, change: Change) -> int | None:
        return _known(change.end_ms, change.at_ms)


def _observe(histogram: dict[str, tuple[int, float]], task_type: str, seconds: float) -> None:
    count, total = histogram.get(task_type, (0, 0.0))
    histogram[task_type] = (count + 1, total + seconds)


@dataclass(slots=True)
class _News:
    """The newest result of one host in one execution. `first_ms`: the first of its failures in that execution."""

    host: Host
    end_ms: int
    code: int
    plan: object
    first_ms: int

    @property
    def failed(self) -> bool:
        return _failed(self.code)


def _failed(code: int) -> bool:
    return code not in HOST_WAITING and code not in (HOST_SUCCESS, HOST_ALREADY_SUCCEEDED)


class _Streaks:
    """The results of each host by execution. One address is one host, with or without its id."""

    def __init__(self) -> None:
        self.results: dict[str, dict[int, _News]] = {}
        self._newest: dict[str, _News] = {}
        self._plans: Counter[object] = Counter()
        """How many hosts fail now, by the plan of their newest failure."""

    def note(self, record: Record, host: Host, code: int, end_ms: int) -> None:
        identity = _identity(host)
        seen = self.results.setdefault(identity, {})
        before = seen.get(id(record))
        if before is not None and end_ms < before.end_ms:
            return
        first = end_ms
        if before is not None and before.failed:
            first = before.first_ms
            if not host.bk_host_id and before.end_ms > self._cleared(identity):
                host = before.host
        news = seen[id(record)] = _News(host, end_ms, code, record.plan, first)
        newest = self._newest.get(identity)
        if newest is not None and news.end_ms < newest.end_ms:
            return
        self._newest[identity] = news
        if newest is not None and newest.failed:
            self._plans[newest.plan] -= 1
        if news.failed:
            self._plans[news.plan] += 1

    def streak(self, identity: str) -> list[_News]:
        """The failures of the host since its newest success, newest first; empty when it is not failing."""
        ordered = sorted(self.results[identity].values(), key=lambda news: news.end_ms, reverse=True)
        streak = []
        for news in ordered:
            if not news.failed:
                break
            streak.append(news)
        return streak

    def fails(self, plan: object) -> bool:
        """Whether any host fails now whose newest failure came from this plan."""
        return self._plans[plan] > 0

    def since(self, identity: str) -> int:
        """The first failure of the present streak, which may lie in an earlier run of one of its executions."""
        streak, cleared = self.streak(identity), self._cleared(identity)
        return min(news.first_ms if news.first_ms > cleared else news.end_ms for news in streak)

    def _cleared(self, identity: str) -> int:
        """The time of the newest success of the host."""
        return max((news.end_ms for news in self.results[identity].values() if not news.failed), default=-1)


def _identity(host: Host) -> str:
    return host.address or host.bk_host_id


def _examine(
    runs: Iterable[_Run],
    baseline: dict[int, set[tuple[int, int]]],
    exporter: Exporter,
    until_ms: int,
    truth: Truth,
) -> _Streaks:
    """Add the host results of the runs, in the order of time, as far as an exporter reads them."""
    streaks = _Streaks()
    counted: dict[int, set[tuple[int, int]]] = baseline
    running: dict[int, _Run] = {}
    """Runs whose steps still ran when they were first read, by record."""

    def take(run: _Run, *, last: bool) -> None:
        known = counted[id(run.record)]
        for attempt in run.change.attempts:
            key = (attempt.step_id, attempt.execute_count)
            if _counts(run, exporter) and key not in known and (last or not attempt.running):
                known.add(key)
                _count(attempt, truth)

    for run in runs:
        record, change = run.record, run.change
        if run.again:
            if running.pop(id(record), None) is None:
                continue
        elif not _counts(run, exporter) and not (
            exporter.host_results == "failed" and change.status == SUCCESS and streaks.fails(record.plan)
        ):
            continue
        elif record.status_refused:
            truth.truncated += 1
            continue
        elif change.without_hosts:
            truth.truncated += 1
        take(run, last=False)
        for host, code, end_ms in _host_results(change):
            streaks.note(record, host, code, end_ms)
        if any(attempt.running for attempt in change.attempts):
            running[id(record)] = run
    for run in running.values():
        if until_ms < run.at_ms + exporter.asks_again * 1000:
            truth.pending += 1
        else:
            truth.truncated += 1
            take(run, last=True)
    return streaks


def _counts(run: _Run, exporter: Exporter) -> bool:
    outcome = job_outcome(run.change.status, run.change.end_ms is not None)
    return exporter.host_results == "all" or (exporter.host_results == "failed" and outcome == "failure")


def _count(attempt: Attempt, truth: Truth) -> None:
    if attempt.status in FAILED_STEP:
        truth.step_failures[STEP_TYPES.get(attempt.step_type, UNKNOWN)] += 1
    for result in attempt.results:
        if result.code in HOST_WAITING:
            continue
        truth.host_results += 1
        if not _failed(result.code):
            continue
        truth.host_failures[str(result.code), host_reason(result.code)] += 1
        if attempt.step_type == SCRIPT_STEP and result.exit_code is not None:
            truth.exit_codes[str(result.exit_code)] += 1


def _host_results(change: Change) -> Iterator[tuple[Host, int, int]]:
    """Each host's result in the last step that it takes part in: (host, code, end)."""
    last: dict[str, tuple[Host, int, int]] = {}
    for attempt in change.attempts:
        for result in attempt.results:
            if result.host is None or result.code in HOST_WAITING:
                continue
            ends = (result.end_ms, attempt.end_ms, _known(change.end_ms, change.at_ms), change.at_ms)
            end = next(end for end in ends if end is not None)
            last[_identity(result.host)] = (result.host, result.code, end)
    return (news for news in last.values() if news[1] != HOST_ALREADY_SUCCEEDED)


def _show_failing(streaks: _Streaks, until_ms: int, ttl: float, truth: Truth) -> None:
    for identity in streaks.results:
        streak = streaks.streak(identity)
        if not streak or until_ms - streak[0].end_ms >= ttl * 1000:
            continue
        newest = streak[0]
        reason = host_reason(newest.code)
        host = next((news.host for news in streak if news.host.bk_host_id), newest.host)
        truth.failing[host] = Failing(newest.code, reason, streaks.since(identity) / 1000, len(streak))
        truth.hosts_failing[str(newest.code), reason] += 1
