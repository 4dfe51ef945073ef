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
        "将作业平台执行记录与节点管理安装任务转换为 Prometheus 指标，计数不重不漏",
    ),
    "refresh": ("This page reloads every 30 seconds.", "本页每 30 秒自动刷新。"),
    "unknown": ("–", "–"),
    "ago": ("{} ago", "{}前"),
    "link.metrics": ("Metrics", "指标"),
    "link.status": ("Status as JSON", "状态（JSON）"),
    "link.failures": ("Failures as JSON", "失败详情（JSON）"),
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
    "pollers": ("Scopes and collectors", "采集状态"),
    "col.state": ("State", "状态"),
    "col.scope": ("Scope", "资源范围"),
    "col.collector": ("Collector", "采集器"),
    "col.age": ("Last success", "最近成功"),
    "col.reason": ("Last failure", "最近失败原因"),
    "col.next": ("Next poll", "下次采集"),
    "col.hosts": ("Failing hosts", "失败主机"),
    "never": ("never", "从未"),
    "in": ("in {}", "{}后"),
    "now": ("now", "即将"),
    "every": ("every {}", "每 {}"),
    "nothing": ("No scope is polled yet.", "尚未采集任何范围。"),
    "more": ("{} more are not shown; see", "另有 {} 项未显示，全部内容见"),
}

TEXTS: Mapping[Language, Texts] = {
    "en": {key: english for key, (english, _) in _TEXTS.items()},
    "zh": {key: chinese for key, (_, chinese) in _TEXTS.items()},
}
