"""GET /: what is watched and how it goes, failing ones first. Plain HTML and CSS; it loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

from aiohttp.web_request import BaseRequest

from exporter import log
from exporter.status import PollerStatus, State, Status
from exporter.web.reply import NO_STORE, Reply, whole

Language = Literal["en", "zh"]
MOST_ROWS = 500
"""Rows shown; a page of all collectors of thousands of scopes helps nobody and would hold up the scrapes."""
LONGEST_MESSAGE = 240
DOCUMENTATION = "https://pypi.org/project/blueking-exporter/"

_LANGUAGES: dict[str, Language] = {"en": "en", "zh": "zh"}
_ORDER: tuple[State, ...] = get_args(State)

_TEXTS: dict[Language, dict[str, str]] = {
    "en": {
        "html": "en",
        "title": "BlueKing exporter",
        "tagline": "JOB executions and NodeMan installs as Prometheus metrics, counted exactly once",
        "failing": "failing",
        "stale": "stale",
        "starting": "starting",
        "ok": "ok",
        "hosts": "failing hosts",
        "series": "series",
        "uptime": "running for",
        "ready": "ready",
        "not_ready": "not ready",
        "watched": "What is watched",
        "col_state": "State",
        "col_scope": "Scope",
        "col_collector": "Collector",
        "col_age": "Last success",
        "col_reason": "Last failure",
        "col_next": "Next poll",
        "col_hosts": "Failing hosts",
        "ago": "{} ago",
        "never": "never",
        "in": "in {}",
        "now": "now",
        "every": "every {}",
        "unknown": "–",
        "nothing": "Nothing is watched yet.",
        "more": "{} more are not shown; all of them are in",
        "metrics": "Metrics",
        "status": "Status as JSON",
        "failures": "Failures as JSON",
        "docs": "Documentation",
        "refresh": "This page renews itself every 30 seconds.",
        "d": "d",
        "h": "h",
        "m": "min",
        "s": "s",
    },
    "zh": {
        "html": "zh-Hans",
        "title": "蓝鲸 Exporter",
        "tagline": "将作业平台执行记录与节点管理安装任务转换为 Prometheus 指标，计数不重不漏",
        "failing": "失败",
        "stale": "已过期",
        "starting": "启动中",
        "ok": "正常",
        "hosts": "失败主机",
        "series": "时间序列",
        "uptime": "已运行",
        "ready": "就绪",
        "not_ready": "未就绪",
        "watched": "采集状态",
        "col_state": "状态",
        "col_scope": "资源范围",
        "col_collector": "采集器",
        "col_age": "最近成功",
        "col_reason": "最近失败原因",
        "col_next": "下次采集",
        "col_hosts": "失败主机",
        "ago": "{}前",
        "never": "从未",
        "in": "{}后",
        "now": "即将",
        "every": "每 {}",
        "unknown": "–",
        "nothing": "尚未采集任何范围。",
        "more": "另有 {} 项未显示，全部内容见",
        "metrics": "指标",
        "status": "状态（JSON）",
        "failures": "失败详情（JSON）",
        "docs": "文档",
        "refresh": "本页每 30 秒自动刷新。",
        "d": "天",
        "h": "小时",
        "m": "分钟",
        "s": "秒",
    },
}

_REASONS: dict[str, tuple[str, str]] = {
    "timeout": ("no answer in time", "超时未响应"),
    "connect": ("cannot connect", "无法连接"),
    "tls": ("TLS failed", "TLS 握手失败"),
    "auth": ("credentials refused", "认证失败"),
    "permission": ("permission missing", "缺少权限"),
    "rate_limited": ("rate limit reached", "触发限流"),
    "not_found": ("not found", "不存在"),
    "redirect": ("redirected elsewhere", "被重定向"),
    "http_4xx": ("request refused", "请求被拒绝"),
    "http_5xx": ("platform error", "平台错误"),
    "api_error": ("refused by the platform", "平台返回错误"),
    "decode": ("answer not understood", "响应无法解析"),
    "too_large": ("answer too large", "响应过大"),
    "not_ready": ("not ready yet", "尚未就绪"),
    "state": ("state not writable", "状态无法写入"),
    "internal": ("bug in the exporter", "内部错误"),
}

_STYLE = Path(__file__).with_name("landing.css").read_text(encoding="utf-8")

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40" viewBox="0 0 40 40" aria-hidden="true">'
    '<rect width="40" height="40" rx="10" fill="#2f6bff"/>'
    '<path d="M8 24h6l3.5-11L23 29l3.5-9H32" fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round" '
    'stroke-linejoin="round"/></svg>'
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def landing(request: BaseRequest, status: Status, telemetry_path: str) -> Reply:
    """The page in the language of `?lang=`, else of Accept-Language, else in English."""
    asked = request.query.get("lang")
    language = _LANGUAGES.get(asked) if asked else None
    language = language or preferred(request.headers.get("Accept-Language", ""))
    headers = {
        **NO_STORE,
        "Content-Security-Policy": POLICY,
        "Content-Language": _TEXTS[language]["html"],
        "Vary": "Accept-Language",
    }
    return whole(200, "text/html; charset=utf-8", page(status, language, telemetry_path).encode(), headers)


def preferred(accept_language: str) -> Language:
    """The better liked of the two; English when they are liked the same or the header makes no sense."""
    liked: dict[str, float] = {"en": 0.0, "zh": 0.0}
    for element in accept_language[:1000].split(","):
        name, _, weight = element.strip().lower().partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        language = name.strip().partition("-")[0]
        if language in liked and 0 <= quality <= 1:
            liked[language] = max(liked[language], quality)
    return "zh" if liked["zh"] > liked["en"] else "en"


def page(status: Status, language: Language, telemetry_path: str) -> str:
    """The whole document. Everything that comes from outside is redacted, stripped of controls and escaped."""
    text = _TEXTS[language]
    pollers = sorted(status.pollers, key=_urgency)
    counts = Counter(watch.state for watch in pollers)
    hosts = sum(watch.failing_hosts or 0 for watch in pollers)
    tiles = [
        *(_tile(str(counts[state]), text[state], state if counts[state] else "") for state in _ORDER),
        _tile(f"{hosts:,}", text["hosts"], "failing" if hosts else ""),
        _tile(f"{status.series:,}", text["series"]),
    ]
    return f"""<!doctype html>
