"""GET /: every scope and collector and how its polls go, failing ones first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from aiohttp.web_request import BaseRequest

from exporter import log
from exporter.status import PollerStatus, State, Status
from exporter.web.pages.html import (
    Choice,
    Frame,
    anchor,
    cell,
    choose,
    clean,
    collector_cell,
    duration,
    framed,
    moment,
    reply,
    row,
    scope_cell,
    table,
)
from exporter.web.pages.texts import Texts
from exporter.web.reply import Reply

MOST_ROWS = 500
"""Rows shown: to write thousands would delay scrapes."""
LONGEST_MESSAGE = 240
REFRESH = 30
DOCUMENTATION = "https://pypi.org/project/blueking-exporter/"
_COLUMNS = ("state", "scope", "collector", "age", "reason", "next", "hosts")
_ORDER: tuple[State, ...] = get_args(State)


def landing(request: BaseRequest, status: Status, telemetry_path: str) -> Reply:
    """The page in the language that the browser prefers."""
    choice = choose(request)
    return reply(page(status, choice, telemetry_path), choice)


def page(status: Status, choice: Choice, telemetry_path: str) -> str:
    """The whole document."""
    text = choice.text
    failures = choice.address("/failures")
    pollers = sorted(status.pollers, key=_urgency)
    counts = Counter(poller.state for poller in pollers)
    hosts = sum(poller.failing_hosts or 0 for poller in pollers)
    tiles = [
        *(_tile(str(counts[state]), text[f"state.{state}"], state if counts[state] else "") for state in _ORDER),
        _tile(anchor(failures, f"{hosts:,}"), text["tile.hosts"], "failing" if hosts else ""),
        _tile(f"{status.series:,}", text["tile.series"]),
    ]
    content = f"""<ul class="tiles">{"".join(tiles)}</ul>
<h2>{text["pollers"]}<small>{_process(status, text)}</small></h2>
<div class="box">{_table(pollers, choice)}</div>"""
    failing = f"({counts['failing']}) " if counts["failing"] else ""
    links = (
        (failures, text["link.failures"]),
        (telemetry_path, text["link.metrics"]),
        ("/api/v1/status", text["link.status_json"]),
        ("/api/v1/failures", text["link.failures_json"]),
        (DOCUMENTATION, text["link.docs"]),
    )
    frame = Frame(
        choice=choice,
        title=failing + text["title"],
        heading=text["title"],
        tagline=text["tagline"],
        path="/",
        links=links,
        refresh=REFRESH,
    )
    return framed(frame, content)


def _process(status: Status, text: Texts) -> str:
    ready = text["ready" if status.ready else "not_ready"]
    return f"{ready} · {text['uptime'].format(duration(status.uptime, text))}"


def _urgency(poller: PollerStatus) -> tuple[int, str, int, str, str]:
    # Ids are numbers written as text: 2 comes before 10.
    scope_id = poller.bk_scope_id
    return _ORDER.index(poller.state), poller.bk_scope_type, len(scope_id), scope_id, poller.collector


def _tile(value: str, label: str, kind: str = "") -> str:
    return f'<li class="{kind}"><b>{value}</b><span>{label}</span></li>'


def _table(pollers: Sequence[PollerStatus], choice: Choice) -> str:
    text = choice.text
    if not pollers:
        return f'<p class="empty">{text["nothing"]}</p>'
    rows = [_row(poller, choice) for poller in pollers[:MOST_ROWS]]
    more = len(pollers) - MOST_ROWS
    note = ""
    if more > 0:
        link = anchor("/api/v1/status", "/api/v1/status")
        note = f'<p class="more">{text["more"].format(f"{more:,}")} {link}</p>'
    return table(_COLUMNS, "hosts", rows, text) + note


def _row(poller: PollerStatus, choice: Choice) -> str:
    text = choice.text
    cells = [
        f'<td class="state"><span class="badge {poller.state}">{text[f"state.{poller.state}"]}</span></td>',
        scope_cell(poller.name, poller.bk_scope_type, poller.bk_scope_id),
        collector_cell(poller.collector),
        cell("nowrap", "age", _age(poller, text), text),
        _why(poller, text),
        cell("nowrap", "next", _next(poller, text), text),
        cell("num", "hosts", _hosts(poller, choice), text),
    ]
    return row(cells)


def _age(poller: PollerStatus, text: Texts) -> str:
    if poller.age is None:
        return f'<span class="quiet">{text["never"]}</span>'
    return moment(poller.last_success, text["ago"].format(duration(poller.age, text)))


def _why(poller: PollerStatus, text: Texts) -> str:
    if not poller.reason:
        return f'<td class="why none"><span class="quiet">{text["unknown"]}</span></td>'
    meaning = text.get(f"reason.{poller.reason}", "")
    message = log.redact(poller.message)
    message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"
    sub = f'<span class="sub">{clean(message)}</span>' if message else ""
    return cell("why", "reason", f"{meaning} <code>{clean(poller.reason)}</code>{sub}", text)


def _next(poller: PollerStatus, text: Texts) -> str:
    every = text["every"].format(duration(poller.interval, text))
    below = f'<span class="sub">{every}</span>' if poller.interval else ""
    if poller.next_poll is None:
        return text["unknown"] + below
    return (text["in"].format(duration(poller.next_poll, text)) if poller.next_poll >= 1 else text["now"]) + below


def _hosts(poller: PollerStatus, choice: Choice) -> str:
    if not poller.failing_hosts:
        return f'<span class="quiet">{choice.text["unknown"] if poller.failing_hosts is None else 0}</span>'
    query = {"bk_scope_type": poller.bk_scope_type, "bk_scope_id": poller.bk_scope_id, "collector": poller.collector}
    return f'<span class="hot">{anchor(choice.address("/failures", query), f"{poller.failing_hosts:,}")}</span>'
