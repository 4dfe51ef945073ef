"""GET /failures: which hosts fail, why, since when and how often, and which executions failed, with their pages."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import get_args

import msgspec
from aiohttp.web_request import BaseRequest

from exporter.blueking.steps import STEP_NAMES
from exporter.collectors import COLLECTORS
from exporter.model import HOST_CODES, ScopeType
from exporter.status import FailingExecution, FailingHost, FailureFilter, FailureReason, Failures
from exporter.web.api import FindFailures
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
    with_query,
)
from exporter.web.pages.texts import Texts
from exporter.web.query import LONGEST_TEXT, failure_filter, page_number, parameters
from exporter.web.reply import Reply

ROWS = 200
"""Hosts, and executions, of one page."""
MOST_REASONS = 8
_FILTERS = FailureFilter.__struct_fields__
_HOST_CODES = {str(code): known for code, known in HOST_CODES.items()}
_HOST_COLUMNS = ("host", "scope", "collector", "why", "since", "consecutive", "newest")
_EXECUTION_COLUMNS = ("execution", "scope", "collector", "status", "ended", "newest")


class View(msgspec.Struct, frozen=True):
    """What is shown. `number`: the page, from 1; `now`: unix seconds."""

    found: Failures
    wanted: FailureFilter
    number: int
    choice: Choice
    now: float

    @property
    def text(self) -> Texts:
        return self.choice.text

    def link(self, number: int = 1, **changes: str) -> str:
        """The address of a page of the list, with some filters changed."""
        query = msgspec.structs.asdict(self.wanted) | changes
        return self.choice.address("/failures", query | {"page": number if number > 1 else ""})


async def failures(request: BaseRequest, find: FindFailures) -> Reply:
    """The page in the language that the browser prefers. Raises QueryError."""
    values = parameters(request, (*_FILTERS, "page", "lang"))
    wanted, number, choice = failure_filter(values), page_number(values["page"]), choose(request)
    view = View(await find(wanted), wanted, number, choice, time.time())
    return reply(await asyncio.to_thread(page, view), choice)


def page(view: View) -> str:
    """The whole document. A page after the last one is the last one."""
    text, found = view.text, view.found
    last = max(1, math.ceil(max(len(found.hosts), len(found.executions)) / ROWS))
    view = msgspec.structs.replace(view, number=min(view.number, last))
    begin = (view.number - 1) * ROWS
    hosts, executions = found.hosts[begin : begin + ROWS], found.executions[begin : begin + ROWS]
    content = [
        _form(view),
        _reasons(view),
        "" if found.visible else f'<p class="note">{text["failures.invisible"]}</p>',
        _note("failures.unread", found.unread, text),
        _note("failures.untracked", found.untracked, text),
        _section("hosts", len(found.hosts), _HOST_COLUMNS, [_host(one, view) for one in hosts], view),
        _section(
            "executions", len(found.executions), _EXECUTION_COLUMNS, [_execution(one, view) for one in executions], view
        ),
        _pager(last, view),
    ]
    scope = {"bk_scope_type": view.wanted.bk_scope_type, "bk_scope_id": view.wanted.bk_scope_id}
    links = (
        (view.choice.address("/"), text["link.home"]),
        (with_query("/api/v1/failures", scope), text["link.failures_json"]),
    )
    frame = Frame(
        choice=view.choice,
        title=f"({len(found.hosts):,}) {text['failures.title']} · {text['title']}",
        heading=text["failures.title"],
        tagline=text["failures.tagline"],
        path="/failures",
        query=msgspec.structs.asdict(view.wanted) | {"page": view.number if view.number > 1 else ""},
        links=links,
    )
    return framed(frame, "\n".join(filter(None, content)))


def _note(key: str, count: int, text: Texts) -> str:
    return f'<p class="note">{text[key].format(f"{count:,}")}</p>' if count else ""


# ---- filter ----------------------------------------------------------------------------------------------------------


def _form(view: View) -> str:
    text, wanted = view.text, view.wanted
    collectors = [collector.name for collector in COLLECTORS]
    fields = [
        _select("bk_scope_type", get_args(ScopeType), wanted.bk_scope_type, text),
        _input("bk_scope_id", wanted.bk_scope_id, text, inputmode="numeric"),
        _select("collector", collectors, wanted.collector, text),
        _input("code", wanted.code, text),
        _input("text", wanted.text, text, placeholder=text["filter.hint"]),
    ]
    language = f'<input type="hidden" name="lang" value="{view.choice.asked}">' if view.choice.asked else ""
    clear = anchor(view.choice.address("/failures"), text["filter.clear"]) if wanted != FailureFilter() else ""
    button = f'<button type="submit">{text["filter.apply"]}</button>'
    return f'<form class="filter" action="/failures">{"".join(fields)}{language}<div>{button}{clear}</div></form>'


def _select(name: str, values: Sequence[str], chosen: str, text: Texts) -> str:
    # A value that is not offered, from a link, is kept.
    values = values if chosen in ("", *values) else (*values, chosen)
    options = [("", text["filter.any"]), *((value, value) for value in values)]
    shown = "".join(
        f'<option value="{clean(value)}"{" selected" if value == chosen else ""}>{clean(words)}</option>'
        for value, words in options
    )
    return f'<label>{text[f"filter.{name}"]}<select name="{name}">{shown}</select></label>'


def _input(name: str, value: str, text: Texts, **attributes: str) -> str:
    more = "".join(f' {key}="{clean(words)}"' for key, words in attributes.items())
    field = f'<input name="{name}" value="{clean(value)}" maxlength="{LONGEST_TEXT}" autocomplete="off"{more}>'
    return f"<label>{text[f'filter.{name}']}{field}</label>"


def _reasons(view: View) -> str:
    """The most frequent reasons, each a link to its hosts."""
    if len(view.found.reasons) < 2:
        return ""
    chips = []
    for reason, count in view.found.reasons[:MOST_REASONS]:
        link = view.link(collector=reason.collector, code=reason.code or reason.reason)
        chips.append(f"<li>{anchor(link, f'{_words(reason, view)} <b>{count:,}</b>')}</li>")
    return f'<ul class="chips" aria-label="{view.text["failures.reasons"]}">{"".join(chips)}</ul>'


def _pager(last: int, view: View) -> str:
    if last == 1:
        return ""
    text, number = view.text, view.number
    back = anchor(view.link(number - 1), f"← {text['failures.previous']}") if number > 1 else "<span></span>"
    on = anchor(view.link(number + 1), f"{text['failures.next']} →") if number < last else "<span></span>"
    place = text["failures.page"].format(f"{number:,}", f"{last:,}")
    return f'<div class="pager">{back}<span>{place}</span>{on}</div>'


# ---- tables ----------------------------------------------------------------------------------------------------------


def _section(name: str, total: int, columns: Sequence[str], rows: Sequence[str], view: View) -> str:
    """A heading and the rows of this page; nothing when the list ended on a page before."""
    text = view.text
    if not total:
        nothing = text[_nothing(name, view)]
        return f'<h2>{text[f"failures.{name}"]}</h2>\n<div class="box"><p class="empty">{nothing}</p></div>'
    if not rows:
        return ""
    begin = (view.number - 1) * ROWS
    shown = text["failures.rows"].format(f"{begin + 1:,}", f"{begin + len(rows):,}", f"{total:,}")
    content = table(columns, "consecutive", rows, text, "failures")
    return f'<h2>{text[f"failures.{name}"]}<small>{shown}</small></h2>\n<div class="box">{content}</div>'


def _nothing(name: str, view: View) -> str:
    if not view.found.visible or view.found.unread:
        return "failures.none_known"  # what is not known is not said to be none
    return "failures.no_match" if view.wanted != FailureFilter() else f"failures.no_{name}"


def _host(host: FailingHost, view: View) -> str:
    text = view.text
    names = [text["host.id"].format(clean(host.bk_host_id))] if host.bk_host_id else []
    names.append(text["host.cloud"].format(clean(host.bk_cloud_id)))
    why = _words(FailureReason(host.collector, host.code, host.reason), view)
    since = moment(host.since, duration(view.now - host.since, text))
    cells = [
        f'<td class="host"><b>{clean(host.ip or host.bk_host_id)}</b><span class="sub">{" · ".join(names)}</span></td>',
        _scope(host, view),
        collector_cell(host.collector),
        cell("why", "why", why, text),
        cell("nowrap", "since", since, text),
        cell("num", "consecutive", f"{host.consecutive:,}", text),
        _newest(host, text),
    ]
    return row(cells)


def _execution(execution: FailingExecution, view: View) -> str:
    text, end = view.text, execution.end_time
    status = text.get(f"status.{execution.status}", execution.status)
    words = text["unknown"] if end is None else moment(end, text["ago"].format(duration(view.now - end, text)))
    cells = [
        f'<td class="host"><b>{clean(execution.name) or text["unknown"]}</b></td>',
        _scope(execution, view),
        collector_cell(execution.collector),
        cell("why", "status", _labelled(status, execution.status), text),
        cell("nowrap", "ended", words, text),
        _newest(execution, text),
    ]
    return row(cells)


def _scope(failure: FailingHost | FailingExecution, view: View) -> str:
    scope_type, scope_id = failure.bk_scope_type, failure.bk_scope_id
    name = view.found.names.get((scope_type, scope_id), "")
    return scope_cell(name, scope_type, scope_id, view.link(bk_scope_type=scope_type, bk_scope_id=scope_id))


def _newest(failure: FailingHost | FailingExecution, text: Texts) -> str:
    id, url = failure.run_id, failure.url
    shown = text["unknown"] if id is None else anchor(url, str(id)) if url else clean(str(id))
    return cell("nowrap", "newest", shown, text)


def _words(reason: FailureReason, view: View) -> str:
    """A reason in words, with its code and label."""
    chinese = view.choice.language == "zh"
    code, label = reason.code, reason.reason
    if known := _HOST_CODES.get(code) if reason.collector == "job" else None:
        words = known.text_zh if chinese else label.replace("_", " ")
    elif label in STEP_NAMES:
        words = STEP_NAMES[label][chinese]
    else:
        words = view.text.get(f"step.{label}", label.replace("_", " "))
    return _labelled(words, code, label)


def _labelled(words: str, *labels: str) -> str:
    """Words, and the labels on /metrics that do not say the same."""
    shown = " ".join(label for label in labels if label and label.replace("_", " ") != words)
    return clean(words) + (f" <code>{clean(shown)}</code>" if shown else "")
