"""The truth: what happened in JOB, and what a correct exporter must therefore have counted.

The world writes an entry when something happens; `truth` folds the entries by the rules of the metric reference, from
the events alone. It shares no code with the exporter but the vocabulary, so that both being wrong alike is unlikely.

It assumes that every run is seen. Runs that begin *and* end between two looks of an exporter merge into one there, and
are two here: let at least one poll pass between two ends of the same execution before comparing.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class HostResult:
    """What came of one target in one attempt of a step. `host` None: a container."""

    host: Host | None
    code: int
    exit_code: int | None
    end_ms: int | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt of a step, as it stood when a run of the execution ended."""

    step_id: int
    execute_count: int
    step_type: int
    status: int
    end_ms: int | None
    results: tuple[HostResult, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """The execution has become this. `attempts` where it has ended. `gone`: the platform forgot it."""

    at_ms: int
    status: int
    start_ms: int | None = None
    end_ms: int | None = None
    attempts: tuple[Attempt, ...] = ()
    gone: bool = False

    @property
    def ended(self) -> bool:
        return job_outcome(self.status, self.end_ms is not None) is not None


@dataclass(slots=True)
class Record:
    """All that happened to one execution, in the order of time. `known_ms`: when it could first be listed."""

    id: int
    scope: Scope
    name: str
    plan_id: int
    task_type: int
    launch_mode: int
    create_ms: int
    known_ms: int
    changes: list[Change] = field(default_factory=list)

    @property
    def plan(self) -> object:
        """What later executions share with this one: the plan, for ad-hoc runs the name."""
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
    durations[task_type] = (count, sum of seconds); hosts_failing[code, reason].
    """

    created: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    reopened: int = 0
    lost: int = 0
    unfinished: Counter[tuple[str, str]] = field(default_factory=Counter)
    oldest_unfinished: dict[str, float] = field(default_factory=dict)
    last_finished: dict[str, float] = field(default_factory=dict)
    durations: dict[str, tuple[int, float]] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class _Run:
    """One end of an execution."""

    record: Record
    at_ms: int
    change: Change


class Ledger:
    """The entries of all scopes."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.begins_ms = 0
        """What ended before it may have been forgotten."""
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
        *,
        host_results: HostResults = "failed",
        dialect: Literal["v4", "v3"] = "v4",
        failing_host_ttl: float = 49 * 3600,
    ) -> Truth:
        """What an exporter must show at `until_ms` whose baseline was taken at `since_ms`.

        What had ended by the baseline counts nothing; what was unfinished then is not in `created` but counts when it
        ends. `dialect` v3 (the ESB too): no IPv6 addresses, and no host results of an execution with a container in it.
        Raises ValueError when part of it has been forgotten.
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
            baseline[record.id] = _follow(record, since_ms, until_ms, truth, runs)
        runs.sort(key=lambda run: (run.at_ms, run.record.id))
        if dialect == "v3":
            runs = [replace(run, change=_as_v3(run.change)) for run in runs]
        streaks = _examine(runs, baseline, host_results, truth)
        _show_failing(streaks, until_ms, failing_host_ttl, truth)
        return truth


def _as_v3(change: Change) -> Change:
    """What the v3 API can tell of it."""
    results = [result for attempt in change.attempts for result in attempt.results]
    if any(result.host is None for result in results):
        return replace(change, attempts=tuple(replace(attempt, results=()) for attempt in change.attempts))

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


def _follow(record: Record, since_ms: int, until_ms: int, truth: Truth, runs: list[_Run]) -> set[tuple[int, int]]:
    """Fold the changes of one execution into `truth`, append its new runs to `runs`.

    Returns the attempts (step, execute_count) of runs that had ended before the baseline.
    """
    old_attempts: set[tuple[int, int]] = set()
    run_end: int | None = None
    ended = timed = False
    last: Change | None = None
    for change in record.changes:
        at = max(change.at_ms, record.known_ms)
        if at > until_ms:
            break
        new = at > since_ms
        last = change
        if change.gone:
            truth.lost += new and not ended
            continue
        if not change.ended:
            truth.reopened += new and ended
            ended = False
            continue
        if ended and run_end is not None and change.end_ms != run_end:
            truth.reopened += new
            ended = False
        if not ended:
            if new:
                mode = LAUNCH_MODES.get(record.launch_mode, UNKNOWN)
                truth.finished[_task_type(record), mode, job_status_slug(change.status)] += 1
                runs.append(_Run(record, at, change))
            else:
                old_attempts.update((attempt.step_id, attempt.execute_count) for attempt in change.attempts)
                timed = True
        ended, run_end = True, change.end_ms
        if not timed and change.end_ms is not None:
            timed = True
            if change.start_ms is not None and change.end_ms >= change.start_ms:
                count, total = truth.durations.get(_task_type(record), (0, 0.0))
                seconds = (change.end_ms - change.start_ms) / 1000
                truth.durations[_task_type(record)] = (count + 1, total + seconds)
        outcome = job_outcome(change.status, change.end_ms is not None)
        if outcome is not None and change.end_ms is not None:
            truth.last_finished[outcome] = max(truth.last_finished.get(outcome, 0.0), change.end_ms / 1000)
    if last is not None and not last.gone and not ended:
        slug, created = job_status_slug(last.status), record.create_ms / 1000
        truth.unfinished[_task_type(record), slug] += 1
        truth.oldest_unfinished[slug] = min(truth.oldest_unfinished.get(slug, created), created)
    return old_attempts


@dataclass(slots=True)
class _News:
    """The newest result of one host in one execution. `first_ms`: the first of the failures there that led to it."""

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
    """Per host the results of the executions in which it was seen."""

    def __init__(self) -> None:
        self.results: dict[str, dict[int, _News]] = {}
        self._newest: dict[str, _News] = {}
        self._plans: Counter[object] = Counter()
        """How many hosts fail now, by the plan of their newest failure."""

    def note(self, record: Record, host: Host, code: int, end_ms: int) -> None:
        seen = self.results.setdefault(host.identity, {})
        before = seen.get(record.id)
        if before is not None and end_ms < before.end_ms:
            return
        first = before.first_ms if before is not None and before.failed else end_ms
        news = seen[record.id] = _News(host, end_ms, code, record.plan, first)
        newest = self._newest.get(host.identity)
        if newest is not None and news.end_ms < newest.end_ms:
            return
        self._newest[host.identity] = news
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
        streak = self.streak(identity)
        cleared = max((news.end_ms for news in self.results[identity].values() if not news.failed), default=-1)
        return min(news.first_ms if news.first_ms > cleared else news.end_ms for news in streak)


def _examine(
    runs: Iterable[_Run], baseline: dict[int, set[tuple[int, int]]], host_results: HostResults, truth: Truth
) -> _Streaks:
    """Fold the host results of the runs, in the order of time, as far as an exporter asks for them."""
    streaks = _Streaks()
    counted: dict[int, set[tuple[int, int]]] = baseline
    for run in runs:
        record, change = run.record, run.change
        failure = job_outcome(change.status, change.end_ms is not None) == "failure"
        counts = host_results == "all" or (host_results == "failed" and failure)
        clears = host_results == "failed" and change.status == SUCCESS and streaks.fails(record.plan)
        if counts:
            for attempt in change.attempts:
                key = (attempt.step_id, attempt.execute_count)
                if key in counted[record.id]:
                    continue
                counted[record.id].add(key)
                _count(attempt, truth)
        if counts or clears:
            for host, code, end_ms in _host_results(change):
                streaks.note(record, host, code, end_ms)
    return streaks


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
            ends = (result.end_ms, attempt.end_ms, change.end_ms, change.at_ms)
            end = next(end for end in ends if end is not None)
            last[result.host.identity] = (result.host, result.code, end)
    return (news for news in last.values() if news[1] != HOST_ALREADY_SUCCEEDED)


def _show_failing(streaks: _Streaks, until_ms: int, ttl: float, truth: Truth) -> None:
    for identity in streaks.results:
        streak = streaks.streak(identity)
        if not streak or until_ms - streak[0].end_ms >= ttl * 1000:
            continue
        newest = streak[0]
        reason = host_reason(newest.code)
        truth.failing[newest.host] = Failing(newest.code, reason, streaks.since(identity) / 1000, len(streak))
        truth.hosts_failing[str(newest.code), reason] += 1
