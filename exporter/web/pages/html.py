"""What all pages share: language, the frame around the content, and small pieces of HTML."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

from aiohttp.web_request import BaseRequest

from exporter import log
from exporter.web.pages.texts import TEXTS, Language, Texts
from exporter.web.reply import NO_STORE, Reply, whole

_LANGUAGES: dict[str, Language] = {"en": "en", "zh": "zh"}
_NAMES: dict[Language, str] = {"en": "English", "zh": "中文"}

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40" viewBox="0 0 40 40" aria-hidden="true">'
    '<rect width="40" height="40" rx="10" fill="#2f6bff"/>'
    '<path d="M8 24h6l3.5-11L23 29l3.5-9H32" fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round" '
    'stroke-linejoin="round"/></svg>'
)


def language_of(request: BaseRequest) -> Language:
    """The language of `?lang=`, else of Accept-Language, else English."""
    return _LANGUAGES.get(request.query.get("lang", "")) or preferred(request.headers.get("Accept-Language", ""))


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


def reply(document: str, language: Language) -> Reply:
    """The document with the headers of a page."""
    headers = {
        **NO_STORE,
        "Content-Security-Policy": _POLICY,
        "Content-Language": TEXTS[language]["html_lang"],
        "Vary": "Accept-Language",
    }
    return whole(200, "text/html; charset=utf-8", document.encode(), headers)


def frame(language: Language, title: str, version: str, content: str, links: Iterable[tuple[str, str]]) -> str:
    """The whole document around `content`, which is HTML. `links`: (address, text) of the last line."""
    text = TEXTS[language]
    nav = "".join(f'<a href="{escape(address)}"{_external(address)}>{escape(name)}</a>\n' for address, name in links)
    return f"""<!doctype html>
<html lang="{text["html_lang"]}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="refresh" content="30">
<meta name="robots" content="noindex">
<title>{escape(title)}</title>
<link rel="icon" href="data:image/svg+xml,{quote(_ICON)}">
<style>{_STYLE}</style>
</head>
<body>
<div class="page">
<header>
{_ICON}
<div class="grow"><h1>{text["title"]}<small>blueking-exporter {clean(version)}</small></h1>
<p class="tagline">{text["tagline"]}</p></div>
<div class="lang">{"".join(_switch(one, language) for one in _NAMES)}</div>
</header>
<main>
{content}
</main>
<nav>
{nav}</nav>
<footer>{text["refresh"]}</footer>
</div>
</body>
</html>
"""


def _external(address: str) -> str:
    return "" if address.startswith("/") else ' rel="noreferrer"'


def _switch(language: Language, current: Language) -> str:
    tag = TEXTS[language]["html_lang"]
    if language == current:
        return f'<span lang="{tag}" aria-current="true">{_NAMES[language]}</span>'
    return f'<a href="?lang={language}" lang="{tag}" hreflang="{tag}">{_NAMES[language]}</a>'


def clean(value: str) -> str:
    """Text from outside as HTML: secrets redacted, control and bidirectional characters made visible, escaped."""
    return escape(log.escape(log.redact(value)))


def duration(seconds: float, text: Texts) -> str:
    """The largest unit, from an hour on the two largest: 45 s, 3 min, 2 h 5 min, 3 d 4 h."""
    left = max(0, int(seconds))
    parts = ((left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "m"), (left % 60, "s"))
    shown = [f"{number} {text[f'unit.{unit}']}" for number, unit in parts if number]
    return " ".join(shown[: 1 if left < 3600 else 2]) or f"0 {text['unit.s']}"


def ago(age: float, moment: float | None, text: Texts) -> str:
    """How long ago `moment` (unix seconds) was, with the moment itself as title."""
    words = text["ago"].format(duration(age, text))
    try:
        written = datetime.fromtimestamp(moment or 0.0, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return words
    return words if moment is None else f'<time datetime="{written}" title="{written}">{words}</time>'
