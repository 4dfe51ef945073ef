"""The exporter's own metrics that belong to the process; those of a collector and scope are on the page.

Two tables define the metrics; prometheus_client keeps their values, and the reference is generated from the tables. A
gauge whose value is not known yet is absent, never 0.
"""

from __future__ import annotations

import asyncio
import collections
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Set

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from exporter.clock import Clock
from exporter.metrics.family import Family
from exporter.metrics.render import encode, header, label_text, number, sample_names

_PREFIX = "blueking_exporter_"
_STATE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PERIOD = 1.0
"""Seconds between two measurements of the event loop."""
MOST_CODES = 1000
"""(api, code) whose metrics are found at once; the platform chooses the codes."""
MOST_FIELDS = 64
"""Distinct values of the label `field`; further ones are counted as `other`."""


def _families(table: str) -> tuple[Family, ...]:
    """The families of a table. Of each: kind, name and labels; the help in English; the help in Chinese."""
    found = []
    for block in table.strip().split("\n\n"):
        head, *english, chinese = block.splitlines()
        kind, name, *labels = head.split()
        row = {"name": _PREFIX + name, "kind": kind, "labels": labels, "help": " ".join(english), "help_zh": chinese}
        found.append(msgspec.convert(row, Family))
    return tuple(found)


PROCESS_FAMILIES = _families("""
counter api_requests_total api code
Requests to BlueKing by operation and HTTP status, `none` when no answer came.
对蓝鲸的请求数，按接口与 HTTP 状态码统计；没有响应时为 none。

histogram api_request_duration_seconds api
Time from sending a request to BlueKing to its last byte, without waiting for the rate budget.
请求蓝鲸的耗时（秒），从发出到读完，不含等待限速的时间。

counter api_retries_total api
Requests that were retried.
重试的请求数。

counter api_throttle_seconds_total
Time that requests waited for the rate budget or because BlueKing asked to wait.
请求因限速预算或平台要求而等待的时间（秒）。

gauge api_inflight_requests
Requests to BlueKing in progress.
正在进行的请求数。

gauge api_quota_remaining api
Requests that the gateway still allows, according to its last answer.
网关在最近一次响应中给出的剩余配额。

gauge api_clock_skew_seconds
Clock of this machine minus that of BlueKing.
本机时钟减去蓝鲸平台时钟的差（秒）。

counter state_resets_total
Times that the state was found damaged or gone.
发现状态损坏或丢失的次数。

counter unknown_values_total field
Values from BlueKing that this version does not know, by field.
平台返回的、本版本不认识的值的数量，按字段统计。

gauge series family
Series on the page.
页面上的时间序列数。

counter series_dropped_total family
Series that were left out because of max_series, each counted when it was first cut.
因 max_series 而被裁掉的时间序列数，每条在被裁时计一次。

counter state_writes_total
Transactions committed to the state.
状态提交的事务数。

counter state_write_errors_total
Transactions that failed.
提交失败的事务数。

gauge state_last_write_timestamp_seconds
When the state was last committed.
状态最近一次成功提交的时间。

gauge discovery_scopes scope_type
Scopes that were found in CMDB and are not among the configured ones.
在 CMDB 中发现且未在配置中列出的范围数。

gauge discovery_last_success_timestamp_seconds
When CMDB last gave complete lists.
CMDB 最近一次完整返回列表的时间。

counter discovery_errors_total reason
Queries of CMDB that failed, by reason.
按原因统计的 CMDB 查询失败次数。

gauge state_bytes
Size of the state on disk.
状态文件的大小（字节）。

gauge render_duration_seconds
Time to build the last exposition.
最近一次生成指标页面的耗时（秒）。

gauge exposition_bytes
Size of the newest whole page before compression; pages selected by name[] do not count.
最近一次完整页面压缩前的大小（字节），以 name[] 筛选的页面不计。

gauge event_loop_lag_seconds
How late the event loop last woke up.
事件循环最近一次唤醒的延迟（秒）。

gauge config_last_reload_successful
Whether the last attempt to load the configuration succeeded.
最近一次加载配置是否成功。

gauge config_last_reload_success_timestamp_seconds
When the configuration was last loaded with success.
最近一次成功加载配置的时间。

gauge config_info sha256
The configuration in use.
当前使用的配置。

gauge shard_ordinal
Which shard this process is, from 0.
本进程的分片序号，从 0 开始。

gauge total_shards
How many shards share the scopes.
分片总数。

gauge build_info version python_version
The version of the exporter and of Python.
exporter 与 Python 的版本。
""")
"""Families of every process."""

