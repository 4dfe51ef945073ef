"""What /metrics shows of a JOB state: its families, and how the gauges among them read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from exporter.collectors import failing_hosts
from exporter.collectors.job.fold import (
    CREATED,
    DURATION,
    EXIT_CODES,
    FINISHED,
    HOST_FAILURES,
    HOST_RESULTS,
    LOST,
    REOPENED,
    STEP_FAILURES,
    WAIT,
    task_type_slug,
)
from exporter.collectors.job.state import JobState, Tracked, Watched, matches
from exporter.config.schema import JobConfig
from exporter.metrics.bounds import MOST_VALUES
from exporter.metrics.family import HOST_LABELS, Family, Labels
from exporter.model import HOST_CODES, job_status_slug

FAILURE_LABELS = ("code", "reason")


class JobView(msgspec.Struct, frozen=True):
    """A state as the gauges read it, with what has not ended."""

    state: JobState
    config: JobConfig
    unfinished: Sequence[Tracked]


def unfinished(view: JobView) -> Mapping[Labels, float]:
    counted: dict[Labels, float] = {}
    for known in view.unfinished:
        labels = (task_type_slug(known.task_type), job_status_slug(known.status))
        counted[labels] = counted.get(labels, 0.0) + 1.0
    return counted


def oldest_unfinished(view: JobView) -> Mapping[Labels, float]:
    oldest: dict[Labels, float] = {}
    for known in view.unfinished:
        labels = (job_status_slug(known.status),)
        oldest[labels] = min(known.create_time / 1000, oldest.get(labels, float("inf")))
    return oldest


def last_finished(view: JobView) -> Mapping[Labels, float]:
    return {(outcome,): end / 1000 for outcome, end in view.state.last_finished.items()}


def watched_last_finished(view: JobView) -> Mapping[Labels, float]:
    return {
        (entry.job_name, outcome): end / 1000
        for entry in view.config.watch
        for outcome, end in view.state.watched.get(entry.job_name, Watched()).last_finished.items()
    }


def watched_last_duration(view: JobView) -> Mapping[Labels, float]:
    return {
        (name,): known.duration / 1000
        for name, known in view.state.watched.items()
        if known.duration is not None and any(entry.job_name == name for entry in view.config.watch)
    }


def watched_unfinished(view: JobView) -> Mapping[Labels, float]:
    return {
        (entry.job_name,): float(sum(matches(entry, known.plan_id, known.name) for known in view.unfinished))
        for entry in view.config.watch
    }


def watched_unfinished_since(view: JobView) -> Mapping[Labels, float]:
    since: dict[Labels, float] = {}
    for entry in view.config.watch:
        begun = [
            known.start_time or known.create_time
            for known in view.unfinished
            if matches(entry, known.plan_id, known.name)
        ]
        if begun:
            since[entry.job_name,] = min(begun) / 1000
    return since


def watched_max_age(view: JobView) -> Mapping[Labels, float]:
    return {(entry.job_name,): entry.max_age for entry in view.config.watch if entry.max_age is not None}


def failing_since(view: JobView) -> Mapping[Labels, float]:
    return failing_hosts.since(view.state.hosts, view.config.max_failing_hosts)


def consecutive_failures(view: JobView) -> Mapping[Labels, float]:
    return failing_hosts.consecutive(view.state.hosts, view.config.max_failing_hosts)


_HOSTS_FAILING, _FAILING_SINCE = failing_hosts.families("blueking_job", FAILURE_LABELS, "JOB", "作业平台执行")

FAMILIES = (
    Family(
        CREATED,
        "counter",
        ("task_type", "launch_mode"),
        "Executions first seen.",
        "首次发现的作业执行数。",
    ),
    Family(
        FINISHED,
        "counter",
        ("task_type", "launch_mode", "status"),
        "Executions that reached a terminal status, once per run.",
        "进入终态的作业执行数，每次运行只计一次。",
    ),
    Family(REOPENED, "counter", (), "Finished executions that ran again.", "结束后又重新运行的作业执行数。"),
    Family(
        LOST,
        "counter",
        (),
        "Unfinished executions given up: too old, or gone from the platform.",
        "放弃跟踪的未完成作业执行数（过旧，或平台上已不存在）。",
    ),
    Family(
        "blueking_job_executions_unfinished",
        "gauge",
        ("task_type", "status"),
        "Executions now in a non-terminal status.",
        "当前处于非终态的作业执行数。",
        sticky=True,
        gauge=unfinished,
    ),
    Family(
        "blueking_job_oldest_unfinished_timestamp_seconds",
        "gauge",
        ("status",),
        "Creation of the oldest unfinished execution.",
        "最早的未完成作业执行的创建时间。",
        gauge=oldest_unfinished,
    ),
    Family(
        DURATION,
        "histogram",
        ("task_type",),
        "Start to first end of executions.",
        "作业执行从开始到首次结束的耗时。",
    ),
    Family(
        WAIT,
        "histogram",
        ("task_type",),
        "Creation to start of executions, first run only.",
        "作业执行从创建到开始的等待时长，仅首次运行。",
    ),
    Family(
        "blueking_job_last_finished_timestamp_seconds",
        "gauge",
        ("outcome",),
        "End of the newest execution with this outcome.",
        "该结果下最近一次作业执行的结束时间。",
        gauge=last_finished,
    ),
    Family(
        STEP_FAILURES,
        "counter",
        ("step_type",),
        "Failed steps of examined executions, once per step and attempt.",
        "被检查的作业执行中失败的步骤数，每个步骤的每次尝试只计一次。",
    ),
    Family(
        HOST_RESULTS,
        "counter",
        (),
        "Host results of the executions that host_results selects.",
        "host_results 所选作业执行中的主机结果数。",
    ),
    Family(
        HOST_FAILURES,
        "counter",
        ("code", "reason"),
        "Failed host results by failure code.",
        "按失败码统计的主机失败结果数。",
    ),
    Family(
        EXIT_CODES,
        "counter",
        ("exit_code",),
        f"Exit codes of failed host results in script steps; the first {MOST_VALUES} values of a scope, then other.",
        f"脚本步骤中失败主机结果的退出码；每个范围保留前 {MOST_VALUES} 个取值，其余记为 other。",
    ),
    msgspec.structs.replace(_HOSTS_FAILING, gauge=lambda view: view.state.hosts.by_labels()),
    msgspec.structs.replace(_FAILING_SINCE, gauge=failing_since),
    Family(
        "blueking_job_host_consecutive_failures",
        "gauge",
        HOST_LABELS,
        "Executions in a row that failed on a failing host.",
        "失败主机连续失败的作业执行次数。",
        detail=True,
        gauge=consecutive_failures,
    ),
    Family(
        "blueking_job_watched_last_finished_timestamp_seconds",
        "gauge",
        ("job_name", "outcome"),
        "End of the newest watched execution with this outcome.",
        "关注的作业在该结果下最近一次的结束时间。",
        detail=True,
        gauge=watched_last_finished,
    ),
    Family(
        "blueking_job_watched_last_duration_seconds",
        "gauge",
        ("job_name",),
        "Duration of the newest watched execution.",
        "关注的作业最近一次执行的耗时。",
        detail=True,
        gauge=watched_last_duration,
    ),
    Family(
        "blueking_job_watched_unfinished",
        "gauge",
        ("job_name",),
        "Watched executions that have not ended.",
        "关注的作业中尚未结束的执行数。",
        detail=True,
        gauge=watched_unfinished,
    ),
    Family(
        "blueking_job_watched_unfinished_since_timestamp_seconds",
        "gauge",
        ("job_name",),
        "Start (before the start: creation) of the oldest watched execution that has not ended; absent if none.",
        "关注的作业中最早的未结束执行的开始时间（未开始则为创建时间）；没有未结束的执行时该序列不存在。",
        detail=True,
        gauge=watched_unfinished_since,
    ),
    Family(
        "blueking_job_watched_max_age_seconds",
        "gauge",
        ("job_name",),
        "How old the newest success of a watched job may be (max_age of the configuration).",
        "关注的作业最近一次成功允许的最大时间间隔（配置中的 max_age）。",
        detail=True,
        gauge=watched_max_age,
    ),
)

STATUS_CODE_INFO = Family(
    "blueking_job_status_code_info",
    "gauge",
    ("code", "reason", "category", "text_zh"),
    "The table of host status codes.",
    "主机状态码对照表。",
)
"""Has no scope: the composition root renders it once."""


def status_code_info() -> dict[Labels, float]:
    """Samples of `STATUS_CODE_INFO`."""
    return {(str(code), known.reason, known.category, known.text_zh): 1.0 for code, known in HOST_CODES.items()}