<html lang="{text["html"]}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="refresh" content="30">
<meta name="robots" content="noindex">
<title>{f"({counts['failing']}) " if counts["failing"] else ""}{text["title"]}</title>
<link rel="icon" href="data:image/svg+xml,{quote(_ICON)}">
<style>{_STYLE}</style>
</head>
<body>
<div class="page">
<header>
{_ICON}
<div class="grow"><h1>{text["title"]}<small>blueking-exporter {_clean(status.version)}</small></h1>
<p class="tagline">{text["tagline"]}</p></div>
<div class="lang">{_switch("en", "English", language)}{_switch("zh", "中文", language)}</div>
</header>
<main>
<ul class="tiles">{"".join(tiles)}</ul>
<h2>{text["watched"]}<small>{_process(status, text)}</small></h2>
<div class="box">{_table(pollers, text, language)}</div>
</main>
<nav>
<a href="{escape(telemetry_path)}">{text["metrics"]}</a>
<a href="/api/v1/status">{text["status"]}</a>
<a href="/api/v1/failures">{text["failures"]}</a>
<a href="{DOCUMENTATION}" rel="noreferrer">{text["docs"]}</a>
</nav>
<footer>{text["refresh"]}</footer>
</div>
</body>
</html>
"""


def _process(status: Status, text: dict[str, str]) -> str:
    return f"{text['ready' if status.ready else 'not_ready']} · {text['uptime']} {_duration(status.uptime, text)}"


def _urgency(watch: PollerStatus) -> tuple[int, str, int, str, str]:
    # Ids are numbers written as text: 2 comes before 10.
    scope_id = watch.bk_scope_id
    return _ORDER.index(watch.state), watch.bk_scope_type, len(scope_id), scope_id, watch.collector


def _tile(value: str, label: str, kind: str = "") -> str:
    return f'<li class="{kind}"><b>{value}</b><span>{label}</span></li>'


def _switch(language: Language, label: str, current: Language) -> str:
    tag = _TEXTS[language]["html"]
    if language == current:
        return f'<span lang="{tag}" aria-current="true">{label}</span>'
    return f'<a href="?lang={language}" lang="{tag}" hreflang="{tag}">{label}</a>'


def _table(pollers: list[PollerStatus], text: dict[str, str], language: Language) -> str:
    if not pollers:
        return f'<p class="empty">{text["nothing"]}</p>'
    titles = ("state", "scope", "collector", "age", "reason", "next", "hosts")
    head = "".join(f'<th scope="col"{_numeric(name)}>{text[f"col_{name}"]}</th>' for name in titles)
    rows = "".join(_row(watch, text, language) for watch in pollers[:MOST_ROWS])
    more = len(pollers) - MOST_ROWS
    note = ""
    if more > 0:
        link = '<a href="/api/v1/status">/api/v1/status</a>'
        note = f'<p class="more">{text["more"].format(f"{more:,}")} {link}</p>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _numeric(column: str) -> str:
    return ' class="num"' if column == "hosts" else ""


def _row(watch: PollerStatus, text: dict[str, str], language: Language) -> str:
    scope = f"{watch.bk_scope_type}/{watch.bk_scope_id}"
    below = f'<span class="sub">{_clean(scope)}</span>' if watch.name else ""
    cells = [
        f'<td class="state"><span class="badge {watch.state}">{text[watch.state]}</span></td>',
        f'<td class="scope"><b>{_clean(watch.name or scope)}</b>{below}</td>',
        f'<td class="collector"><code>{_clean(watch.collector)}</code></td>',
        f'<td class="nowrap" data-label="{text["col_age"]}">{_age(watch, text)}</td>',
        _why(watch, text, language),
        f'<td class="nowrap" data-label="{text["col_next"]}">{_next(watch, text)}</td>',
        f'<td class="num" data-label="{text["col_hosts"]}">{_hosts(watch, text)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _age(watch: PollerStatus, text: dict[str, str]) -> str:
    if watch.age is None:
        return f'<span class="quiet">{text["never"]}</span>'
    ago = text["ago"].format(_duration(watch.age, text))
    if watch.last_success is None:
        return ago
    try:
        moment = datetime.fromtimestamp(watch.last_success, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return ago
    return f'<time datetime="{moment}" title="{moment}">{ago}</time>'


def _why(watch: PollerStatus, text: dict[str, str], language: Language) -> str:
    if not watch.reason:
        return f'<td class="why none"><span class="quiet">{text["unknown"]}</span></td>'
    meaning = _REASONS.get(watch.reason, ("", ""))[language == "zh"]
    message = log.redact(watch.message)
    message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"
    sub = f'<span class="sub">{_clean(message)}</span>' if message else ""
    return f'<td class="why" data-label="{text["col_reason"]}">{meaning} <code>{_clean(watch.reason)}</code>{sub}</td>'


def _next(watch: PollerStatus, text: dict[str, str]) -> str:
    every = (
        f'<span class="sub">{text["every"].format(_duration(watch.interval, text))}</span>' if watch.interval else ""
    )
    if watch.next_poll is None:
        return text["unknown"] + every
    return (text["in"].format(_duration(watch.next_poll, text)) if watch.next_poll >= 1 else text["now"]) + every


def _hosts(watch: PollerStatus, text: dict[str, str]) -> str:
    if watch.failing_hosts is None:
        return f'<span class="quiet">{text["unknown"]}</span>'
    return f'<span class="{"hot" if watch.failing_hosts else "quiet"}">{watch.failing_hosts:,}</span>'


def _duration(seconds: float, text: dict[str, str]) -> str:
    """The two largest units, the second only where it matters: 45 s, 3 min, 2 h 5 min, 3 d 4 h."""
    left = max(0, int(seconds))
    parts: Iterable[tuple[int, str]] = (
        (left // 86400, "d"),
        (left // 3600 % 24, "h"),
        (left // 60 % 60, "m"),
        (left % 60, "s"),
    )
    shown = [f"{number} {text[unit]}" for number, unit in parts if number]
    return " ".join(shown[: 1 if left < 3600 else 2]) or f"0 {text['s']}"


def _clean(value: str) -> str:
    return escape(log.escape(log.redact(value)))
