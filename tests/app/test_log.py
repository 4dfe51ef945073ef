"""One event is one line, whatever stands in it; secrets and floods do not get through."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from exporter import log
from exporter.config.secret import Secret

CANARY = 'c4n4ry/"S3cret'
FORMATS: tuple[log.Format, ...] = get_args(log.Format)


class Clock:
    """A monotonic clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def output(clock: Clock) -> Iterator[Callable[..., io.StringIO]]:
    """Sets up logging into a buffer; undone at the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def configure(format: log.Format = "logfmt", level: log.Level = "info") -> io.StringIO:
        stream = io.StringIO()
        log.configure(level, format, stream=stream, monotonic=clock)
        return stream

    yield configure
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.mark.parametrize("format", FORMATS)
def test_F28_a_hostile_name_stays_on_its_line(output: Callable[..., io.StringIO], format: log.Format) -> None:
    """Line breaks of all kinds, ANSI, bidi marks and lone surrogates come out escaped, Chinese as it is."""
    stream = output(format)
    log.get().warning(
        "poll_failed", message="夜间\x1b[2J\r\nlevel=error event=fake\u2028\u2029\x85\u202e\ud800\x00", scope="biz/2"
    )
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    assert text.endswith("\n")
    assert "夜间" in text
    assert not set(text[:-1]) & set("\x1b\r\n\u2028\u2029\x85\u202e\ud800\x00")
    assert "\\u202e" in text
    text.encode()


@pytest.mark.parametrize("format", FORMATS)
@given(text=st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_F28_any_text_is_one_printable_line(format: log.Format, text: str) -> None:
    """No text at all can make a second line or fail to be written."""
    stream = io.StringIO()
    log.configure("info", format, stream=stream)
    try:
        log.get().info("an_event", value=text, error=ValueError(text))
    finally:
        structlog.reset_defaults()
    line = stream.getvalue()
    assert len(line.splitlines()) == 1
    line.encode()
    if format == "json":
        assert json.loads(line)["event"] == "an_event"


@pytest.mark.parametrize("format", FORMATS)
def test_F27_secrets_are_hidden_by_type_and_by_value(output: Callable[..., io.StringIO], format: log.Format) -> None:
    """A Secret prints as ***; its value is found in texts, URLs, JSON, exceptions and tracebacks of others."""
    log.redact_values([CANARY])
    stream = output(format)
    logger = log.get()
    logger.info("by_type", secret=Secret(CANARY), nested={"token": Secret(CANARY)})
    logger.info(
        "by_value", text=f"token {CANARY}!", url="https://x/?t=c4n4ry%2F%22S3cret", body=json.dumps({"t": CANARY})
    )
    try:
        raise ValueError(f"refused {CANARY}")
    except ValueError as error:
        logger.exception("in_traceback", error=error)
        logging.getLogger("aiohttp.server").exception("handler failed with %s", CANARY)
    text = stream.getvalue()
    assert len(text.splitlines()) == 4
    assert "S3cret" not in text
    assert text.count("***") >= 8
    assert "ValueError" in text


def test_F27_redaction_comes_before_cutting() -> None:
    """A secret across the place where a long text is cut is gone too, and short values are not chased."""
    log.redact_values([CANARY, "abc"])
    assert log.redact("x" * 10 + CANARY)[:14] == "x" * 10 + "***"
    assert log.redact("abc") == "abc"


def test_F29_a_flood_is_one_line_and_a_count(output: Callable[..., io.StringIO], clock: Clock) -> None:
    """The first is written at once, then one a minute with how many were held back; other scopes are not affected."""
    stream = output("json")
    for number in range(1000):
        log.get().warning("poll_failed", scope="biz/2", reason="timeout", message=f"try {number}")
    log.get().warning("poll_failed", scope="biz/3", reason="timeout")
    clock.now += 59
    log.get().warning("poll_failed", scope="biz/2", reason="timeout")
    clock.now += 1
    log.get().warning("poll_failed", scope="biz/2", reason="timeout")
    log.get().warning("poll_failed", scope="biz/2", reason="timeout")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["scope"], line.get("suppressed")) for line in lines] == [
        ("biz/2", None),
        ("biz/3", None),
        ("biz/2", 1000),
    ]
    log.flush()
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["event"], last["scope"], last["suppressed"]) == ("poll_failed", "biz/2", 1)
    log.flush()
    assert len(stream.getvalue().splitlines()) == 4


def test_an_answer_is_never_held_back(output: Callable[..., io.StringIO]) -> None:
    """Two reloads within a minute log the errors twice."""
    stream = output("json")
    for _ in range(2):
        log.get().error("reload_failed", always=True)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 2
    assert "always" not in lines[0]


def test_F29_memory_of_a_flood_of_different_errors_is_bounded(clock: Clock) -> None:
    """Ten thousand different errors are remembered up to the size, the newest last."""
    repeats = log.Repeats(clock, size=100)
    for number in range(10_000):
        repeats(None, "error", {"event": "e", "scope": str(number)})
    with pytest.raises(structlog.DropEvent):
        repeats(None, "error", {"event": "e", "scope": "9999"})
    assert repeats(None, "error", {"event": "e", "scope": "0"}) == {"event": "e", "scope": "0"}
    assert len(repeats.flush()) == 1


def test_libraries_and_levels(output: Callable[..., io.StringIO]) -> None:
    """Records of logging take the same way, distinguished by their template; below the level nothing is written."""
    stream = output("json", "warning")
    log.get().info("not_written")
    for number in range(3):
        logging.getLogger("asyncio").warning("slow callback %d", number)
    logging.getLogger("asyncio").info("not written")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["event"] == "library_message"
    assert (line["logger"], line["message"], line["level"]) == ("asyncio", "slow callback 0", "warning")
    assert line["timestamp"].endswith("Z")
    assert "template" not in line


def test_values_that_cannot_be_printed_do_not_lose_the_event(output: Callable[..., io.StringIO]) -> None:
    """A broken __str__ and a huge value leave a line."""

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    stream = output("logfmt")
    log.get().info("odd_values", broken=Broken(), huge="x" * 1_000_000, nothing=None, number=1.5, flag=True)
    assert "broken=" in stream.getvalue()
    assert "number=1.5 flag=true" in stream.getvalue()
    assert len(stream.getvalue()) < 10_000


def test_a_reader_that_went_away_stops_nobody(output: Callable[..., io.StringIO]) -> None:
    """Writing to a closed stderr is no error."""
    output("logfmt").close()
    log.get().error("still_running")


async def test_unhandled_exceptions_of_the_loop_are_events(output: Callable[..., io.StringIO]) -> None:
    """What asyncio would print as a traceback over many lines is one line."""
    stream = output("logfmt")
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log.on_loop_exception)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    assert stream.getvalue().count("\n") == 1
    assert "event=unhandled_exception" in stream.getvalue()
    assert "ZeroDivisionError" in stream.getvalue()


def test_the_last_words_of_the_process_are_an_event(output: Callable[..., io.StringIO]) -> None:
    """The hook for uncaught exceptions writes one line, and nothing for Ctrl-C."""
    stream = output("logfmt")
    try:
        raise KeyError(CANARY)
    except KeyError:
        log.on_exception(*sys.exc_info())
    log.on_exception(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stream.getvalue().count("\n") == 1
    assert "event=unhandled_exception" in stream.getvalue()


def test_threads_do_not_tear_lines(output: Callable[..., io.StringIO]) -> None:
    """Eight threads write whole lines."""
    stream = output("json")

    def write(name: int) -> None:
        for number in range(100):
            log.get().info("from_thread", name=name, number=number)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in stream.getvalue().splitlines()]) == 800
