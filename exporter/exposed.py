"""What /metrics shows of one (collector, scope): its state and its newest poll, as chunks of the page.

Time alone changes three things: a new counter shows 0 until its birth hold ends, gauges vanish when no poll has been
complete for `stale_after` intervals, and a timer of the event loop renders the chunks again at the next such moment.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from operator import eq

import msgspec

from exporter import log
from exporter.clock import Clock
from exporter.collectors import COLLECTORS
from exporter.collectors.base import GAP, TRUNCATED, Collector, CollectorState
from exporter.collectors.failing_hosts import MOST_HOSTS
from exporter.collectors.job.metrics import STATUS_CODE_INFO, status_code_info
from exporter.config.schema import Config, ScopeConfig
from exporter.metrics.bounds import LabelBounds
from exporter.metrics.family import Chunk, Count, Counts, Distribution, Family, Labels
from exporter.metrics.gauges import Gauges
from exporter.metrics.page import Page
from exporter.metrics.render import render_counts, render_gauge, scope_prefix
from exporter.model import Key
from exporter.telemetry import Telemetry

ERRORS = "blueking_exporter_collector_errors_total"
CIRCUIT_OPEN = "blueking_exporter_api_circuit_open"
UNTRACKED = "blueking_exporter_hosts_untracked"

SCOPE_INFO = Family(
    "blueking_scope_info",
    "gauge",
    ("name",),
    "A configured scope and its name for people; with the label `tenant_id` where a tenant is set.",
    "已配置的范围及其名称；设置了租户时带有标签 `tenant_id`。",
)
_SCOPE_INFO_WITH_TENANT = msgspec.structs.replace(SCOPE_INFO, labels=("name", "tenant_id"))

COLLECTOR_FAMILIES = (
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
    Family(
        CIRCUIT_OPEN,
        "gauge",
        (),
        "Whether the scope is polled less often because BlueKing refused two or more polls in a row (401 or 403).",
        "该范围是否因连续两次或更多轮询被蓝鲸拒绝（401 或 403）而降低了轮询频率。",
        per_collector=True,
    ),
    Family(
        UNTRACKED,
        "gauge",
        (),
        f"Failing hosts beyond the {MOST_HOSTS:,} that are tracked: counters include them, gauges do not.",
        f"超出跟踪上限 {MOST_HOSTS:,} 的失败主机数：计数器计入，gauge 不计入。",
        per_collector=True,
    ),
)
"""The exporter's own families per collector and scope; `collector` and the scope are the labels of the owner."""


def page_families() -> tuple[Family, ...]:
    """Every family of the page in its order: JOB and NodeMan first, then the exporter's own per collector and scope."""
    watched = {family.name: family for collector in COLLECTORS for family in collector.families}
    return (*watched.values(), STATUS_CODE_INFO, SCOPE_INFO, *COLLECTOR_FAMILIES)


def show_status_codes(page: Page) -> None:
    """Put the table of JOB's host status codes on the page."""
    page.put(None, {STATUS_CODE_INFO.name: render_gauge(STATUS_CODE_INFO, "", status_code_info())})


def show_scope(page: Page, one: ScopeConfig, config: Config) -> None:
    """Put the name of a scope on the page, and its tenant if it has one."""
    tenant_id = one.auth.tenant_id or config.blueking.auth.tenant_id
    family = _SCOPE_INFO_WITH_TENANT if tenant_id else SCOPE_INFO
    labels: Labels = (one.name, tenant_id) if tenant_id else (one.name,)
    page.put(scope_key(one), {family.name: render_gauge(family, scope_prefix(one.scope), {labels: 1.0})})


def scope_key(one: ScopeConfig) -> Key:
    """The owner of what the page shows of a scope itself; no collector has this key."""
    return Key("", one.scope)


class PollReport(msgspec.Struct, frozen=True):
    """The state of a poller and the result of its newest poll. None means not known yet.

    `duration` is in seconds. `completed` is the monotonic time of the newest complete poll since the start, `samples`
    are those of its gauges by family. `errors` holds the failed polls and calls by reason, since the start.
    `circuit_open`: see `Poller`. `current`: False while the state may be older than what was shown before a restart;
    then nothing of it is shown, so that no counter falls.
    """

    state: CollectorState | None = None
    samples: Mapping[str, Mapping[Labels, float]] = {}
    success: bool | None = None
    duration: float | None = None
    completed: float | None = None
    errors: Counts = Counts()
    circuit_open: bool = False
    current: bool = True

    @property
    def known(self) -> CollectorState | None:
        """The state if it may be shown, else None."""
        return self.state if self.current else None


class _Rendered(msgspec.Struct, frozen=True, gc=False):
    """A chunk of counters or histograms, valid until `due` (unix seconds), when a birth hold ends."""

    series: object
    chunk: Chunk
    due: float


