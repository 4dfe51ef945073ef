"""What /metrics shows of a state of NodeMan jobs: its families, and how the gauges among them read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from msgspec.structs import astuple

from exporter.blueking.nodeman_jobs import Statistics
from exporter.collectors import nodeman
from exporter.collectors.nodeman import NodemanView, ended, status_label
from exporter.collectors.nodeman_job.fold import DURATION, FINISHED
from exporter.collectors.nodeman_job.state import NodemanJobState, TrackedJob, is_past
from exporter.config.schema import NodemanJobConfig
from exporter.metrics.family import Family, Labels

View: TypeAlias = NodemanView[NodemanJobState, NodemanJobConfig]


def unfinished(view: View) -> Mapping[Labels, float]:
    return _summed(((job.job_type, status_label(job.status)), 1.0) for job in _unfinished(view))


def oldest_unfinished(view: View) -> Mapping[Labels, float]:
    starts = [job.start_time for job in _unfinished(view) if job.start_time is not None]
    return {(): min(starts)} if starts else {}


def _unfinished(view: View) -> list[TrackedJob]:
    """Unfinished jobs, without those whose success is provisional (see `provisional_since`)."""
    return [job for job in view.state.jobs.values() if not job.counted and not ended(job.status, job.end_time)]


def instances(view: View) -> Mapping[Labels, float]:
    by_type: dict[str, list[Statistics]] = {}
    for job in view.state.jobs.values():
        if job.statistics is not None and not is_past(job, view.state.watermark or 0.0, view.config):
            by_type.setdefault(job.job_type, []).append(job.statistics)
    return {
        (job_type, status): count for job_type, jobs in by_type.items() for status, count in _statuses(jobs).items()
    }


def watched_instances(view: View) -> Mapping[Labels, float]:
    return {
        (str(id), job.job_type, status): count
        for id, job in _watched(view)
        if job.statistics is not None
        for status, count in _statuses([job.statistics]).items()
    }


def watched_status(view: View) -> Mapping[Labels, float]:
    return {(str(id), job.job_type, status_label(job.status)): 1.0 for id, job in _watched(view)}


def _watched(view: View) -> list[tuple[int, TrackedJob]]:
    return [(id, view.state.jobs[id]) for id in view.config.job_ids if id in view.state.jobs]


def _statuses(jobs: Sequence[Statistics]) -> dict[str, float]:
    """Instances of at least one job by status; what a total has beyond the five is `other`. A negative number is shown
    as 0."""
    rows = [row if min(row) >= 0 else tuple(max(0, number) for number in row) for row in map(astuple, jobs)]
    *columns, _ = zip(*rows, strict=True)
    counts = {name: float(sum(column)) for name, column in zip(Statistics.__struct_fields__, columns, strict=False)}
    other = float(sum(max(0, total - sum(numbers)) for *numbers, total in rows))
    return {**counts, "other": other} if other else counts


def _summed(samples: Iterable[tuple[Labels, float]]) -> Mapping[Labels, float]:
    total: dict[Labels, float] = {}
    for labels, value in samples:
        total[labels] = total.get(labels, 0.0) + value
    return total


FAMILIES = (
    Family(
        FINISHED,
        "counter",
        ("job_type", "status"),
        "NodeMan jobs that reached a terminal status, once per run.",
        "进入终态的节点管理任务数，每次运行只计一次。",
    ),
    Family(
        "blueking_nodeman_jobs_unfinished",
        "gauge",
        ("job_type", "status"),
        "NodeMan jobs that have not ended.",
        "尚未结束的节点管理任务数。",
        sticky=True,
        gauge=unfinished,
    ),
    Family(
        "blueking_nodeman_oldest_unfinished_timestamp_seconds",
        "gauge",
        (),
        "Start of the oldest unfinished NodeMan job.",
        "最早的未结束节点管理任务的开始时间。",
        gauge=oldest_unfinished,
    ),
    Family(
        "blueking_nodeman_job_instances",
        "gauge",
        ("job_type", "status"),
        "Instances of unfinished and recently finished jobs by status; they move back when a job is retried.",
        "未结束及近期结束任务的实例数，按状态统计；任务重试时会回退。",
        gauge=instances,
    ),
    Family(
        "blueking_nodeman_watched_job_instances",
        "gauge",
        ("job_id", "job_type", "status"),
        "Instances of each of the configured job_ids by status.",
        "配置的 job_ids 中各任务的实例数，按状态统计。",
        gauge=watched_instances,
    ),
    Family(
        "blueking_nodeman_watched_job_status",
        "gauge",
        ("job_id", "job_type", "status"),
        "1 for the present status of each of the configured job_ids.",
        "配置的 job_ids 中各任务的当前状态，值恒为 1。",
        gauge=watched_status,
    ),
    Family(
        DURATION,
        "histogram",
        ("job_type",),
        "Start to end of NodeMan jobs, first run only.",
        "节点管理任务首次运行从开始到结束的耗时。",
    ),
    *nodeman.FAMILIES,
)
