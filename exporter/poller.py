"""One poll as a transaction, and the loop around it.

    fetch ─► observe ─► commit ─► show          a failure before `commit` ends changes neither state nor counts

A poller belongs to one (collector, scope) and is the only one that reads and writes its state.

A poll that found nothing new changes only the times up to which history was read. They are not committed at once but by
`flush`: once a minute, and when the poller stops. A process that starts with older times, after `kill -9`, reads more
again; it counts nothing twice, because it knows the ids of everything that was counted.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec

from exporter import log
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import MANY, Collector, CollectorState, FinishedRun, Observed, Records, fold, shown_id
from exporter.config.schema import Config
from exporter.errors import ApiError, Reason, StateError, StateTaken
from exporter.exposed import ERRORS, Exposed, PollReport
from exporter.metrics.bounds import LabelBounds
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts, Labels
from exporter.metrics.page import Page
from exporter.model import Key
from exporter.state.base import Store, Stored
from exporter.telemetry import Telemetry
from exporter.timers import Timer, Timers

T = TypeVar("T")

REFUSED: frozenset[Reason] = frozenset({"auth", "permission"})
"""Reasons whose cause only a person can remove. Frequent polls do not help, and they fill the platform's logs."""
BYTES_PER_ROW = 128
"""Approximate bytes of one row in an encoded state."""
LARGE = MANY * BYTES_PER_ROW
"""Bytes of a state that is worked on in a thread."""
SMALL = 4096
"""Bytes of a state that is decoded for each poll instead of being kept decoded."""
LINES = 50
"""Lines that are logged in one go, in some 5 ms."""
UNKNOWN_LOGGED = 1000
"""Unknown values that are logged once each; later ones are only counted."""
LONGEST_DISTANCE = 300.0
"""Seconds: the largest distance between two polls of a refused scope whose interval is shorter."""


class Settings(msgspec.Struct, frozen=True):
    """The settings that all pollers share. `hold` (`counter_birth_hold`) and `request_timeout` in seconds;
    `executions`: which finished runs are logged."""

    hold: float
    stale_after: int
    request_timeout: float
    executions: Literal["none", "failed", "all"] = "none"

    @classmethod
    def of(cls, config: Config) -> Settings:
        return cls(
            config.counter_birth_hold, config.stale_after, config.blueking.request_timeout, config.log.executions
        )


class Services(msgspec.Struct, frozen=True):
    """What all pollers of a process share, whatever the configuration."""

    store: Store
    page: Page
    telemetry: Telemetry
    clock: Clock
    timers: Timers = msgspec.field(default_factory=Timers)


class Observation(msgspec.Struct, frozen=True):
    """The result of one poll, not committed yet.

    `payload`: the encoded state, None where `flush` may commit it later. `samples`: those of its gauges by family.
    `full`: the page had no room for some new label values. `unknown`: how many values were unknown, by field.
    """

    observed: Observed[Any]
    payload: bytes | None
    samples: Mapping[str, Mapping[Labels, float]]
    full: bool
    unknown: Mapping[str, int]