SHARING_FAMILIES = _families("""
gauge replicas phase
Replicas that are alive, as this one sees them: join, ready, leave.
本副本看到的存活副本数，按阶段统计：join、ready、leave。

gauge scopes_owned
Scopes that this replica polls and shows.
本副本负责轮询与展示的范围数。

gauge scopes_configured
Scopes of the configuration.
配置的范围数。

gauge lease_valid
Whether this replica may show its scopes now.
本副本此刻是否可以展示其范围。

gauge lease_remaining_seconds
Time until the lease lapses unless the store confirms another heartbeat.
若存储不再确认心跳，租约还剩多久失效（秒）。

counter takeovers_total cause
(collector, scope) that this replica took over, by cause: join (no owner), dead, released, healed (lost by the store).
本副本接管的（采集项、范围）数，按原因：join（无主）、dead（原副本失联）、released（被释放）、healed（存储丢失后恢复）。

counter fenced_total
(collector, scope) that another replica had taken over when this replica came back.
本副本恢复时已被其他副本接管的（采集项、范围）数。

counter state_rollbacks_total
Times that the store was found to have lost writes or to be another server process.
发现存储丢失写入或换了服务进程的次数。

histogram state_roundtrip_seconds
Time from sending a pipeline to the store to its last answer.
一次存储管道请求从发出到读完的耗时（秒）。

gauge state_replicas_acked
Replicas of the store that have acknowledged the newest writes.
已确认最近写入的存储副本数。
""")
"""Families of a process that shares a store with others; absent in other processes."""


