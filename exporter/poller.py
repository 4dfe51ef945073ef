"""One poll as a transaction, and the loop around it.

    fetch ─► observe ─► commit ─► page          whatever fails before `commit` changes nothing

A poller belongs to one (collector, scope) and is the only one that touches its state. What it keeps besides the state
(errors counted, gauges shown) belongs to the process and starts anew with it.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import msgspec

from exporter import log
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import GAP, TRUNCATED, Collector, CollectorState, Observed, fold
from exporter.errors import ApiError, Reason, StateError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Chunk, Count, Counts, Distribution, Family, Labels
from exporter.metrics.page import Page
from exporter.metrics.render import render_counts, render_gauge, scope_prefix
from exporter.model import Key
from exporter.state.base import Store
from exporter.telemetry import Telemetry

ERRORS = "blueking_exporter_collector_errors_total"

FAMILIES = (
    Family(
        "blueking_exporter_collector_success",
        "gauge",
        (),
        "Whether the newest poll was complete.",
        "最近一次轮询是否完整成功。",
        per_collector=True,
    ),
    Family(
        "blueking_exporter_collector_last_success_timestamp_seconds",
        "gauge",
        (),
        "Time of the newest complete poll.",
        "最近一次完整轮询的时间。",
        per_collector=True,
    ),
    Family(
        "blueking_exporter_collector_interval_seconds",
        "gauge",
        (),
        "Configured time between two polls.",
        "配置的轮询间隔。",
        per_collector=True,
    ),
    Family(
        "blueking_exporter_collector_duration_seconds",
        "gauge",
        (),
        "Run time of the newest poll.",
        "最近一次轮询的耗时。",
        per_collector=True,
    ),
    Family(
        "blueking_exporter_collector_watermark_timestamp_seconds",
        "gauge",
        (),
        "Platform time up to which everything has been counted.",
        "在此平台时间之前的历史均已计数。",
        per_collector=True,
    ),
    Family(
        GAP,
        "counter",
        (),
        "History that was never counted, because it lay further back than max_catchup.",
        "因早于 max_catchup 而从未计数的历史时长。",
        per_collector=True,
    ),
    Family(
        TRUNCATED,
        "counter",
        (),
        "Milliseconds of history and executions that the platform did not give completely.",
        "平台未能完整返回的毫秒时段与作业执行数。",
        per_collector=True,
    ),
    Family(
        ERRORS,
        "counter",
        ("reason",),
        "Polls and calls that failed, by reason.",
        "按原因统计的失败轮询与调用数。",
        per_collector=True,
    ),
)
"""What the exporter says about each of its pollers; the owner's labels are collector and scope."""


class _Kept(msgspec.Struct, frozen=True, gc=False):
    """The chunk of some counters or histograms, good until `due` (unix seconds), when a held one is revealed."""

    series: object
    chunk: Chunk
    due: float


