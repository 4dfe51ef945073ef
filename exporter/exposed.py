"""What /metrics shows of one (collector, scope): its state and its newest poll, as chunks of the page.

Time alone changes two things: a new counter shows 0 until its birth hold ends, and gauges vanish when no poll has been
complete for `stale_after` intervals. The poller shows it again at the next such moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from operator import eq

import msgspec

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
from exporter.metrics.render import render_counts, render_gauge, render_value, scope_prefix
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
    page.put(scope_key(one), {family.name: render_value(family, scope_prefix(one.scope), 1.0, labels)})


def scope_key(one: ScopeConfig) -> Key:
    """The owner of what the page shows of a scope itself; no collector has this key."""
    return Key("", one.scope)


class PollReport(msgspec.Struct, frozen=True):
    """The result of the newest poll of a poller, and times of its state. None means not known yet.

    `last_success`, `watermark`, `untracked`: of the state. `duration` is in seconds. `completed` is the monotonic time
    of the newest complete poll since the start, `samples` are those of its gauges by family. `errors` holds the failed
    polls and calls by reason, since the start. `circuit_open`: see `Poller`. `current`: False while the state may be
    older than what was shown before a restart; then nothing of it is shown, so that no counter falls.
    """

    last_success: float | None = None
    watermark: float | None = None
    untracked: int | None = None
    samples: Mapping[str, Mapping[Labels, float]] = {}
    success: bool | None = None
    duration: float | None = None
    completed: float | None = None
    errors: Counts = Counts()
    circuit_open: bool = False
    current: bool = True

    @property
    def shows_state(self) -> bool:
        """Whether there is a state that may be shown."""
        return self.last_success is not None and self.current


_OWN_GAUGES = tuple(family for family in COLLECTOR_FAMILIES if family.kind == "gauge")
_COUNTED = {family.name: family for family in page_families() if family.kind != "gauge"}
"""The families that states count, by name."""
_ERRORS = next(family for family in COLLECTOR_FAMILIES if family.name == ERRORS)


class Exposed:
    """Renders one (collector, scope). `hold` is `counter_birth_hold`, in seconds; `stale_after` counts intervals.

    It keeps what is shown only as far as it takes to find out what has changed; the page keeps the chunks.
    """

    __slots__ = (
        "_changed", "_clock", "_collector", "_due", "_errors", "_gauges", "_hold", "_now", "_own", "_own_prefix",
        "_page", "_prefix", "_samples", "_stale_after", "_telemetry", "key",
    )  # fmt: skip

    def __init__(
        self,
        key: Key,
        collector: Collector,
        page: Page,
        telemetry: Telemetry,
        clock: Clock,
        hold: float,
        stale_after: int,
    ) -> None:
        self.key = key
        self._collector = collector
        self._page = page
        self._telemetry = telemetry
        self._clock = clock
        self._hold = hold
        self._stale_after = stale_after
        self._gauges = Gauges()
        self._prefix = scope_prefix(collector.scope)
        self._own_prefix = scope_prefix(collector.scope, collector.name)
        self._now = -math.inf
        # What is shown: own gauges in the order of `_OWN_GAUGES`, failed polls, samples.
        self._own: Sequence[float | None] = (None,) * len(_OWN_GAUGES)
        self._errors: Counts | None = None
        self._samples: Mapping[str, Mapping[Labels, float]] = {}
        self._due = math.inf
        """Unix seconds of the end of the next birth hold."""
        self._changed: frozenset[str] | None = None
        """Counters and histograms that were counted on since they were shown; None: all of them."""

    def reconfigure(self, collector: Collector, hold: float, stale_after: int) -> None:
        """Use another configuration of the same (collector, scope) from the next `show` on."""
        self._collector, self._hold, self._stale_after = collector, hold, stale_after
        self._changed = self._errors = None

    def counted(self, before: Counts, after: Counts) -> None:
        """Tell that a poll has led from some counts to others, which are still to be shown."""
        if self._changed is not None and after is not before:
            self._changed |= {
                name
                for new, old in ((after.counters, before.counters), (after.histograms, before.histograms))
                for name, series in new.items()
                if old.get(name) is not series
            }

    @property
    def series(self) -> int:
        """How many series are shown."""
        return self._page.series(self.key)

    def fresh(self, report: PollReport) -> bool:
        """Whether gauges are shown: the newest complete poll is at most `stale_after` intervals ago."""
        completed = report.completed
        return completed is not None and self._clock.monotonic() <= completed + self._patience

    def samples(self, state: CollectorState, bounds: LabelBounds) -> Mapping[str, Mapping[Labels, float]]:
        """The samples of this state's gauges by family, with the labels that `bounds` admits."""
        return self._gauges.read(self._collector.families, self._collector.view(state), bounds)

    def show(self, report: PollReport, state: Callable[[], CollectorState | None], *, final: bool = False) -> None:
        """Put this report on the page, and of its `state`, which is read when that is necessary, what has changed.
        Raises any exception of the rendering.

        `final`: the page is written once, so no series is held at 0.
        """
        begun = time.perf_counter()
        # After the wall clock was set back, a series that has been shown must not be hidden again.
        self._now = math.inf if final else max(self._now, self._clock.wall())
        own = self._own_values(report)
        samples = report.samples if report.shows_state and self.fresh(report) else {}
        changes = {**self._changed_gauges(own), **self._changed_samples(samples)}
        held_until = self._due <= self._now
        if held_until or report.errors is not self._errors:
            changes[ERRORS] = self._rendered(_ERRORS, self._own_prefix, report.errors)
        if known := state() if report.shows_state and (held_until or self._changed or self._changed is None) else None:
            changes |= self._changed_counts(known.counts, None if held_until else self._changed)
        self._page.change(self.key, changes)
        if known or ERRORS in changes:
            self._due = self._next_due(report.errors, known or state())
        if known:
            self._changed = frozenset()
        self._own, self._errors, self._samples = own, report.errors, samples
        if samples:
            self._gauges.show(samples)
        self._telemetry.rendered(time.perf_counter() - begun)

    def wait(self, report: PollReport) -> float:
        """Seconds until time alone changes what is shown of this report, 0 or less when it has."""
        wait = self._due - max(self._now, self._clock.wall())
        if self._samples and report.completed is not None:
            wait = min(wait, report.completed + self._patience - self._clock.monotonic())
        return wait

    def close(self) -> None:
        """Remove everything from the page."""
        self._page.remove(self.key)

    @property
    def _patience(self) -> float:
        return self._stale_after * self._collector.interval

    def _own_values(self, report: PollReport) -> Sequence[float | None]:
        """The values of the own gauges in the order of `_OWN_GAUGES`, None for those that are not known."""
        shown = report.shows_state
        return (
            None if report.success is None else float(report.success),
            report.last_success if shown else None,
            self._collector.interval,
            report.duration,
            report.watermark if shown else None,
            float(report.circuit_open),
            report.untracked if shown else None,
        )

    def _changed_gauges(self, own: Sequence[float | None]) -> Mapping[str, Chunk | None]:
        return {
            family.name: None if value is None else render_value(family, self._own_prefix, value)
            for family, value, before in zip(_OWN_GAUGES, own, self._own, strict=True)
            if value != before
        }

    def _changed_counts(self, counts: Counts, changed: Container[str] | None) -> dict[str, Chunk]:
        """The counters and histograms that have changed, None: all of them."""
        return {
            name: self._rendered(family, self._own_prefix if family.per_collector else self._prefix, counts)
            for families in (counts.counters, counts.histograms)
            for name in families
            if (changed is None or name in changed) and (family := _COUNTED.get(name))
        }

    def _rendered(self, family: Family, prefix: str, counts: Counts) -> Chunk:
        return render_counts(family, prefix, counts, self._now, self._hold)

    def _next_due(self, errors: Counts, state: CollectorState | None) -> float:
        """The end of the next birth hold."""
        now = self._now
        ends = [
            one.shown
            for counts in (errors, state.counts if state else Counts())
            for families in (counts.counters, counts.histograms)
            for series in families.values()
            for one in series.values()
            if one.shown > now
        ]
        return min(ends, default=math.inf)

    def _changed_samples(self, samples: Mapping[str, Mapping[Labels, float]]) -> Mapping[str, Chunk | None]:
        """The gauges of which a sample or the order of the samples has changed."""
        if samples is self._samples or not (samples or self._samples):
            return {}
        changes: dict[str, Chunk | None] = dict.fromkeys(self._samples.keys() - samples.keys())
        for family in self._collector.families:
            values, shown = samples.get(family.name), self._samples.get(family.name)
            if values is not None and (shown is None or values != shown or not all(map(eq, values, shown))):
                changes[family.name] = render_gauge(family, self._prefix, values)
        return changes