class Telemetry:
    """The metrics of the process. Every method is cheap and takes any value."""

    def __init__(self, version: str = "unknown") -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for family in (*PROCESS_FAMILIES, *SHARING_FAMILIES):
            name = family.name.removeprefix(_PREFIX)
            if family.kind == "counter":
                self._counters[name] = Counter(family.name, family.help, family.labels, registry=self._registry)
            elif family.kind == "gauge":
                self._gauges[name] = Gauge(family.name, family.help, family.labels, registry=self._registry)
            else:
                buckets = _REQUEST_BUCKETS if family in PROCESS_FAMILIES else _STATE_BUCKETS
                self._histograms[name] = Histogram(
                    family.name, family.help, family.labels, registry=self._registry, buckets=buckets
                )
        self._unknown = {family.name for family in PROCESS_FAMILIES if family.kind == "gauge"}
        self._unknown |= {family.name.removesuffix("_total") for family in SHARING_FAMILIES}
        self._fields: set[str] = set()
        self._series: Mapping[str, int] = {}
        self._inflight = 0
        self._requests: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._latest: dict[str, float] = {}
        """Values of gauges without labels that have changed since the last scrape."""
        _Process(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self.inflight(0)
        self.shard(0, 1)
        self._set("build_info", 1, version, platform.python_version())

    def api_request(self, api: str, code: str, seconds: float) -> None:
        """Count a request that ended with this HTTP status, or `none` without an answer, after so many seconds."""
        known = self._requests.get((api, code))
        if known is None:
            counter = self._counters["api_requests_total"].labels(api, _status(code))
            known = counter, self._histograms["api_request_duration_seconds"].labels(api)
            if len(self._requests) < MOST_CODES:
                self._requests[api, code] = known
        counter, histogram = known
        counter.inc()
        histogram.observe(seconds)

    def api_retry(self, api: str) -> None:
        """Count a retry."""
        self._counters["api_retries_total"].labels(api).inc()

    def throttled(self, seconds: float) -> None:
        """Add the seconds that a request waited for its turn."""
        if seconds > 0:
            self._counters["api_throttle_seconds_total"].inc(seconds)

    def inflight(self, delta: int) -> None:
        """Count a request that begins (+1) or ends (-1)."""
        self._inflight += delta
        self._set("api_inflight_requests", self._inflight)

    def quota(self, api: str, remaining: float) -> None:
        """Set how many requests the gateway still allows."""
        self._set("api_quota_remaining", remaining, api)

    def skew(self, seconds: float) -> None:
        """Set the difference of the clocks: this machine's minus the platform's."""
        self._set("api_clock_skew_seconds", seconds)

    def unknown_values(self, field: str, times: int = 1) -> None:
        """Count values of BlueKing that our tables do not contain; `field` is the dotted name."""
        if field not in self._fields and len(self._fields) >= MOST_FIELDS:
            field = "other"
        else:
            self._fields.add(field)
        self._counters["unknown_values_total"].labels(field).inc(times)

    def state_reset(self) -> None:
        """Count a state that was found damaged or gone."""
        self._counters["state_resets_total"].inc()

    def state_written(self, at: float) -> None:
        """Count a transaction that was committed at this unix time."""
        self._counters["state_writes_total"].inc()
        self._set("state_last_write_timestamp_seconds", at)

    def state_size(self, nbytes: int | None) -> None:
        """Set the size of the state on disk; None where it is not on disk."""
        if nbytes is not None:
            self._set("state_bytes", nbytes)

    def state_write_error(self) -> None:
        """Count a transaction that failed."""
        self._counters["state_write_errors_total"].inc()

    def rendered(self, seconds: float) -> None:
        """Set how long it took to render the newest exposition."""
        self._set("render_duration_seconds", seconds)

    def exposition(self, nbytes: int) -> None:
        """A whole page of this size before compression was built for a scrape."""
        self._set("exposition_bytes", nbytes)

    def loop_lag(self, seconds: float) -> None:
        """Set how late the event loop ran a timer."""
        self._set("event_loop_lag_seconds", seconds)

    async def measure_loop_lag(self, clock: Clock) -> None:
        """Measure once a second how late the event loop runs a timer."""
        while True:
            due = clock.monotonic() + PERIOD
            await asyncio.sleep(PERIOD)
            self.loop_lag(max(0.0, clock.monotonic() - due))

    def config_loaded(self, sha256: str, at: float) -> None:
        """Set the configuration that is in use since this unix time."""
        self._gauges["config_info"].clear()
        self._set("config_info", 1, sha256)
        self._set("config_last_reload_successful", 1)
        self._set("config_last_reload_success_timestamp_seconds", at)

    def config_reload_failed(self) -> None:
        """Note that the configuration could not be loaded and the one before stays in use."""
        self._set("config_last_reload_successful", 0)

    def discovered(self, scopes: Mapping[str, int], last_success: float | None) -> None:
        """Scopes by type that CMDB lists and the configuration does not; unix time of its newest complete lists."""
        for kind, count in scopes.items():
            self._set("discovery_scopes", count, kind)
        if last_success is not None:
            self._set("discovery_last_success_timestamp_seconds", last_success)

    def discovery_failed(self, reason: str) -> None:
        """CMDB could not be asked, or what it lists could not be stored."""
        self._counters["discovery_errors_total"].labels(reason).inc()

    def discovery_off(self) -> None:
        """The configuration has no discovery any more."""
        self._gauges["discovery_scopes"].clear()
        self._latest.pop("discovery_last_success_timestamp_seconds", None)
        self._unknown |= {_PREFIX + name for name in ("discovery_scopes", "discovery_last_success_timestamp_seconds")}

    def shard(self, ordinal: int, total: int) -> None:
        """Set which of `total` shards this process is."""
        self._set("shard_ordinal", ordinal)
        self._set("total_shards", total)

    def series(self, counts: Mapping[str, int]) -> None:
        """Set the number of series on the page by family; a family that is not named has none."""
        if counts == self._series:
            return
        self._series = dict(counts)
        self._gauges["series"].clear()
        for family, count in counts.items():
            self._set("series", count, family)

    def series_dropped(self, family: str, n: int) -> None:
        """Count series that are newly cut because of `max_series`."""
        self._counters["series_dropped_total"].labels(family).inc(n)

    # With other replicas

    def shared(self) -> None:
        """This process shares its work with others: show the metrics about that."""
        self._unknown -= {family.name.removesuffix("_total") for family in SHARING_FAMILIES if family.kind != "gauge"}
        for cause in ("join", "dead", "released", "healed"):
            self._counters["takeovers_total"].labels(cause)

    def lease(self, valid: bool, remaining: float) -> None:
        """Whether the lease is valid, and for how many seconds."""
        self._set("lease_valid", valid)
        self._set("lease_remaining_seconds", remaining)

    def replicas(self, phases: Iterable[str]) -> None:
        """The phase of each replica that is alive."""
        counts = collections.Counter(phases)
        for phase in ("join", "ready", "leave"):
            self._set("replicas", counts[phase], phase)

    def scopes(self, *, owned: int, configured: int) -> None:
        """How many scopes this replica has, of how many there are."""
        self._set("scopes_owned", owned)
        self._set("scopes_configured", configured)

    def takeover(self, cause: str) -> None:
        self._counters["takeovers_total"].labels(cause).inc()

    def fenced(self) -> None:
        self._counters["fenced_total"].inc()

    def state_rollback(self) -> None:
        self._counters["state_rollbacks_total"].inc()

    def state_roundtrip(self, seconds: float) -> None:
        self._histograms["state_roundtrip_seconds"].observe(seconds)

    def state_acknowledged(self, replicas: int) -> None:
        self._set("state_replicas_acked", replicas)

    def render(self, openmetrics: bool, names: Set[str] | None = None) -> bytes:
        """The families that have samples, without `# EOF`; `names` selects as `Page.snapshot` does."""
        for name, value in self._latest.items():
            self._gauges[name].set(value)
            self._unknown.discard(_PREFIX + name)
        self._latest.clear()
        return encode(
            line
            for metric in self._registry.collect()
            if metric.name not in self._unknown
            for line in _lines(metric, openmetrics, names)
        )

    def _set(self, name: str, value: float, *labels: str) -> None:
        if not labels:
            self._latest[name] = value
            return
        self._gauges[name].labels(*labels).set(value)
        self._unknown.discard(_PREFIX + name)


class _Process(ProcessCollector):
    """`process_*` also where only /proc/PID can be read (ProcSubset=pid): the time of boot comes from the clocks."""

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _lines(metric: Metric, openmetrics: bool, names: Set[str] | None) -> Iterator[str]:
    # prometheus_client writes `_created` into the classic text too, and takes twice as long.
    kind = metric.type
    name = f"{metric.name}_total" if kind == "counter" else metric.name
    if names is not None and names.isdisjoint(sample_names(name, kind)):
        return
    created = f"{metric.name}_created"
    samples = [sample for sample in metric.samples if openmetrics or sample.name != created]
    if not samples:
        return
    yield header(name, kind, metric.documentation, openmetrics)
    for sample in samples:
        labels = label_text(sample.labels, sample.labels.values())
        yield (
            f"{sample.name}{{{labels}}} {number(sample.value)}\n"
            if labels
            else f"{sample.name} {number(sample.value)}\n"
        )


def _status(code: str) -> str:
    return code if code == "none" or (len(code) == 3 and code.isascii() and code.isdigit()) else "other"
