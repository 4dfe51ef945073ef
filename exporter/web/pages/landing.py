"""GET /: every scope and collector and how its polls go, failing ones first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from aiohttp.web_request import BaseRequest

from exporter import log
from exporter.status import PollerStatus, State, Status
from exporter.web.pages.html import ago, clean, duration, frame, language_of, reply
from exporter.web.pages.texts import TEXTS, Language, Texts
from exporter.web.reply import Reply

MOST_ROWS = 500
"""Rows shown: to write thousands would delay scrapes."""
LONGEST_MESSAGE = 240
DOCUMENTATION = "https://pypi.org/project/blueking-exporter/"
_ORDER: tuple[State, ...] = get_args(State)


def landing(request: BaseRequest, status: Status, telemetry_path: str) -> Reply:
    """The page in the language that the browser prefers."""
    language = language_of(request)
    return reply(page(status, language, telemetry_path), language)


def page(status: Status, language: Language, telemetry_path: str) -> str:
    """The whole document."""
    text = TEXTS[language]
    pollers = sorted(status.pollers, key=_urgency)
    counts = Counter(poller.state for poller in pollers)
    hosts = sum(poller.failing_hosts or 0 for poller in pollers)
    tiles = [
        *(_tile(str(counts[state]), text[f"state.{state}"], state if counts[state] else "") for state in _ORDER),
        _tile(f"{hosts:,}", text["tile.hosts"], "failing" if hosts else ""),
        _tile(f"{status.series:,}", text["tile.series"]),
    ]
    content = f"""<ul class="tiles">{"".join(tiles)}</ul>
<h2>{text["pollers"]}<small>{_process(status, text)}</small></h2>
<div class="box">{_table(pollers, text)}</div>"""
    failing = f"({counts['failing']}) " if counts["failing"] else ""
    links = (
        (telemetry_path, text["link.metrics"]),
        ("/api/v1/status", text["link.status"]),
        ("/api/v1/failures", text["link.failures"]),
        (DOCUMENTATION, text["link.docs"]),
    )
    return frame(language, failing + text["title"], status.version, content, links)


def _process(status: Status, text: Texts) -> str:
    ready = text["ready" if status.ready else "not_ready"]
    return f"{ready} · {text['uptime'].format(duration(status.uptime, text))}"


def _urgency(poller: PollerStatus) -> tuple[int, str, int, str, str]:
    # Ids are numbers written as text: 2 comes before 10.
    scope_id = poller.bk_scope_id
    return _ORDER.index(poller.state), poller.bk_scope_type, len(scope_id), scope_id, poller.collector


def _tile(value: str, label: str, kind: str = "") -> str:
    return f'<li class="{kind}"><b>{value}</b><span>{label}</span></li>'


def _table(pollers: Sequence[PollerStatus], text: Texts) -> str:
    if not pollers:
        return f'<p class="empty">{text["nothing"]}</p>'
    titles = ("state", "scope", "collector", "age", "reason", "next", "hosts")
    head = "".join(f'<th scope="col"{_numeric(name)}>{text[f"col.{name}"]}</th>' for name in titles)
    rows = "".join(_row(poller, text) for poller in pollers[:MOST_ROWS])
    more = len(pollers) - MOST_ROWS
    note = ""
    if more > 0:
        link = '<a href="/api/v1/status">/api/v1/status</a>'
        note = f'<p class="more">{text["more"].format(f"{more:,}")} {link}</p>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _numeric(column: str) -> str:
    return ' class="num"' if column == "hosts" else ""


def _row(poller: PollerStatus, text: Texts) -> str:
    scope = f"{poller.bk_scope_type}/{poller.bk_scope_id}"
    below = f'<span class="sub">{clean(scope)}</span>' if poller.name else ""
    cells = [
        f'<td class="state"><span class="badge {poller.state}">{text[f"state.{poller.state}"]}</span></td>',
        f'<td class="scope"><b>{clean(poller.name or scope)}</b>{below}</td>',
        f'<td class="collector"><code>{clean(poller.collector)}</code></td>',
        f'<td class="nowrap" data-label="{text["col.age"]}">{_age(poller, text)}</td>',
        _why(poller, text),
        f'<td class="nowrap" data-label="{text["col.next"]}">{_next(poller, text)}</td>',
        f'<td class="num" data-label="{text["col.hosts"]}">{_hosts(poller, text)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _age(poller: PollerStatus, text: Texts) -> str:
    if poller.age is None:
        return f'<span class="quiet">{text["never"]}</span>'
    return ago(poller.age, poller.last_success, text)


def _why(poller: PollerStatus, text: Texts) -> str:
    if not poller.reason:
        return f'<td class="why none"><span class="quiet">{text["unknown"]}</span></td>'
    meaning = text.get(f"reason.{poller.reason}", "")
    message = log.redact(poller.message)
    message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"
    sub = f'<span class="sub">{clean(message)}</span>' if message else ""
    return f'<td class="why" data-label="{text["col.reason"]}">{meaning} <code>{clean(poller.reason)}</code>{sub}</td>'


def _next(poller: PollerStatus, text: Texts) -> str:
    every = (
        f'<span class="sub">{text["every"].format(duration(poller.interval, text))}</span>' if poller.interval else ""
    )
    if poller.next_poll is None:
        return text["unknown"] + every
    return (text["in"].format(duration(poller.next_poll, text)) if poller.next_poll >= 1 else text["now"]) + every


def _hosts(poller: PollerStatus, text: Texts) -> str:
    if poller.failing_hosts is None:
        return f'<span class="quiet">{text["unknown"]}</span>'
    return f'<span class="{"hot" if poller.failing_hosts else "quiet"}">{poller.failing_hosts:,}</span>'
