"""What /metrics shows of one (collector, scope): its state and its newest poll, as chunks of the page.

Time alone changes three things: a new counter shows 0 until its birth hold ends, gauges vanish when no poll has been
complete for `stale_after` intervals, and a timer of the event loop renders the chunks again at the next such moment.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
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
from exporter.metrics.family import Chunk, Counts, Family, Labels
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


_OWN_GAUGES = tuple(family for family in COLLECTOR_FAMILIES if family.kind == "gauge")
_OWN_COUNTERS = tuple(family for family in COLLECTOR_FAMILIES if family.name in (GAP, TRUNCATED))
_ERRORS = next(family for family in COLLECTOR_FAMILIES if family.name == ERRORS)


class Exposed:
    """Renders one (collector, scope). `hold` is `counter_birth_hold`, in seconds; `stale_after` counts intervals.

    It keeps what is shown only as far as it takes to find out what has changed; the page keeps the chunks.
    """

    __slots__ = (
        "_clock", "_collector", "_counts", "_due", "_errors", "_gauges", "_hold", "_now", "_own", "_own_prefix",
        "_page", "_prefix", "_report", "_samples", "_stale_after", "_telemetry", "_timer", "key",
    )  # fmt: skip

    def __init__(
        self, collector: Collector, page: Page, telemetry: Telemetry, clock: Clock, hold: float, stale_after: int
    ) -> None:
        self.key = Key(collector.name, collector.scope)
        self._collector = collector
        self._page = page
        self._telemetry = telemetry
        self._clock = clock
        self._hold = hold
        self._stale_after = stale_after
        self._report = PollReport()
        self._gauges = Gauges()
        self._prefix = scope_prefix(collector.scope)
        self._own_prefix = scope_prefix(collector.scope, collector.name)
        self._now = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        # What is shown: own gauges in the order of `_OWN_GAUGES`, counts and when the next of them is due (unix
        # seconds), samples.
        self._own: Sequence[float | None] = (None,) * len(_OWN_GAUGES)
        self._counts: Counts | None = None
        self._errors: Counts | None = None
        self._due = math.inf
        self._samples: Mapping[str, Mapping[Labels, float]] = {}

    def reconfigure(self, collector: Collector, hold: float, stale_after: int) -> None:
        """Use another configuration of the same (collector, scope) from the next `show` on."""
        self._collector, self._hold, self._stale_after = collector, hold, stale_after
        self._counts = self._errors = None

    @property
    def series(self) -> int:
        """How many series are shown."""
        return self._page.series(self.key)

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
        state = report.known
        own = self._own_values(report)
        counts = state.counts if state else None
        samples = report.samples if state and self.fresh else {}
        changes = {
            **self._changed_gauges(own),
            **self._changed_counts(counts, report.errors),
            **self._changed_samples(samples),
        }
        self._page.change(self.key, changes)
        self._own = own
        if counts is not self._counts or report.errors is not self._errors or self._due <= self._now:
            self._counts, self._errors, self._due = counts, report.errors, self._next_due(counts, report.errors)
        self._samples = samples
        if samples:
            self._gauges.show(samples)
        self._telemetry.rendered(time.perf_counter() - begun)
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

    def _own_values(self, report: PollReport) -> Sequence[float | None]:
        """The values of the own gauges in the order of `_OWN_GAUGES`, None for those that are not known."""
        state = report.known
        return (
            None if report.success is None else float(report.success),
            state.last_success if state else None,
            self._collector.interval,
            report.duration,
            state.watermark if state else None,
            float(report.circuit_open),
            self._collector.failing_hosts(state).hosts_untracked() if state else None,
        )

    def _changed_gauges(self, own: Sequence[float | None]) -> Mapping[str, Chunk | None]:
        return {
            family.name: None if value is None else render_gauge(family, self._own_prefix, {(): value})
            for family, value, before in zip(_OWN_GAUGES, own, self._own, strict=True)
            if value != before
        }

    def _changed_counts(self, counts: Counts | None, errors: Counts) -> Mapping[str, Chunk]:
        """The counters and histograms that were counted on, all of them after the end of a birth hold."""
        due = self._due <= self._now
        changes: dict[str, Chunk] = {}
        if due or errors is not self._errors:
            changes[ERRORS] = self._rendered(_ERRORS, self._own_prefix, errors)
        if counts is not None and (due or counts is not self._counts):
            before = None if due else self._counts
            for prefix, families in ((self._own_prefix, _OWN_COUNTERS), (self._prefix, self._collector.families)):
                for family in families:
                    if family.kind != "gauge" and (
                        before is None or _series(before, family) is not _series(counts, family)
                    ):
                        changes[family.name] = self._rendered(family, prefix, counts)
        return changes

    def _rendered(self, family: Family, prefix: str, counts: Counts) -> Chunk:
        return render_counts(family, prefix, counts, self._now, self._hold)

    def _next_due(self, *shown: Counts | None) -> float:
        """The end of the next birth hold."""
        return min(
            (
                one.shown
                for counts in shown
                if counts is not None
                for families in (counts.counters, counts.histograms)
                for series in families.values()
                for one in series.values()
                if one.shown > self._now
            ),
            default=math.inf,
        )

    def _changed_samples(self, samples: Mapping[str, Mapping[Labels, float]]) -> Mapping[str, Chunk | None]:
        """The gauges of which a sample or the order of the samples has changed."""
        changes: dict[str, Chunk | None] = dict.fromkeys(self._samples.keys() - samples.keys())
        if not samples:
            return changes
        for family in self._collector.families:
            values, shown = samples.get(family.name), self._samples.get(family.name)
            if values is not None and (shown is None or values != shown or not all(map(eq, values, shown))):
                changes[family.name] = render_gauge(family, self._prefix, values)
        return changes

    def _set_timer(self) -> None:
        """Show again when time alone has changed something, unless the timer that is set ends before."""
        wait = self._due - self._now
        if self.fresh and self._report.completed is not None:
            wait = min(wait, self._report.completed + self._patience - self._clock.monotonic())
        loop = asyncio.get_running_loop()
        # A timer that fires too early finds nothing changed and is set again, so it fires a little late.
        due = loop.time() + wait + 0.01
        if due < (self._timer.when() if self._timer else math.inf):
            self.cancel_timer()
            self._timer = loop.call_at(due, self._show_again)

    def _show_again(self) -> None:
        self._timer = None
        try:
            self.show(self._report)
        except Exception:
            log.get().exception("page_broken", collector=self.key.collector, scope=str(self.key.scope))


def _series(counts: Counts, family: Family) -> object:
    return (counts.counters if family.kind == "counter" else counts.histograms).get(family.name)