class Poller:
    """Watches one (collector, scope): `run` polls until cancelled, `page` always holds what is known.

    `collector` may be exchanged between two polls (`reconfigure`); state and history stay.
    """

    def __init__(
        self,
        collector: Collector,
        *,
        store: Store,
        page: Page,
        telemetry: Telemetry,
        clock: Clock,
        hold: float,
        stale_after: int,
        request_timeout: float,
    ) -> None:
        self.key = Key(collector.name, collector.scope)
        self.collector = collector
        self.attempted = asyncio.Event()
        self.state: CollectorState | None = None
        self.success: bool | None = None
        self.reason: Reason | None = None
        self.message = ""
        self.next_poll: float | None = None
        self.series = 0
        self._store = store
        self._page = page
        self._telemetry = telemetry
        self._clock = clock
        self._hold = hold
        self._stale_after = stale_after
        self._request_timeout = request_timeout
        self._loaded = False
        self._completed: float | None = None
        self._duration: float | None = None
        self._errors = Counts()
        self._shown: dict[str, set[Labels]] = {}
        self._kept: dict[str, _Kept] = {}
        self._prefix = scope_prefix(collector.scope)
        self._own_prefix = scope_prefix(collector.scope, collector.name)
        self._now = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._unknown: set[tuple[str, str]] = set()
        self._log = log.get().bind(collector=collector.name, scope=str(collector.scope))

    def reconfigure(self, collector: Collector, *, hold: float, stale_after: int, request_timeout: float) -> None:
        """Go on with another configuration of the same (collector, scope), from the next poll on."""
        self.collector = collector
        self._hold, self._stale_after, self._request_timeout = hold, stale_after, request_timeout
        self._kept.clear()
        self.render()

    async def load(self) -> None:
        """Take up the state where it was left. Raises `StateError` when the store fails; damage is a new baseline."""
        payload = await self._store.load(self.key)
        if payload is not None:
            try:
                self.state = msgspec.msgpack.decode(payload, type=self.collector.state_type)
            except msgspec.DecodeError as error:
                self._telemetry.state_reset()
                self._log.error("state_unreadable", message=str(error), consequence="new baseline")
        self._loaded = True
        self.render()

    async def run(self) -> None:
        """Poll for ever: at once, then in the phase that this key has in every interval."""
        begun = self._clock.monotonic()
        phase = zlib.crc32(str(self.key).encode()) / 2**32
        while True:
            more = await self.poll()
            interval = self.collector.interval
            if more:
                self.next_poll = self._clock.monotonic()
                await asyncio.sleep(0)
                continue
            # A poll that overran misses its slot: polls never pile up.
            elapsed = (self._clock.monotonic() - begun) / interval
            self.next_poll = begun + (math.floor(elapsed - phase) + 1 + phase) * interval
            await asyncio.sleep(self.next_poll - self._clock.monotonic())

    async def poll(self) -> bool:
        """One poll. Whether there is more to read at once; a poll that fails says no and changes no count."""
        collector = self.collector
        begun = self._clock.monotonic()
        self.next_poll = begun
        observed: Observed[Any] | None = None
        try:
            if not self._loaded:
                await self.load()
            deadline = Deadline(max(collector.interval, 2 * self._request_timeout), self._clock)
            records = await collector.fetch(self.state, deadline)
            now = self._clock.wall()
            observed = await fold(records.size, partial(collector.observe, self.state, records, now))
            payload = msgspec.msgpack.encode(observed.state)
            await self._store.commit(self.key, payload)
            self._telemetry.state_written(self._clock.wall())
        except ApiError as error:
            self._failed(error.reason, str(error), api=error.api, code=error.code, status=error.status)
        except StateError as error:
            self._telemetry.state_write_error()
            self._failed("state", str(error))
        except Exception as error:
            # A bug in one collector or an answer nobody thought of must not stop the others.
            self._log.exception("poll_broken")
            self._failed("internal", f"{type(error).__name__}: {error}")
        else:
            self._succeeded(observed)
        self._duration = self._clock.monotonic() - begun
        self.attempted.set()
        self.render()
        return self.success is True and observed is not None and observed.more

    def _succeeded(self, observed: Observed[Any]) -> None:
        self.state = observed.state
        self._completed = self._clock.monotonic()
        if self.success is False:
            self._log.info("poll_recovered")
        self.success, self.reason, self.message = True, None, ""
        for reason in observed.errors:
            self._count_error(reason)
            self._log.warning("execution_not_examined", reason=reason, consequence="counted without host results")
        for field, value in observed.unknown:
            self._telemetry.unknown_value(field)
            if (field, value) not in self._unknown and len(self._unknown) < 1000:
                self._unknown.add((field, value))
                self._log.warning("unknown_value", field=field, value=value)

    def _failed(self, reason: Reason, message: str, **fields: object) -> None:
        self.success, self.reason, self.message = False, reason, message
        self._count_error(reason)
        self._log.warning("poll_failed", reason=reason, message=message, **fields)

    def _count_error(self, reason: str) -> None:
        tally = Tally(self._errors, self._clock.wall(), self._hold)
        tally.inc(ERRORS, (reason,))
        self._errors = tally.freeze()

    @property
    def fresh(self) -> bool:
        """Whether gauges may be shown: a complete poll since the start, not longer ago than `stale_after` intervals."""
        return self._completed is not None and self._clock.monotonic() <= self._completed + self._patience

    @property
    def status(self) -> Literal["failing", "stale", "starting", "ok"]:
        """`stale`: so long without a complete poll that gauges are withheld."""
        if not self.attempted.is_set():
            return "starting"
        if self.success:
            return "ok" if self.fresh else "stale"
        return "failing" if self.fresh or self.state is None else "stale"

    @property
    def _patience(self) -> float:
        return self._stale_after * self.collector.interval

    def take(self, observed: Observed[Any]) -> None:
        """Go on from an observation that was made elsewhere, and show it."""
        self._succeeded(observed)
        self.render()

    def cancel_timer(self) -> None:
        """Stop showing again by itself what time alone changes."""
        if self._timer:
            self._timer.cancel()

    def close(self) -> None:
        """Leave the page at once; the state stays in the store."""
        self.cancel_timer()
        self._page.remove(self.key)

    # What /metrics shows of this poller

    def render(self, *, final: bool = False) -> None:
        """Put what is known now on the page, and come back when time alone will change it. Never raises.

        `final`: for a page that is written once, series are not held at 0.
        """
        try:
            self._render(final)
        except Exception as error:
            # What one poller cannot show must not stop the others.
            self._log.exception("page_broken")
            self._failed("internal", f"{type(error).__name__}: {error}")

    def _render(self, final: bool) -> None:
        begun = time.perf_counter()
        # A wall clock that was set back must not hide again what has been shown.
        self._now = math.inf if final else max(self._now, self._clock.wall())
        chunks = self._own_chunks()
        if self.state is not None:
            chunks |= self._state_chunks(self.state)
        self.series = sum(chunk.series for chunk in chunks.values())
        self._page.put(self.key, chunks)
        self._telemetry.rendered(time.perf_counter() - begun)
        if not final:
            self._schedule()

    def _own_chunks(self) -> dict[str, Chunk]:
        prefix, state = self._own_prefix, self.state
        gauges: dict[str, float | None] = {
            "success": None if self.success is None else float(self.success),
            "last_success_timestamp_seconds": state.last_success if state else None,
            "interval_seconds": self.collector.interval,
            "duration_seconds": self._duration,
            "watermark_timestamp_seconds": state.watermark if state else None,
        }
        chunks = {}
        for family in FAMILIES:
            value = gauges.get(family.name.removeprefix("blueking_exporter_collector_"))
            if family.kind == "gauge" and value is not None:
                labels: Labels = ()
                chunks[family.name] = render_gauge(family, prefix, {labels: value})
            elif family.name == ERRORS:
                chunks[family.name] = self._counts_chunk(family, prefix, self._errors)
            elif family.kind == "counter" and state is not None:
                chunks[family.name] = self._counts_chunk(family, prefix, state.counts)
        return chunks

    def _state_chunks(self, state: CollectorState) -> dict[str, Chunk]:
        prefix = self._prefix
        view = self.collector.view(state) if self.fresh else None
        chunks = {}
        for family in self.collector.families:
            if family.kind != "gauge":
                chunks[family.name] = self._counts_chunk(family, prefix, state.counts)
            elif view is not None and family.gauge is not None:
                samples = family.gauge(view)
                if family.sticky:
                    samples = self._with_zeros(family.name, samples)
                if samples:
                    chunks[family.name] = render_gauge(family, prefix, samples)
        return chunks

    def _with_zeros(self, name: str, samples: Mapping[Labels, float]) -> Mapping[Labels, float]:
        shown = self._shown.setdefault(name, set())
        shown.update(samples)
        return dict.fromkeys(sorted(shown), 0.0) | dict(samples)

    def _counts_chunk(self, family: Family, prefix: str, counts: Counts) -> Chunk:
        """Rendered again only when the family has been added to, or a held series is due."""
        series: Mapping[Labels, Count | Distribution] | None
        series = (counts.counters if family.kind == "counter" else counts.histograms).get(family.name)
        kept = self._kept.get(family.name)
        if kept and kept.series is series and self._now < kept.due:
            return kept.chunk
        chunk = render_counts(family, prefix, counts, self._now, self._hold)
        due = min((one.shown for one in (series or {}).values() if one.shown > self._now), default=math.inf)
        self._kept[family.name] = _Kept(series, chunk, due)
        return chunk

    def _schedule(self) -> None:
        wait = min((kept.due for kept in self._kept.values()), default=math.inf) - self._now
        if self.fresh and self._completed is not None:
            wait = min(wait, self._completed + self._patience - self._clock.monotonic())
        self.cancel_timer()
        # A little late on purpose: a timer that fires early would only be set again.
        self._timer = asyncio.get_running_loop().call_later(wait + 0.01, self.render) if wait < math.inf else None
