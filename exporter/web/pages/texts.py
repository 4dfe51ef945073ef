"""Every text of the pages, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]
Texts = Mapping[str, str]
"""The texts of one language by key."""

_TEXTS: dict[str, tuple[str, str]] = {
    "html_lang": ("en", "zh-Hans"),
    # all pages
    "title": ("BlueKing exporter", "蓝鲸 Exporter"),
    "tagline": (
        "JOB executions and NodeMan installs as Prometheus metrics, counted exactly once",
        "将作业平台的执行与节点管理的安装任务转换为 Prometheus 指标，计数不重不漏",
    ),
    "refresh": ("This page reloads every {} seconds.", "本页每 {} 秒自动刷新。"),
    "unknown": ("–", "–"),
    "ago": ("{} ago", "{}前"),
    "link.metrics": ("Metrics", "指标"),
    "link.home": ("Scopes and collectors", "范围与采集项"),
    "link.failures": ("Failures", "失败详情"),
    "link.status_json": ("Status as JSON", "状态（JSON）"),
    "link.failures_json": ("Failures as JSON", "失败详情（JSON）"),
    "link.docs": ("Documentation", "文档"),
    "unit.d": ("d", "天"),
    "unit.h": ("h", "小时"),
    "unit.m": ("min", "分钟"),
    "unit.s": ("s", "秒"),
    # the state of a poller
    "state.failing": ("failing", "失败"),
    "state.stale": ("stale", "已过期"),
    "state.starting": ("starting", "启动中"),
    "state.ok": ("ok", "正常"),
    # why its newest poll failed
    "reason.timeout": ("no answer in time", "超时未响应"),
    "reason.connect": ("cannot connect", "无法连接"),
    "reason.tls": ("TLS failed", "TLS 握手失败"),
    "reason.auth": ("credentials refused", "认证失败"),
    "reason.permission": ("permission missing", "缺少权限"),
    "reason.rate_limited": ("rate limit reached", "触发限流"),
    "reason.not_found": ("not found", "不存在"),
    "reason.redirect": ("redirected to another address", "被重定向"),
    "reason.http_4xx": ("request refused", "请求被拒绝"),
    "reason.http_5xx": ("platform error", "平台错误"),
    "reason.api_error": ("the platform reports an error", "平台返回错误"),
    "reason.decode": ("the answer cannot be decoded", "响应无法解析"),
    "reason.too_large": ("answer too large", "响应过大"),
    "reason.not_ready": ("not ready yet", "尚未就绪"),
    "reason.state": ("state cannot be written", "状态无法写入"),
    "reason.internal": ("error in the exporter", "内部错误"),
    # landing page
    "tile.hosts": ("failing hosts", "失败主机"),
    "tile.series": ("series", "时间序列"),
    "uptime": ("running for {}", "已运行 {}"),
    "ready": ("ready", "就绪"),
    "not_ready": ("not ready", "未就绪"),
    "pollers": ("Scopes and collectors", "范围与采集项"),
    "col.state": ("State", "状态"),
    "col.scope": ("Scope", "范围"),
    "col.collector": ("Collector", "采集项"),
    "col.age": ("Last success", "最近成功"),
    "col.reason": ("Last failure", "最近失败原因"),
    "col.next": ("Next poll", "下次轮询"),
    "col.hosts": ("Failing hosts", "失败主机"),
    "never": ("never", "从未"),
    "in": ("in {}", "{}后"),
    "now": ("now", "即将"),
    "every": ("every {}", "每 {}"),
    "nothing": ("No scope is polled yet.", "尚未轮询任何范围。"),
    "more": ("{} more are not shown; see", "另有 {} 项未显示，全部内容见"),
    # failures
    "failures.title": ("Failures", "失败详情"),
    "failures.tagline": (
        "Hosts whose newest result is a failure, and recent executions that failed",
        "最近一次结果为失败的主机，以及近期失败的执行",
    ),
    "failures.unread": (
        "The newest poll of {} scopes and collectors failed or has not ended; their rows are from the poll before.",
        "有 {} 个采集项最近一次轮询未成功或尚未完成，对应的行来自此前的轮询。",
    ),
    "failures.untracked": (
        "{} more hosts fail: a scope has more failing hosts than are tracked.",
        "另有 {} 台失败主机未列出：某个范围的失败主机数超过了跟踪上限。",
    ),
    "failures.hosts": ("Failing hosts", "失败主机"),
    "failures.executions": ("Failed executions", "失败的执行"),
    "failures.reasons": ("Most frequent reasons", "主要失败原因"),
    "failures.no_hosts": ("No host fails.", "没有失败主机。"),
    "failures.no_executions": ("No recent execution failed.", "近期没有失败的执行。"),
    "failures.none_known": ("None is known.", "暂无已知记录。"),
    "failures.invisible": (
        "This replica has lost its lease on the scopes for now; another one may show them.",
        "本副本暂时失去了对范围的租约，请查看其他副本。",
    ),
    "failures.no_match": ("Nothing matches the filter.", "没有符合筛选条件的记录。"),
    "failures.rows": ("{}–{} of {}", "第 {}–{} 条，共 {} 条"),
    "failures.previous": ("Previous", "上一页"),
    "failures.next": ("Next", "下一页"),
    "failures.page": ("Page {} of {}", "第 {} 页，共 {} 页"),
    "col.host": ("Host", "主机"),
    "col.why": ("Reason", "失败原因"),
    "col.since": ("Failing for", "已持续"),
    "col.consecutive": ("In a row", "连续失败"),
    "col.newest": ("Execution", "执行"),
    "col.execution": ("Name", "名称"),
    "col.status": ("Status", "状态"),
    "col.ended": ("Ended", "结束时间"),
    "filter.bk_scope_type": ("Scope type", "范围类型"),
    "filter.bk_scope_id": ("Scope id", "范围 ID"),
    "filter.collector": ("Collector", "采集项"),
    "filter.code": ("Code or step", "错误码或步骤"),
    "filter.text": ("Text", "关键字"),
    "filter.hint": ("host, reason, name", "主机、原因、名称"),
    "filter.any": ("any", "不限"),
    "filter.apply": ("Filter", "筛选"),
    "filter.clear": ("Clear", "清除"),
    "host.id": ("host {}", "主机 {}"),
    "host.cloud": ("cloud {}", "管控区域 {}"),
    "step.other": ("unknown step", "未知步骤"),
    "step.": ("error code", "错误码"),
    "status.failed": ("failed", "执行失败"),
    "status.abnormal": ("abnormal", "状态异常"),
    "status.part_failed": ("partly failed", "部分失败"),
    "status.unknown": ("unknown", "未知状态"),
}

TEXTS: Mapping[Language, Texts] = {
    "en": {key: english for key, (english, _) in _TEXTS.items()},
    "zh": {key: chinese for key, (_, chinese) in _TEXTS.items()},
}
