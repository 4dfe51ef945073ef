"""What all pages share: language, the frame around the content, and small pieces of HTML."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from urllib.parse import quote, urlencode

import msgspec
from aiohttp.web_request import BaseRequest

from exporter import __version__, log
from exporter.web.pages.texts import TEXTS, Language, Texts
from exporter.web.reply import NO_STORE, Reply, whole

_LANGUAGES: dict[str, Language] = {"en": "en", "zh": "zh"}
_NAMES: dict[Language, str] = {"en": "English", "zh": "中文"}

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40" viewBox="0 0 40 40" aria-hidden="true">'
    '<rect width="40" height="40" rx="10" fill="#2f6bff"/>'
    '<path d="M8 24h6l3.5-11L23 29l3.5-9H32" fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round" '
    'stroke-linejoin="round"/></svg>'
)


# ---- language --------------------------------------------------------------------------------------------------------


class Choice(msgspec.Struct, frozen=True):
    """The language of a page. `asked`: the value of `?lang=`, which its links pass on; "" when the browser decides."""

    language: Language
    asked: str = ""

    @property
    def text(self) -> Texts:
        return TEXTS[self.language]

    def address(self, path: str, query: Mapping[str, object] | None = None) -> str:
        """The path with the parameters that are not empty, and with the language that was asked for."""
        return with_query(path, {**(query or {}), "lang": self.asked})


def with_query(path: str, query: Mapping[str, object]) -> str:
    """The path with the parameters that are not empty."""
    given = {name: value for name, value in query.items() if value != ""}
    return f"{path}?{urlencode(given)}" if given else path


def choose(request: BaseRequest) -> Choice:
    """The language of `?lang=`, else of Accept-Language, else English."""
    asked = _LANGUAGES.get(request.query.get("lang", ""))
    if asked:
        return Choice(asked, asked)
    return Choice(preferred(request.headers.get("Accept-Language", "")))


def preferred(accept_language: str) -> Language:
    """The language with the higher quality; English when both are equal or the header makes no sense."""
    best: dict[str, float] = {"en": 0.0, "zh": 0.0}
    for element in accept_language[:1000].split(","):
        name, _, weight = element.strip().lower().partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        language = name.strip().partition("-")[0]
        if language in best and 0 <= quality <= 1:
            best[language] = max(best[language], quality)
    return "zh" if best["zh"] > best["en"] else "en"


# ---- document --------------------------------------------------------------------------------------------------------


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What surrounds the content of a page. `path` and `query`: its own address; `links`: (address, text) of the last
    line; `refresh`: seconds until the browser loads it again, 0 for never."""

    choice: Choice
    title: str
    heading: str
    tagline: str
    path: str
    query: Mapping[str, object] = {}
    links: Sequence[tuple[str, str]] = ()
    refresh: int = 0


def reply(document: str, choice: Choice) -> Reply:
    """The document with the headers of a page."""
    headers = {
        **NO_STORE,
        "Content-Security-Policy": _POLICY,
        "Content-Language": choice.text["html_lang"],
        "Vary": "Accept-Language",
    }
    return whole(200, "text/html; charset=utf-8", document.encode(), headers)


def framed(frame: Frame, content: str) -> str:
    """The whole document around `content`, which is HTML."""
    text = frame.choice.text
    nav = "".join(f"{anchor(address, name)}\n" for address, name in frame.links)
    refresh = f'<meta http-equiv="refresh" content="{frame.refresh}">\n' if frame.refresh else ""
    footer = f"<footer>{text['refresh'].format(frame.refresh)}</footer>\n" if frame.refresh else ""
    return f"""<!doctype html>
<html lang="{text["html_lang"]}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
{refresh}<meta name="robots" content="noindex">
<title>{escape(frame.title)}</title>
<link rel="icon" href="data:image/svg+xml,{quote(_ICON)}">
<style>{_STYLE}</style>
</head>
<body>
<div class="page">
<header>
{anchor(frame.choice.address("/"), _ICON)}
<div class="grow"><h1>{frame.heading}<small>blueking-exporter {__version__}</small></h1>
<p class="tagline">{frame.tagline}</p></div>
<div class="lang">{"".join(_switch(language, frame) for language in _NAMES)}</div>
</header>
<main>
{content}
</main>
<nav>
{nav}</nav>
{footer}</div>
</body>
</html>
"""


def _switch(language: Language, frame: Frame) -> str:
    tag = TEXTS[language]["html_lang"]
    if language == frame.choice.language:
        return f'<span lang="{tag}" aria-current="true">{_NAMES[language]}</span>'
    link = escape(Choice(language, language).address(frame.path, frame.query))
    return f'<a href="{link}" lang="{tag}" hreflang="{tag}">{_NAMES[language]}</a>'


# ---- pieces ----------------------------------------------------------------------------------------------------------


def anchor(address: str, content: str) -> str:
    """A link; `content` is HTML."""
    external = "" if address.startswith("/") else ' rel="noreferrer"'
    return f'<a href="{escape(address)}"{external}>{content}</a>'


def clean(value: str) -> str:
    """Text from outside as HTML: secrets redacted, control and bidirectional characters made visible, escaped."""
    return escape(log.escape(log.redact(value)))


def table(columns: Sequence[str], numbers: str, rows: Sequence[str], text: Texts, kind: str = "") -> str:
    """A table with the headings of these columns, of which `numbers` holds numbers."""

    def heading(column: str) -> str:
        align = ' class="num"' if column == numbers else ""
        return f'<th scope="col"{align}>{text[f"col.{column}"]}</th>'

    head = "".join(map(heading, columns))
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def cell(kind: str, column: str, content: str, text: Texts) -> str:
    """A cell that repeats the heading of its column, which a narrow screen does not show."""
    return f'<td class="{kind}" data-label="{text[f"col.{column}"]}">{content}</td>'


def scope_cell(name: str, scope_type: str, scope_id: str, address: str = "") -> str:
    """The name of a scope, with type and id below; without a name type and id. A link where there is an address."""
    id = f"{clean(scope_type)}/<wbr>{clean(scope_id)}"
    title = clean(name) if name else id
    below = f'<span class="sub">{id}</span>' if name else ""
    return f'<td class="scope"><b>{anchor(address, title) if address else title}</b>{below}</td>'


def collector_cell(name: str) -> str:
    """The name of a collector, which may wrap after an underscore."""
    return f'<td class="collector"><code>{clean(name).replace("_", "_<wbr>")}</code></td>'


def duration(seconds: float, text: Texts) -> str:
    """The largest unit, from an hour on the two largest: 45 s, 3 min, 2 h 5 min, 3 d 4 h."""
    left = max(0, int(seconds))
    parts = ((left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "m"), (left % 60, "s"))
    shown = [f"{number} {text[f'unit.{unit}']}" for number, unit in parts if number]
    return " ".join(shown[: 1 if left < 3600 else 2]) or f"0 {text['unit.s']}"


def moment(at: float | None, words: str) -> str:
    """`words` about a point in time (unix seconds), which a pointer shows."""
    try:
        written = "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        written = ""
    return f'<time datetime="{written}" title="{written}">{words}</time>' if written else words
