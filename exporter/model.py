"""The words of BlueKing: scopes, statuses, slugs. No I/O, no configuration.

Slugs are the values of labels and never change; numbers and Chinese texts are the vendor's.
Sources: bk-job RunStatusEnum, ExecuteObjectTaskStatusEnum, ResourceScopeTypeEnum; bk-nodeman constants.py.
"""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

ScopeType = Literal["biz", "biz_set", "tenant_set"]


class Scope(msgspec.Struct, frozen=True, order=True):
    """A business or a set of businesses: what JOB calls a resource scope."""

    bk_scope_type: ScopeType
    bk_scope_id: str

    def __str__(self) -> str:
        return f"{self.bk_scope_type}/{self.bk_scope_id}"


class Key(msgspec.Struct, frozen=True, order=True):
    """What one poller watches and one state belongs to."""

    collector: str
    scope: Scope

    def __str__(self) -> str:
        return f"{self.collector} {self.scope}"


TASK_TYPES = {0: "plan", 1: "script", 2: "file"}
LAUNCH_MODES = {1: "web", 2: "api", 3: "cron"}
STEP_TYPES = {1: "script", 2: "file", 3: "approval", 4: "sql"}
UNKNOWN = "unknown"

Outcome = Literal["success", "failure", "aborted"]


class JobStatus(msgspec.Struct, frozen=True):
    """A run status of JOB; `outcome` is None while the execution has not ended."""

    slug: str
    text_zh: str
    outcome: Outcome | None = None


JOB_STATUSES = {
    1: JobStatus("pending", "等待执行"),
    2: JobStatus("running", "正在执行"),
    3: JobStatus("success", "执行成功", "success"),
    4: JobStatus("failed", "执行失败", "failure"),
    5: JobStatus("skipped", "跳过", "success"),
    6: JobStatus("ignored_error", "忽略错误", "success"),
    7: JobStatus("waiting_user", "等待用户"),
    8: JobStatus("terminated", "手动结束", "aborted"),
    9: JobStatus("abnormal", "状态异常", "failure"),
    10: JobStatus("stopping", "强制终止中"),
    11: JobStatus("stopped", "强制终止成功", "aborted"),
    13: JobStatus("confirm_terminated", "确认终止", "aborted"),
    14: JobStatus("abandoned", "被丢弃", "aborted"),
    15: JobStatus("rolling_waiting", "滚动等待"),
}


def job_status_slug(status: int) -> str:
    """The label of a run status, `unknown` for a number that is not in the table."""
    known = JOB_STATUSES.get(status)
    return known.slug if known else UNKNOWN


@functools.lru_cache(maxsize=256)
def job_outcome(status: int, ended: bool) -> Outcome | None:
    """How an execution or step ended, None while it has not. An unknown status has ended, as a failure, once it has
    an end time."""
    known = JOB_STATUSES.get(status)
    if known:
        return known.outcome
    return "failure" if ended else None


Category = Literal["agent", "script", "file", "credential", "timeout", "aborted", "platform"]


class HostCode(msgspec.Struct, frozen=True):
    """A failure code of a host result."""

    reason: str
    category: Category
    text_zh: str


HOST_WAITING = frozenset({5, 7})
"""Host result codes that are no result yet: waiting, running."""
HOST_SUCCESS = 9
HOST_ALREADY_SUCCEEDED = 3
"""Succeeded in an earlier attempt: neither a failure nor news of a success."""

HOST_CODES = {
    0: HostCode("unknown_error", "platform", "未知错误"),
    1: HostCode("agent_abnormal", "agent", "Agent异常"),
    2: HostCode("invalid_target", "platform", "无效执行对象"),
    11: HostCode("failed", "platform", "执行失败"),
    12: HostCode("submit_failed", "platform", "任务下发失败"),
    13: HostCode("task_timeout", "timeout", "任务超时"),
    15: HostCode("log_error", "platform", "任务日志错误"),
    16: HostCode("script_log_timeout", "timeout", "GSE脚本日志超时"),
    17: HostCode("file_log_timeout", "timeout", "GSE文件日志超时"),
    18: HostCode("agent_not_installed", "agent", "Agent未安装"),
    101: HostCode("script_failed", "script", "脚本执行失败"),
    102: HostCode("script_timeout", "timeout", "脚本执行超时"),
    103: HostCode("script_terminated", "aborted", "脚本执行被终止"),
    104: HostCode("script_nonzero_exit", "script", "脚本返回码非零"),
    202: HostCode("file_transfer_failed", "file", "文件传输失败"),
    203: HostCode("source_file_missing", "file", "源文件不存在"),
    301: HostCode("file_error_unclassified", "file", "文件任务系统错误-未分类的"),
    303: HostCode("file_timeout", "timeout", "文件任务超时"),
    310: HostCode("gse_agent_abnormal", "agent", "Agent异常"),
    311: HostCode("user_not_found", "credential", "用户名不存在"),
    312: HostCode("wrong_password", "credential", "用户密码错误"),
    320: HostCode("file_fetch_failed", "file", "文件获取失败"),
    321: HostCode("file_too_large", "file", "文件超出限制"),
    329: HostCode("file_transfer_error", "file", "文件传输错误"),
    399: HostCode("task_error", "platform", "任务执行出错"),
    403: HostCode("force_stopped", "aborted", "GSE任务强制终止成功"),
    404: HostCode("force_stop_failed", "aborted", "GSE任务强制终止失败"),
    500: HostCode("unknown_status", "platform", "未知状态"),
}

UNKNOWN_CODE = "unknown_code"


def host_reason(code: int) -> str:
    """The label of a host failure code; `unknown_code` for a number that is not in the table."""
    known = HOST_CODES.get(code)
    return known.reason if known else UNKNOWN_CODE


NODEMAN_UNFINISHED = frozenset({"pending", "running", "queue"})
NODEMAN_STATUSES = frozenset(
    {
        "pending",
        "running",
        "success",
        "failed",
        "part_failed",
        "terminated",
        "removed",
        "filtered",
        "ignored",
        "queue",
    }
)
"""Lower-case statuses of NodeMan jobs and instances; `queue` is NodeMan 1.x."""


def name_matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern of the configuration: `*` is any text, `?` one character, all else is itself."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


class Host(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """Who a host is on /metrics. `bk_host_id` is empty where the platform gives none; then (cloud, ip) is its
    identity."""

    bk_cloud_id: str
    bk_host_id: str
    ip: str

    @property
    def identity(self) -> str:
        """The same for the same host, whatever address it is shown with."""
        return self.bk_host_id or f"{self.bk_cloud_id}:{self.ip}"

    @property
    def address(self) -> str:
        """Cloud and address, by which results with and without `bk_host_id` belong together; "" without an address."""
        return f"{self.bk_cloud_id}:{self.ip}" if self.ip else ""