class Poller:
    """Polls one (collector, scope) from `start` to `stop`, and the page shows what is known.

    `reconfigure` exchanges the collector between two polls; state and counts stay. Between two polls there is a timer
    and no task, and a small state is kept as its encoded bytes: most of thousands of scopes are quiet.
    """

    __slots__ = (
        "_again", "_begun", "_clock", "_commits_next", "_committing", "_due", "_full", "_is_due", "_loaded",
        "_page", "_page_timer", "_refusals", "_settings", "_size", "_state", "_store", "_task", "_telemetry",
        "_timer", "_timers", "_unknown", "attempted", "collector", "exposed", "key", "message", "next_poll",
        "reason", "report", "request_id", "uncommitted_since",
    )  # fmt: skip

    def __init__(self, collector: Collector, settings: Settings, services: Services) -> None:
        self.key = Key(collector.name, collector.scope)
        self.collector = collector
        self.attempted = False
        """Whether a poll has ended, complete or not."""
        self.report = PollReport()
        self.reason: Reason | None = None
        self.message = ""
        self.request_id = ""
        self.next_poll: float | None = None
        self.uncommitted_since = math.inf
        """Monotonic time of the first poll that `flush` has to commit; inf if there is none."""
        self.exposed = Exposed(
            self.key, collector, services.page, services.telemetry, services.clock, settings.hold, settings.stale_after
        )
        self._settings = settings
        self._store = services.store
        self._page = services.page
        self._telemetry = services.telemetry
        self._clock = services.clock
        self._committing = asyncio.Lock()
        self._loaded = False
        self._commits_next = True
        """Whether the next poll is committed whatever it finds."""
        self._state: CollectorState | bytes | None = None
        """Encoded between two polls if it is small."""
        self._size = 0
        self._full = False
        self._refusals = 0
        self._unknown: set[tuple[str, str]] | None = None
        self._due: Callable[[Poller], None] | None = None
        self._is_due = False
        self._begun = 0.0
        self._task: asyncio.Task[None] | None = None
        self._timers = services.timers
        self._timer: Timer | None = None
        self._page_timer: Timer | None = None
        self._again = False

    @property
    def state(self) -> CollectorState | None:
        """What has been counted, None before the first complete poll. Any thread may read it."""
        state = self._state
        return self._decode(state) if isinstance(state, bytes) else state

    @property
    def _log(self) -> log.Logger:
        return log.get().bind(collector=self.key.collector, scope=str(self.key.scope))

    @property
    def success(self) -> bool | None:
        """Whether the newest poll was complete, None before the first one has ended."""
        return self.report.success

    @property
    def status(self) -> Literal["failing", "stale", "starting", "ok"]:
        """`starting`: no poll has ended. `stale`: gauges are withheld, for lack of a complete poll."""
        if not self.attempted:
            return "starting"
        if self.success:
            return "ok" if self.exposed.fresh(self.report) else "stale"
        return "failing" if self.exposed.fresh(self.report) or self.report.last_success is None else "stale"

    @property
    def wait(self) -> float | None:
        """Seconds until the next poll, 0.0 while one is due or running, None before the first."""
        return None if self.next_poll is None else max(0.0, self.next_poll - self._clock.monotonic())

    @property
    def age(self) -> float | None:
        """Seconds since the last complete poll, restarts included; None before the first."""
        last = self.report.last_success
        return None if last is None else max(0.0, self._clock.wall() - last)

    def reconfigure(self, collector: Collector, settings: Settings) -> None:
        """Use another configuration of the same (collector, scope) from the next poll on."""
        self.collector, self._settings = collector, settings
        self._commits_next = True
        self.retry_refused()
        self.exposed.reconfigure(collector, settings.hold, settings.stale_after)
        state = self.state
        if state is not None and self.report.completed is not None:
            bounds = LabelBounds(state.counts.values, self._page.reserve(self.key))
            self._update(samples=self.exposed.samples(state, bounds))
        self.show()
        self._page.release(self.key)

    async def load(self) -> None:
        """Take the state from the store. Raises `StateError`."""
        await self.show_stored(await self._store.load(self.key))

    async def show_stored(self, stored: Stored | None) -> None:
        """Take the state that the store has, and show it; one that cannot be decoded is a new baseline."""
        self._loaded = True
        if stored is not None:
            try:
                self._size = len(stored.payload)
                state = self._state = await self._work(partial(self._decode, stored.payload))
                self._update(current=stored.current, **self._times(state))
            except msgspec.DecodeError as error:
                self._telemetry.state_reset()
                self._log.error("state_unreadable", message=str(error), consequence="new baseline")
        self.show()
        if self._state is not None and stored is not None and self._size <= SMALL:
            self._state = stored.payload

    def start(self, due: Callable[[Poller], None]) -> None:
        """Poll until `stop`: first at once, then at the offset into each interval that the key's hash gives. `due` is
        called whenever a poll is due; it calls `begin`, at once or later."""
        self._due, self._begun = due, self._clock.monotonic()
        self._report_due()

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Begin the poll that is due, in `tasks`. Nothing happens if none is: it may have been stopped."""
        if self._is_due:
            self._is_due = False
            self._task = tasks.create_task(self._poll_all(), name=f"poll {self.key}")

    def stop(self) -> asyncio.Task[None] | None:
        """Stop polling. Returns the task of a poll that is running, which is cancelled."""
        self._due, self._is_due = None, False
        if self._timer is not None:
            self._timers.cancel(self._timer)
            self._timer = None
        self._cancel_page_timer()
        if self._task is not None:
            self._task.cancel()
        return self._task

    @property
    def started(self) -> bool:
        """Whether it polls, or waits for the next poll."""
        return self._due is not None

    def _report_due(self) -> None:
        self._timer = None
        if self._due is not None:
            self._is_due = True
            self._due(self)

    async def _poll_all(self) -> None:
        """Poll until there is no more history to read, and set the timer for the next poll."""
        try:
            while await self.poll():
                self.next_poll = self._clock.monotonic()
                await asyncio.sleep(0)
        finally:
            self._task = None
        # A poll that took longer than the interval skips the polls that it overran.
        interval, phase = self.collector.interval, zlib.crc32(str(self.key).encode()) / 2**32
        elapsed = (self._clock.monotonic() - self._begun) / interval
        self.next_poll = self._begun + (math.floor(elapsed - phase) + self._distance() + phase) * interval
        if self._again:
            self._report_due()
        elif self._due is not None:
            self._timer = self._timers.after(self.next_poll - self._clock.monotonic(), self._report_due)

    @property
    def circuit_open(self) -> bool:
        """Whether the scope is polled less often because two or more polls in a row were refused."""
        return self._refusals >= 2

    def _distance(self) -> int:
        """Intervals until the next poll: 1, or 2, 4, 8 … up to `LONGEST_DISTANCE` while the circuit is open."""
        if not self.circuit_open:
            return 1
        return max(1, min(1 << min(self._refusals - 1, 20), int(LONGEST_DISTANCE // self.collector.interval)))

    def retry_refused(self) -> None:
        """Poll at once if the newest polls were refused: the cause may have been removed."""
        if self._refusals:
            self._refusals = 0
            self._again = True
            if self._timer is not None:
                self._timers.cancel(self._timer)
                self._report_due()

    async def poll(self) -> bool:
        """Poll once. Returns whether there is more history to read at once; False after a poll that failed."""
        begun = self._clock.monotonic()
        self.next_poll = begun
        self._again = False
        more, payload = False, None
        finished: Iterable[FinishedRun] = ()
        try:
            if not self._loaded:
                await self.load()
            state = self._state = self.state
            self._store.ensure(self.key)
            deadline = Deadline(max(self.collector.interval, 2 * self._settings.request_timeout), self._clock)
            records = await self.collector.fetch(state, deadline)
            observation = await self.observe(records)
            if observation.payload is not None:
                async with self._committing:
                    await self._commit(observation.payload)
        except ApiError as error:
            self._failed(
                error.reason, str(error), error.request_id, api=error.api, code=error.code, status=error.status
            )
        except StateTaken:
            self._page.release(self.key)
            self._encode()
            return False  # and nothing is shown: the page does not have this key any more
        except StateError as error:
            self._failed("state", str(error))
        except Exception as error:
            # A bug in one collector must not stop the polls of the others.
            self._log.exception("poll_broken")
            self._failed("internal", f"{type(error).__name__}: {error}")
        else:
            self._succeeded(observation)
            more, finished = observation.observed.more, observation.observed.finished
            payload = observation.payload
        self._update(duration=self._clock.monotonic() - begun, circuit_open=self.circuit_open)
        self.attempted = True
        if self.success and payload is None:
            self._page.change_later(self.key, self.show)
        else:
            self.show()
        self._page.release(self.key)
        self._encode(payload)
        await self._log_finished(finished)
        return more and self.success is True

    async def observe(self, records: Records) -> Observation:
        """Fold the records of a poll. The state of the poller stays as it is."""
        state = self._state = self.state
        if state is not None and not self._commits_next and self.collector.commits_later:
            unchanged = self.collector.unchanged(state, records, self._clock.wall())
            if unchanged is not None:
                return Observation(Observed(unchanged), None, self.report.samples, self._full, {})
        counts = state.counts if state else Counts()
        room = self._page.reserve(self.key)
        tally = Tally(counts, self._clock.wall(), self._settings.hold, self.collector.families, room)
        return await self._work(partial(self._observe, state, records, tally), records.size)

    async def _work(self, work: Callable[[], T], rows: int = 0) -> T:
        """Run `work`, whose run time grows with the rows in the answers and in the state; in a thread if it is long."""
        return await fold(rows + self._size // BYTES_PER_ROW, work)

    def _observe(self, before: CollectorState | None, records: Records, tally: Tally) -> Observation:
        observed = self.collector.observe(before, records, tally)
        unknown = Counter(field for field, _ in observed.unknown)
        if self._may_commit_later(before, observed):
            return Observation(observed, None, self.report.samples, self._full, unknown)
        state: CollectorState = observed.state
        samples = self.exposed.samples(state, tally.bounds)
        values = tally.bounds.values()
        if values != state.counts.values:
            counts = msgspec.structs.replace(state.counts, values=values)
            observed = msgspec.structs.replace(observed, state=msgspec.structs.replace(state, counts=counts))
        payload = msgspec.msgpack.encode(observed.state)
        if len(payload) > LARGE:
            self.collector.failing_hosts(observed.state).prepare()
        self._size = len(payload)
        return Observation(observed, payload, samples, tally.bounds.full, unknown)

    def _may_commit_later(self, before: CollectorState | None, observed: Observed[Any]) -> bool:
        """Whether the poll found nothing new. A slice of a long history is always committed."""
        return (
            before is not None
            and not self._commits_next
            and not observed.more
            and self.collector.commits_later
            and before.counts is observed.state.counts
            and before.equals_except_times(observed.state)
        )

    def _decode(self, payload: bytes) -> CollectorState:
        state: CollectorState = msgspec.msgpack.decode(payload, type=self.collector.state_type)
        if len(payload) > LARGE:
            self.collector.failing_hosts(state).prepare()
        return state

    def take(self, observation: Observation) -> None:
        """Use an observation as the new state without a commit, and show it."""
        self._succeeded(observation)
        self.show()

    def _encode(self, payload: bytes | None = None) -> None:
        """Keep a small state as bytes until it is needed again; `payload`: those bytes where they are known."""
        if self._size <= SMALL and self._state is not None and not isinstance(self._state, bytes):
            self._state = payload or msgspec.msgpack.encode(self._state)

    def _times(self, state: CollectorState) -> dict[str, Any]:
        """What the report says of a state."""
        untracked = self.collector.failing_hosts(state).hosts_untracked()
        return {"last_success": state.last_success, "watermark": state.watermark, "untracked": untracked}

    def show(self, *, final: bool = False) -> None:
        """Put the state and the newest poll on the page; `final` as in `Exposed.show`. A failure is logged and
        counted."""
        try:
            self.exposed.show(self.report, lambda: self.state, final=final)
        except Exception as error:
            self._log.exception("page_broken")
            self._failed("internal", f"{type(error).__name__}: {error}")
        if not final:
            self._set_page_timer()

    def _set_page_timer(self) -> None:
        """Show again when time alone has changed something, unless the timer that is set ends before."""
        # A timer that fires too early finds nothing changed and is set again, so it fires a little late.
        due = asyncio.get_running_loop().time() + self.exposed.wait(self.report) + 0.01
        if due < (self._page_timer.when if self._page_timer else math.inf):
            self._cancel_page_timer()
            self._page_timer = self._timers.at(due, self._show_again)

    def _show_again(self) -> None:
        self._page_timer = None
        if self.exposed.wait(self.report) > 0:
            self._set_page_timer()  # a poll has been complete since the timer was set
        else:
            self.show()

    def _cancel_page_timer(self) -> None:
        if self._page_timer is not None:
            self._timers.cancel(self._page_timer)
            self._page_timer = None

    def close(self) -> None:
        """Leave the page; the state stays in the store."""
        self._cancel_page_timer()
        self.exposed.close()

    async def save(self) -> None:
        """Commit the state again, because the store has lost it. Raises `StateError`."""
        async with self._committing:
            payload = await self._payload()
            if payload is not None:
                await self._commit(payload)

    async def _payload(self) -> bytes | None:
        state = self._state
        if state is None or isinstance(state, bytes):
            return state
        return await self._work(partial(msgspec.msgpack.encode, state))

    def commit_next(self) -> None:
        """Commit the next poll whatever it finds: the state may not be writable, and then the poll has to fail."""
        self._commits_next = True

    async def begin_flush(self) -> bytes | None:
        """The state, if polls wait to be committed and no other commit runs; then `end_flush` must follow."""
        if self.uncommitted_since == math.inf or self._committing.locked():
            return None
        await self._committing.acquire()
        self.uncommitted_since = math.inf
        try:
            return await self._payload()
        except BaseException:
            self.cancel_flush()
            raise

    def end_flush(self, error: StateError | None) -> None:
        """The state that `begin_flush` gave has been committed, unless there is an error; then the next poll is
        committed whatever it finds."""
        self._committing.release()
        self._committed(error, self._clock.monotonic())

    def cancel_flush(self) -> None:
        """Nothing is known of the state that `begin_flush` gave."""
        self._committing.release()
        self.uncommitted_since = self._clock.monotonic()

    async def _commit(self, payload: bytes) -> None:
        waiting, self.uncommitted_since = self.uncommitted_since, math.inf
        try:
            await self._store.commit(self.key, payload)
        except StateError as error:
            self._committed(error, waiting)
            raise
        self._committed(None)

    def _committed(self, error: StateError | None, waiting: float = math.inf) -> None:
        """Note how a commit has ended. `waiting`: since when polls had waited for it."""
        if error is None:
            self._telemetry.state_written(self._clock.wall())
        elif not isinstance(error, StateTaken):  # else nothing is wrong with the state
            self.uncommitted_since, self._commits_next = waiting, True
            self._telemetry.state_write_error()

    def _succeeded(self, observation: Observation) -> None:
        observed = observation.observed
        if self.success is False:
            self._log.info("poll_recovered")
        self._refusals = 0
        if observation.payload is not None:
            self._commits_next = observed.more
        else:
            self.uncommitted_since = min(self.uncommitted_since, self._clock.monotonic())
        completed, current = self._clock.monotonic(), self.report.current or not observed.more
        before = self.state
        self.exposed.counted(before.counts if before else Counts(), observed.state.counts)
        self._state = observed.state
        times = self._times(observed.state)
        self._update(samples=observation.samples, success=True, completed=completed, current=current, **times)
        self.reason, self.message, self.request_id = None, "", ""
        if observation.full and not self._full:
            self._log.warning("max_series_reached", consequence="new label values of the platform are shown as other")
        self._full = observation.full
        for failed in observed.errors:
            self._count_error(failed.reason)
            fields = msgspec.structs.asdict(failed)
            del fields["configured"]
            self._log.warning("call_failed", **fields)
        for field, count in observation.unknown.items():
            self._telemetry.unknown_values(field, count)
        for field, value in itertools.islice(observed.unknown, UNKNOWN_LOGGED):
            logged = self._unknown = self._unknown or set()
            if (field, value) not in logged and len(logged) < UNKNOWN_LOGGED:
                logged.add((field, value))
                self._log.warning("unknown_value", field=field, value=value)

    async def _log_finished(self, runs: Iterable[FinishedRun]) -> None:
        """Log the runs that are wanted in the log. They have been committed, so no run is logged twice."""
        wanted = self._settings.executions
        if wanted == "none":
            return
        for number, run in enumerate((run for run in runs if wanted == "all" or run.failed), 1):
            self._log.info(
                "execution_finished",
                **{self.collector.run_id: shown_id(run.id)},
                name=run.name,
                status=run.status,
                start=log.utc(run.start),
                end=log.utc(run.end),
                failed_hosts=" ".join(f"{code}:{count}" for code, count in sorted(run.failed_hosts.items())),
                url=self.collector.url(run.id),
            )
            if number % LINES == 0:
                await asyncio.sleep(0)

    def _failed(self, reason: Reason, message: str, request_id: str = "", **fields: object) -> None:
        self._refusals += reason in REFUSED
        self._update(success=False)
        self.reason, self.message, self.request_id = reason, message, request_id
        self._count_error(reason)
        if request_id:
            fields["request_id"] = request_id
        self._log.warning("poll_failed", reason=reason, message=message, **fields)

    def _count_error(self, reason: str) -> None:
        tally = Tally(self.report.errors, self._clock.wall(), self._settings.hold)
        tally.inc(ERRORS, (reason,))
        self._update(errors=tally.freeze())

    def _update(self, **changes: Any) -> None:
        self.report = msgspec.structs.replace(self.report, **changes)


async def flush(store: Store, pollers: Iterable[Poller]) -> bool:
    """Commit the polls of these pollers that found nothing new, all in one go. False if some of that fails."""
    begun: list[Poller] = []
    payloads: dict[Key, bytes] = {}
    try:
        for poller in pollers:
            payload = await poller.begin_flush()
            if payload is not None:
                begun.append(poller)
                payloads[poller.key] = payload
        errors = await store.commit_many(payloads) if payloads else {}
    except BaseException:
        for poller in begun:
            poller.cancel_flush()
        raise
    for poller in begun:
        poller.end_flush(errors.get(poller.key))
    return all(isinstance(error, StateTaken) for error in errors.values())
