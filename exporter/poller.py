"""One poll as a transaction, and the loop around it.

    fetch ─► observe ─► commit ─► show          a failure before `commit` ends changes neither state nor counts

A poller belongs to one (collector, scope) and is the only one that reads and writes its state.

A poll that found nothing new changes only the times up to which history was read. They are not committed at once but by
`flush`: once a minute, and when the poller stops. A process that starts with older times, after `kill -9`, reads more
again; it counts nothing twice, because it knows the ids of everything that was counted.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from exporter.state.base import Store
from exporter.telemetry import Telemetry

T = TypeVar("T")

REFUSED: frozenset[Reason] = frozenset({"auth", "permission"})
"""Reasons whose cause only a person can remove. Frequent polls do not help, and they fill the platform's logs."""
BYTES_PER_ROW = 128
"""Approximate bytes of one row in an encoded state."""
LARGE = MANY * BYTES_PER_ROW
"""Bytes of a state that is worked on in a thread."""
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
    """Polls one (collector, scope): `run` polls until it is cancelled, and the page shows what is known.

    `reconfigure` exchanges the collector between two polls; state and counts stay.
    """

    def __init__(self, collector: Collector, settings: Settings, services: Services) -> None:
        self.key = Key(collector.name, collector.scope)
        self.collector = collector
        self.attempted = asyncio.Event()
        self.report = PollReport()
        self.reason: Reason | None = None
        self.message = ""
        self.request_id = ""
        self.next_poll: float | None = None
        self.exposed = Exposed(
            collector, services.page, services.telemetry, services.clock, settings.hold, settings.stale_after
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
        self._uncommitted_since: float | None = None
        """Monotonic time of the first poll that `flush` has to commit."""
        self._size = 0
        self._full = False
        self._refusals = 0
        self._poll_now = asyncio.Event()
        self._unknown: set[tuple[str, str]] = set()
        self._log = log.get().bind(collector=collector.name, scope=str(collector.scope))

    @property
    def state(self) -> CollectorState | None:
        """What has been counted and committed, None before the first complete poll."""
        return self.report.state

    @property
    def success(self) -> bool | None:
        """Whether the newest poll was complete, None before the first one has ended."""
        return self.report.success

    @property
    def status(self) -> Literal["failing", "stale", "starting", "ok"]:
        """`starting`: no poll has ended. `stale`: gauges are withheld, for lack of a complete poll."""
        if not self.attempted.is_set():
            return "starting"
        if self.success:
            return "ok" if self.exposed.fresh else "stale"
        return "failing" if self.exposed.fresh or self.state is None else "stale"

    @property
    def wait(self) -> float | None:
        """Seconds until the next poll, 0.0 while one is due or running, None before the first."""
        return None if self.next_poll is None else max(0.0, self.next_poll - self._clock.monotonic())

    @property
    def age(self) -> float | None:
        """Seconds since the last complete poll, restarts included; None before the first."""
        return None if self.state is None else max(0.0, self._clock.wall() - self.state.last_success)

    def reconfigure(self, collector: Collector, settings: Settings) -> None:
        """Use another configuration of the same (collector, scope) from the next poll on."""
        self.collector, self._settings = collector, settings
        self.retry_refused()
        self.exposed.reconfigure(collector, settings.hold, settings.stale_after)
        if self.state is not None and self.report.completed is not None:
            bounds = LabelBounds(self.state.counts.values, self._page.reserve(self.key))
            self._update(samples=self.exposed.samples(self.state, bounds))
        self.show()
        self._page.release(self.key)

    async def load(self) -> None:
        """Take the state from the store. Raises `StateError`; a state that cannot be decoded is a new baseline."""
        stored = await self._store.load(self.key)
        if stored is not None:
            try:
                self._size = len(stored.payload)
                state = await self._work(partial(self._decode, stored.payload))
                self._update(state=state, current=stored.current)
            except msgspec.DecodeError as error:
                self._telemetry.state_reset()
                self._log.error("state_unreadable", message=str(error), consequence="new baseline")
        self._loaded = True

    async def run(self) -> None:
        """Poll for ever: first at once, then at the offset into each interval that the key's hash gives."""
        begun = self._clock.monotonic()
        phase = zlib.crc32(str(self.key).encode()) / 2**32
        while True:
            more = await self.poll()
            interval = self.collector.interval
            if more:
                self.next_poll = self._clock.monotonic()
                await asyncio.sleep(0)
                continue
            # A poll that took longer than the interval skips the polls that it overran.
            elapsed = (self._clock.monotonic() - begun) / interval
            self.next_poll = begun + (math.floor(elapsed - phase) + self._distance() + phase) * interval
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.next_poll - self._clock.monotonic()):
                    await self._poll_now.wait()

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
            self._poll_now.set()

    async def poll(self) -> bool:
        """Poll once. Returns whether there is more history to read at once; False after a poll that failed."""
        begun = self._clock.monotonic()
        self.next_poll = begun
        self._poll_now.clear()
        more = False
        finished: Iterable[FinishedRun] = ()
        try:
            if not self._loaded:
                await self.load()
            self._store.ensure(self.key)
            deadline = Deadline(max(self.collector.interval, 2 * self._settings.request_timeout), self._clock)
            records = await self.collector.fetch(self.state, deadline)
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
        self._update(duration=self._clock.monotonic() - begun, circuit_open=self.circuit_open)
        self.attempted.set()
        self.show()
        self._page.release(self.key)
        await self._log_finished(finished)
        return more and self.success is True

    async def observe(self, records: Records) -> Observation:
        """Fold the records of a poll. The state of the poller stays as it is."""
        counts = self.state.counts if self.state else Counts()
        room = self._page.reserve(self.key)
        tally = Tally(counts, self._clock.wall(), self._settings.hold, self.collector.families, room)
        return await self._work(partial(self._observe, records, tally), records.size)

    async def _work(self, work: Callable[[], T], rows: int = 0) -> T:
        """Run `work`, whose run time grows with the rows in the answers and in the state; in a thread if it is long."""
        return await fold(rows + self._size // BYTES_PER_ROW, work)

    def _observe(self, records: Records, tally: Tally) -> Observation:
        observed = self.collector.observe(self.state, records, tally)
        unknown = Counter(field for field, _ in observed.unknown)
        if self._may_commit_later(observed):
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

    def _may_commit_later(self, observed: Observed[Any]) -> bool:
        """Whether the poll found nothing new. A slice of a long history is always committed."""
        state = self.state
        return (
            state is not None
            and not self._commits_next
            and not observed.more
            and self.collector.commits_later
            and state.equals_except_times(observed.state)
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

    def show(self, *, final: bool = False) -> None:
        """Put the state and the newest poll on the page; `final` as in `Exposed.show`. A failure is logged and
        counted."""
        try:
            self.exposed.show(self.report, final=final)
        except Exception as error:
            self._log.exception("page_broken")
            self._failed("internal", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave the page; the state stays in the store."""
        self.exposed.close()

    async def save(self) -> None:
        """Commit the state again, because the store has lost it. Raises `StateError`."""
        async with self._committing:
            if self.state is not None:
                await self._commit(await self._work(partial(msgspec.msgpack.encode, self.state)))

    def uncommitted(self, seconds: float) -> bool:
        """Whether a poll has waited so long for `flush`."""
        return self._uncommitted_since is not None and self._clock.monotonic() - self._uncommitted_since >= seconds

    async def flush(self) -> bool:
        """Commit the polls that found nothing new. False if that fails; then the next poll is committed at once."""
        try:
            if self._uncommitted_since is not None:
                await self.save()
        except StateTaken:
            pass  # this poller has lost its key and reads nothing again
        except StateError:
            return False
        return True

    async def _commit(self, payload: bytes) -> None:
        waiting, self._uncommitted_since = self._uncommitted_since, None
        try:
            await self._store.commit(self.key, payload)
        except StateTaken:
            raise  # nothing is wrong with the state
        except StateError:
            self._uncommitted_since, self._commits_next = waiting, True
            self._telemetry.state_write_error()
            raise
        self._telemetry.state_written(self._clock.wall())

    def _succeeded(self, observation: Observation) -> None:
        observed = observation.observed
        if self.success is False:
            self._log.info("poll_recovered")
        self._refusals = 0
        if observation.payload is not None:
            self._commits_next = observed.more
        elif self._uncommitted_since is None:
            self._uncommitted_since = self._clock.monotonic()
        completed, current = self._clock.monotonic(), self.report.current or not observed.more
        self._update(
            state=observed.state, samples=observation.samples, success=True, completed=completed, current=current
        )
        self.reason, self.message, self.request_id = None, "", ""
        if observation.full and not self._full:
            self._log.warning("max_series_reached", consequence="new label values of the platform are shown as other")
        self._full = observation.full
        for failed in observed.errors:
            self._count_error(failed.reason)
            fields = msgspec.structs.asdict(failed)
            del fields["configured"]
            self._log.warning("call_failed", **fields)
        for field, times in observation.unknown.items():
            self._telemetry.unknown_values(field, times)
        for field, value in itertools.islice(observed.unknown, UNKNOWN_LOGGED):
            if (field, value) not in self._unknown and len(self._unknown) < UNKNOWN_LOGGED:
                self._unknown.add((field, value))
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