class Exposed:
    """Renders one (collector, scope). `hold` is `counter_birth_hold`, in seconds; `stale_after` counts intervals."""

    def __init__(
        self, collector: Collector, page: Page, telemetry: Telemetry, clock: Clock, hold: float, stale_after: int
    ) -> None:
        self.key = Key(collector.name, collector.scope)
        self.series = 0
        self._collector = collector
        self._page = page
        self._telemetry = telemetry
        self._clock = clock
        self._hold = hold
        self._stale_after = stale_after
        self._report = PollReport()
        self._gauges = Gauges()
        self._gauge_chunks: dict[str, tuple[Mapping[Labels, float], Chunk]] = {}
        self._rendered: dict[str, _Rendered] = {}
        self._prefix = scope_prefix(collector.scope)
        self._own_prefix = scope_prefix(collector.scope, collector.name)
        self._now = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def reconfigure(self, collector: Collector, hold: float, stale_after: int) -> None:
        """Use another configuration of the same (collector, scope) from the next `show` on."""
        self._collector, self._hold, self._stale_after = collector, hold, stale_after
        self._rendered.clear()

    @property
    def fresh(self) -> bool:
        """Whether gauges are shown: the newest complete poll is at most `stale_after` intervals ago."""
        completed = self._report.completed
        return completed is not None and self._clock.monotonic() <= completed + self._patience

    def samples(self, state: CollectorState, bounds: LabelBounds) -> Mapping[str, Mapping[Labels, float]]:
        """The samples of this state's gauges by family, with the labels that `bounds` admits."""
        return self._gauges.read(self._collector.families, self._collector.view(state), bounds)

    def show(self, report: PollReport, *, final: bool = False) -> None:
        """Put this report on the page. Raises any exception of the rendering.

        `final`: the page is written once, so no series is held at 0 and no timer is set.
        """
        self._report = report
        begun = time.perf_counter()
        # After the wall clock was set back, a series that has been shown must not be hidden again.
        self._now = math.inf if final else max(self._now, self._clock.wall())
        chunks = self._own_chunks()
        if report.known is not None:
            chunks |= self._state_chunks(report.known)
        self.series = sum(chunk.series for chunk in chunks.values())
        self._page.put(self.key, chunks)
        self._telemetry.rendered(time.perf_counter() - begun)
        self.cancel_timer()
        if not final:
            self._set_timer()

    def cancel_timer(self) -> None:
        """Leave the page as it is until the next `show`."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Remove everything from the page."""
        self.cancel_timer()
        self._page.remove(self.key)

    @property
    def _patience(self) -> float:
        return self._stale_after * self._collector.interval

    def _own_chunks(self) -> dict[str, Chunk]:
        prefix, report, state = self._own_prefix, self._report, self._report.known
        gauges: dict[str, float | None] = {
            CIRCUIT_OPEN: float(report.circuit_open),
            UNTRACKED: self._collector.failing_hosts(state).hosts_untracked() if state else None,
            "success": None if report.success is None else float(report.success),
            "last_success_timestamp_seconds": state.last_success if state else None,
            "interval_seconds": self._collector.interval,
            "duration_seconds": report.duration,
            "watermark_timestamp_seconds": state.watermark if state else None,
        }
        chunks = {}
        for family in COLLECTOR_FAMILIES:
            value = gauges.get(family.name.removeprefix("blueking_exporter_collector_"))
            if family.kind == "gauge" and value is not None:
                chunks[family.name] = self._gauge_chunk(family, prefix, {(): value})
            elif family.name == ERRORS:
                chunks[family.name] = self._counts_chunk(family, prefix, report.errors)
            elif family.kind == "counter" and state is not None:
                chunks[family.name] = self._counts_chunk(family, prefix, state.counts)
        return chunks

    def _state_chunks(self, state: CollectorState) -> dict[str, Chunk]:
        prefix, samples = self._prefix, self._report.samples if self.fresh else {}
        chunks = {}
        for family in self._collector.families:
            if family.kind != "gauge":
                chunks[family.name] = self._counts_chunk(family, prefix, state.counts)
            elif family.name in samples:
                chunks[family.name] = self._gauge_chunk(family, prefix, samples[family.name])
        if samples:
            self._gauges.show(samples)
        return chunks

    def _gauge_chunk(self, family: Family, prefix: str, samples: Mapping[Labels, float]) -> Chunk:
        """The chunk of one gauge, rendered again only when a sample or the order of the samples has changed."""
        known = self._gauge_chunks.get(family.name)
        if known is not None and known[0] == samples and all(map(eq, known[0], samples)):
            return known[1]
        chunk = render_gauge(family, prefix, samples)
        self._gauge_chunks[family.name] = samples, chunk
        return chunk

    def _counts_chunk(self, family: Family, prefix: str, counts: Counts) -> Chunk:
        """The chunk of one counter or histogram, rendered again only after a change or the end of a birth hold."""
        series: Mapping[Labels, Count | Distribution] | None
        series = (counts.counters if family.kind == "counter" else counts.histograms).get(family.name)
        rendered = self._rendered.get(family.name)
        if rendered and rendered.series is series and self._now < rendered.due:
            return rendered.chunk
        chunk = render_counts(family, prefix, counts, self._now, self._hold)
        due = min((one.shown for one in (series or {}).values() if one.shown > self._now), default=math.inf)
        self._rendered[family.name] = _Rendered(series, chunk, due)
        return chunk

    def _set_timer(self) -> None:
        wait = min((rendered.due for rendered in self._rendered.values()), default=math.inf) - self._now
        if self.fresh and self._report.completed is not None:
            wait = min(wait, self._report.completed + self._patience - self._clock.monotonic())
        if wait < math.inf:
            # A timer that fires too early finds nothing changed and is set again, so it fires a little late.
            self._timer = asyncio.get_running_loop().call_later(wait + 0.01, self._show_again)

    def _show_again(self) -> None:
        try:
            self.show(self._report)
        except Exception:
            log.get().exception("page_broken", collector=self.key.collector, scope=str(self.key.scope))
