"""Logging: one event is one line on stderr, whatever BlueKing's texts contain.

Event names are constants in snake_case; everything that varies is a keyword. Every event passes these steps in this
order: repeats are held back, the exception becomes text, secrets become `***`, characters that could break a line or
deceive a terminal are escaped, and one of three renderers writes the line. Records of libraries that use `logging`
become events too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TextIO, cast
from urllib.parse import quote

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Logger = FilteringBoundLogger
Level = Literal["debug", "info", "warning", "error"]
Format = Literal["logfmt", "json", "console"]

REPEAT_PERIOD = 60.0
"""Seconds in which the same warning or error is written at most once."""
REPEAT_FIELDS = ("logger", "template", "collector", "scope", "api", "reason", "field", "address", "file", "error_type")
"""Fields that distinguish two warnings of the same event name. Free text is left out, since it differs each time."""
LONGEST_VALUE = 8192
SHORTEST_SECRET = 6
"""Shorter values are redacted by type only: replacing every `ab` would ruin the log and hide nothing."""

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
_TEMPLATE_LENGTH = 200


def get() -> Logger:
    """The process-wide logger. Usable before `configure`; its settings are looked up at every call."""
    return cast(Logger, structlog.get_logger())


# ---- secrets ---------------------------------------------------------------------------------------------------------


class _Redaction:
    """The values that must not appear in any text: the newest 256, so that rotated secrets are dropped in time."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, None] = OrderedDict()
        self._pattern: re.Pattern[str] | None = None
        self._shortest = sys.maxsize
        self._lock = threading.Lock()

    def add(self, values: Iterable[str]) -> None:
        with self._lock:
            for value in values:
                if len(value) < SHORTEST_SECRET:
                    continue
                # A secret shows up as it is, inside a URL, or inside a JSON text.
                for form in (value, quote(value, safe=""), json.dumps(value)[1:-1]):
                    self._values[form] = None
                    self._values.move_to_end(form)
            while len(self._values) > 256:
                self._values.popitem(last=False)
            longest_first = sorted(self._values, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
            self._shortest = min(map(len, self._values), default=sys.maxsize)

    def redact(self, text: str) -> str:
        """The text without the secrets that were registered. Redact before cutting: half a secret is no match."""
        # Tens of thousands of addresses in one response are shorter than any secret.
        return self._pattern.sub("***", text) if self._pattern and len(text) >= self._shortest else text


_redaction = _Redaction()


def redact_values(values: Iterable[str]) -> None:
    """Replace these secrets by `***` in every line from now on. Values under 6 characters are ignored."""
    _redaction.add(values)


redact = _redaction.redact


def escape(text: str, keep: str = "") -> str:
    r"""The text with controls, ANSI, bidi marks, line separators, lone surrogates as `\x1b`, `\u202e`; `keep` stays."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(char: str) -> str:
    code = ord(char)
    known = {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}.get(code)
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def utc(moment: float | None) -> str | None:
    """A point in time (unix seconds) in the form of the log's own timestamps; as a number if no calendar has it."""
    if moment is None:
        return None
    try:
        return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    except (ValueError, OverflowError, OSError):
        return str(moment)


# ---- processors ------------------------------------------------------------------------------------------------------


class Repeats:
    """Holds back a warning or error that was written less than `REPEAT_PERIOD` ago; the next one says how many.

    An event with `always=True` is never held back: it is the reply to an action of a person. `flush()` returns one
    event for each kind that is still held back, so that the end of a flood is logged too.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, size: int = 1024) -> None:
        self._monotonic = monotonic
        self._size = size
        self._seen: OrderedDict[tuple[str, ...], tuple[float, int, EventDict]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, _: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if event.pop("always", False) or method not in ("warning", "error", "critical", "exception"):
            return event
        key = (str(event.get("event")), *(str(event.get(name, "")) for name in REPEAT_FIELDS))
        now = self._monotonic()
        with self._lock:
            at, held, _first = self._seen.pop(key, (now - REPEAT_PERIOD, 0, event))
            if now - at < REPEAT_PERIOD:
                self._seen[key] = (at, held + 1, _first)
                raise structlog.DropEvent
            slim = {name: event[name] for name in ("event", *REPEAT_FIELDS) if name in event}
            self._seen[key] = (now, 0, slim)
            while len(self._seen) > self._size:
                self._seen.popitem(last=False)
        return {**event, "suppressed": held} if held else event

    def flush(self) -> list[EventDict]:
        with self._lock:
            pending: list[EventDict] = [{**event, "suppressed": held} for _, held, event in self._seen.values() if held]
            for key, (at, _held, event) in list(self._seen.items()):
                self._seen[key] = (at, 0, event)
        return pending


def _clean(keep: str) -> Callable[[WrappedLogger, str, EventDict], EventDict]:
    """Every value a safe text, number, boolean or None. A `Secret` turns itself into `***` when it becomes a text."""

    def clean(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        for name, value in event.items():
            if value is None or isinstance(value, (bool, int, float)):
                continue
            try:
                text = redact(value if isinstance(value, str) else str(value))
            except Exception as error:  # a broken __str__ must not take the line with it
                text = f"<{type(value).__name__}: {type(error).__name__}>"
            event[name] = escape(text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…", keep)
        return event

    return clean


def _order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    # The console renderer prints a key named `exception` raw and over many lines; no other name has a meaning to it.
    if "exception" in event:
        event["traceback"] = event.pop("exception")
    head = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    return {**head, **event}


def _renderer(format: Format, stream: TextIO) -> Processor:
    match format:
        case "json":
            # A stream that is not UTF-8 would escape characters as Python does, which is not JSON.
            utf8 = (stream.encoding or "utf-8").lower().replace("-", "") == "utf8"
            write = partial(json.dumps, ensure_ascii=not utf8, separators=(",", ":"))
            return structlog.processors.JSONRenderer(serializer=lambda event, **_: write(event))
        case "console":
            return structlog.dev.ConsoleRenderer(colors=stream.isatty(), sort_keys=False)
        case "logfmt":
            return structlog.processors.LogfmtRenderer(bool_as_flag=False)


class _Lines:
    """Writes finished lines. If nobody reads stderr any more, lines are lost and polling goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = exception = write


class _FromLogging(logging.Handler):
    """Records of libraries (aiohttp, asyncio) as `library_message` events."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "critical" if record.levelno >= logging.CRITICAL else record.levelname.lower()
            write = getattr(get(), level, get().info)
            template = str(record.msg)[:_TEMPLATE_LENGTH]
            write(
                "library_message",
                logger=record.name,
                template=template,
                message=record.getMessage(),
                exc_info=record.exc_info,
            )
        except Exception:
            self.handleError(record)


def _drop_template(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("template", None)
    return event


# ---- set-up ----------------------------------------------------------------------------------------------------------

_repeats = Repeats()


def configure(
    level: Level = "info",
    format: Format = "logfmt",
    *,
    stream: TextIO | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Set up all logging of the process: structlog and `logging`. The newest call replaces the one before."""
    global _repeats
    _repeats = Repeats(monotonic)
    stream = stream or sys.stderr
    number = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[level]
    structlog.configure(
        processors=[
            _repeats,
            _drop_template,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _order,
            # These renderers escape line feeds themselves, and JSON gives them back when it is read.
            _clean(keep={"json": "\n\t", "logfmt": "\n", "console": ""}[format]),
            _renderer(format, stream),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Lines(stream),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_FromLogging()]
    root.setLevel(max(number, logging.INFO))


def flush() -> None:
    """Write one line for every kind of event that is still held back. Call it before the process ends."""
    for event in _repeats.flush():
        name = event.pop("event")
        get().warning(name, always=True, **event)


def on_loop_exception(_loop: asyncio.AbstractEventLoop, context: MutableMapping[str, Any]) -> None:
    """For `loop.set_exception_handler`: log an exception that no task has caught."""
    error = context.get("exception")
    get().error(
        "unhandled_exception",
        message=context.get("message", ""),
        error_type=type(error).__name__ if error else "",
        exc_info=error,
    )


def on_exception(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """For `sys.excepthook`: log the exception that ends the process, redacted and on one line."""
    if issubclass(kind, KeyboardInterrupt):
        return
    get().error("unhandled_exception", error_type=kind.__name__, exc_info=(kind, error, traceback))
