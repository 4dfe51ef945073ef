"""The client over real sockets: credentials, rate, deadlines, and behaviour on faults of the server."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import gzip
import json
import socket
import struct
import traceback
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from exporter import log
from exporter.blueking.client import MAX_PAUSE, TRIES, Client, Deadline, Identity, Operation
from exporter.blueking.envelope import ResponseDecoder
from exporter.blueking.inflate import read_body
from exporter.blueking.pacing import Call, Gate
from exporter.clock import Clock
from exporter.config.schema import Auth, ScopeAuth
from exporter.config.secret import Secret
from exporter.errors import ApiError
from exporter.model import Scope
from tests.support.upstream import CANARY, EMPTY_PAGE, Recorder, Upstream, client, raw, reply, sends

API = "get_job_instance_list"
SCOPE = Scope("biz", "2")


class Page(Struct):
    job_instance_list: list[object]


DECODERS = [ResponseDecoder(Page, lambda page: len(page.job_instance_list))]


async def ask(
    asking: Client,
    url: str,
    seconds: float = 5.0,
    *,
    method: Any = "GET",
    identity: Identity = "app",
    params: dict[str, object] | None = None,
    scope: Scope = SCOPE,
    auth: ScopeAuth | None = None,
) -> int:
    """One call for a scope: the number of rows."""
    operation = Operation(API, "job", identity, method, url + "/path", params or {})
    return await asking.for_scope(scope, auth).call(operation, DECODERS, deadline=Deadline(seconds, Clock()))


async def refusal(asking: Client, url: str, seconds: float = 5.0, **how: Any) -> ApiError:
    """The error of one call."""
    with pytest.raises(ApiError) as caught:
        await ask(asking, url, seconds, **how)
    assert caught.value.api == API
    return caught.value


# ---- who asks --------------------------------------------------------------------------------------------------------

APP = {"bk_app_code": "exporter", "bk_app_secret": CANARY}


@pytest.mark.parametrize(
    ("changes", "identity", "said", "username"),
    [
        ({}, "app", {**APP, "bk_username": "ops01"}, "ops01"),
        ({}, "user", {**APP, "bk_username": "ops01"}, None),
        ({"bk_token": Secret("login-t0ken")}, "user", {**APP, "bk_token": "login-t0ken"}, None),
        ({"access_token": Secret("acc3ss-token")}, "user", {"access_token": "acc3ss-token"}, None),
        ({"access_token": Secret("acc3ss-token")}, "app", {**APP, "bk_username": "ops01"}, "ops01"),
        ({"bk_token": Secret("login-t0ken")}, "app", {**APP, "bk_username": "ops01"}, "ops01"),
        (
            {"access_token": Secret("acc3ss-token"), "app_code": "", "app_secret": None},
            "esb",
            {"access_token": "acc3ss-token"},
            None,
        ),
    ],
)
async def test_gateway_credentials_stand_in_headers(
    changes: dict[str, Any], identity: Identity, said: dict[str, str], username: str | None
) -> None:
    """App-type resources get app and user in both headers and never a token; to user-type ones a token goes alone."""
    auth = Auth(
        **{"app_code": "exporter", "app_secret": Secret(CANARY), "username": "ops01", "tenant_id": "t1", **changes}
    )
    async with Upstream() as upstream, client(auth=auth) as asking:
        await ask(
            asking,
            upstream.url,
            identity=identity,
            params={"flag": True, "off": False, "none": None, "n": 5, "t": "é&="},
        )
    (asked,) = upstream.asked
    assert json.loads(asked.headers["X-Bkapi-Authorization"]) == said
    assert asked.headers.get("X-Bk-Username") == username
    assert asked.headers["X-Bk-Tenant-Id"] == "t1"
    assert asked.headers["User-Agent"].startswith("blueking-exporter/")
    assert asked.headers["Accept-Encoding"] == "gzip"
    assert "Cookie" not in asked.headers
    if identity != "esb":
        assert asked.query == {"flag": "true", "off": "false", "n": "5", "t": "é&="}


@pytest.mark.parametrize(
    ("changes", "members"),
    [
        ({}, {**APP, "bk_username": "ops01"}),
        ({"bk_token": Secret("login-t0ken")}, {**APP, "bk_token": "login-t0ken"}),
        ({"access_token": Secret("acc3ss-token")}, {**APP, "bk_access_token": "acc3ss-token"}),
    ],
)
async def test_F26_an_esb_gets_its_credentials_in_the_body_too(
    changes: dict[str, Any], members: dict[str, str]
) -> None:
    """The ESB of PaaS v2 drops the header and reads the JSON body of a POST, for a GET the query."""
    auth = Auth(**{"app_code": "exporter", "app_secret": Secret(CANARY), "username": "ops01", **changes})
    async with Upstream() as upstream, client(auth=auth) as asking:
        await ask(asking, upstream.url, method="POST", identity="esb", params={"flag": True, "none": None})
        await ask(asking, upstream.url, method="GET", identity="esb", params={"flag": True})
    post, get = upstream.asked
    assert json.loads(post.body) == {"flag": True, **members}
    assert post.query == {}
    assert get.query == {"flag": "true", **members}
    assert "X-Bkapi-Authorization" in post.headers
    assert "X-Bk-Username" not in post.headers


async def test_secret_files_are_read_again(tmp_path: Path) -> None:
    """A rotated secret is used by the next request."""
    file = tmp_path / "secret"
    file.write_text("first-value\n")
    async with Upstream() as upstream, client(auth=Auth(app_code="a", app_secret=Secret.from_file(file))) as asking:
        await ask(asking, upstream.url)
        file.write_text("second-value\n")
        await ask(asking, upstream.url)
    assert [json.loads(asked.headers["X-Bkapi-Authorization"])["bk_app_secret"] for asked in upstream.asked] == [
        "first-value",
        "second-value",
    ]


# ---- what is told ----------------------------------------------------------------------------------------------------


async def test_requests_quota_and_skew_are_reported_to_the_observer() -> None:
    """Each try is one request with its HTTP status; the quota is taken from good answers too."""
    recorder, clock = Recorder(), Clock(wall=lambda: 1_000_000.0)
    date = format_datetime(datetime.datetime.fromtimestamp(1_003_600, datetime.UTC), usegmt=True)
    good = reply(X_Bkapi_RateLimit_Remaining="3", X_Bkapi_RateLimit_Reset="1", Date=date)
    async with Upstream(reply(b"<html>", 502), good) as upstream, client(recorder, clock) as asking:
        assert await ask(asking, upstream.url) == 0
    assert recorder.requests == [(API, "502"), (API, "200")]
    assert recorder.retries == {API: 1}
    assert recorder.quotas == [(API, 3.0)]
    assert recorder.flying == 0
    assert recorder.most_flying == 1


@pytest.mark.parametrize("hours", [-1, 1])
async def test_F15_the_platforms_clock_is_learned_from_any_answer(hours: int) -> None:
    """An error tells the time as well as a success does."""
    recorder = Recorder()
    clock = Clock(wall=lambda: 1_000_000.0)
    date = format_datetime(datetime.datetime.fromtimestamp(1_000_000 + hours * 3600, datetime.UTC), usegmt=True)
    async with Upstream(reply(b"", 403, Date=date)) as upstream, client(recorder, clock) as asking:
        await refusal(asking, upstream.url)
    assert recorder.skews[-1] == pytest.approx(-hours * 3600, abs=2)
    assert clock.platform() == pytest.approx(1_000_000 + hours * 3600, abs=2)


@pytest.mark.parametrize(
    "date", ["", "yesterday", "Tue, 99 Foo 2026 99:99:99 GMT", "0", "Mon, 01 Jan 99999 00:00:00 GMT"]
)
async def test_F15_a_senseless_date_teaches_nothing(date: str) -> None:
    """Neither does a senseless quota."""
    recorder = Recorder()
    async with (
        raw(sends(_http(EMPTY_PAGE, f"Date: {date}", "X-Bkapi-RateLimit-Remaining: nan"))) as url,
        client(recorder) as asking,
    ):
        assert await ask(asking, url) == 0
    assert (recorder.skews, recorder.quotas) == ([], [])


# ---- secrets ---------------------------------------------------------------------------------------------------------


async def test_F07_redirects_are_not_followed() -> None:
    """Not to another host, a file or itself: the other server never sees a request, let alone the secret."""
    async with Upstream() as other:
        targets = [other.url + "/", "file:///etc/passwd", "/path", "https://127.0.0.1:1/"]
        answers = [reply(b"", status, Location=to) for status in (301, 302, 303, 307, 308) for to in targets]
        async with Upstream(*answers) as upstream, client() as asking:
            for _ in answers:
                assert (await refusal(asking, upstream.url)).reason == "redirect"
            assert len(upstream.asked) == len(answers)
    assert other.asked == []


async def test_F07_a_redirect_to_a_login_page_is_an_auth_failure() -> None:
    """NodeMan without a gateway token answers so."""
    async with Upstream(reply(b"", 302, Location="http://paas.example.com/login/")) as upstream, client() as asking:
        assert (await refusal(asking, upstream.url)).reason == "auth"


async def test_F25_links_in_answers_are_data() -> None:
    """What an answer points to is never requested."""
    async with Upstream() as other:
        body = json.dumps({"data": {"job_instance_list": [other.url]}, "apply_url": other.url, "next": other.url})
        async with (
            Upstream(reply(body, Link=f"<{other.url}>; rel=next", Refresh=f"0; {other.url}")) as upstream,
            client() as asking,
        ):
            await ask(asking, upstream.url)
            assert len(upstream.asked) == 1
        assert other.asked == []


async def test_F25_only_http_is_spoken() -> None:
    """A URL of another scheme is refused without a request."""
    async with client() as asking:
        assert (await refusal(asking, "file:///etc")).reason == "connect"


async def test_F27_the_secret_is_in_no_error_and_no_repr(capsys: pytest.CaptureFixture[str]) -> None:
    """Not when the platform echoes it, when the connection fails, or in the traceback with its causes."""
    log.configure("debug", "json")
    asking = client(proxy_url=None)
    echo = reply(json.dumps({"result": False, "code": 1306000, "message": f"bad secret {CANARY}"}), X_Echo=CANARY)
    texts = [repr(asking), str(vars(asking))]
    async with Upstream(echo, reply(CANARY), reply(b"", 502)) as upstream, asking:
        for identity in ("app", "esb", "esb", "esb"):
            error = await refusal(asking, upstream.url, 1.0, identity=identity)
            texts += ["".join(traceback.format_exception(error)), repr(error), str(error)]
    async with raw(sends(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000 + b"\r\n\r\n")) as url, client() as asking:
        texts.append("".join(traceback.format_exception(await refusal(asking, url, identity="esb"))))
    texts.append(capsys.readouterr().err)
    assert "api_retry" in texts[-1]
    assert "canary" not in "".join(texts)


async def test_F24_proxies_come_from_the_configuration_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxy variables are ignored; a configured proxy gets the request, and its password in a header."""

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_http(EMPTY_PAGE))

    async with Upstream() as upstream, raw(proxy) as url:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        async with client() as asking:
            await ask(asking, upstream.url)
        assert len(upstream.asked) == 1
    async with Upstream() as upstream:
        with_password = upstream.url.replace("http://", "http://user:pr0xy-pass@")
        async with client(proxy_url=Secret(with_password)) as asking:
            await ask(asking, "http://blueking.invalid:81")
    (asked,) = upstream.asked
    assert asked.headers["Host"] == "blueking.invalid:81"
    assert asked.headers["Proxy-Authorization"].startswith("Basic ")


# ---- broken connections ----------------------------------------------------------------------------------------------


def _http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def _reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _resets_after(data: bytes, seen: list[None]) -> Any:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(None)
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.02)
        await _reset(reader, writer)

    return peer


@pytest.mark.parametrize(
    "sent",
    [b"", b"HTTP/1.1 200 OK\r\nContent-", b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"data"'],
    ids=["before", "head", "body"],
)
async def test_F01_a_reset_connection_is_retried(sent: bytes) -> None:
    """RST before, inside and after the headers: reason connect, three tries, and no request besides them."""
    recorder = Recorder()
    seen: list[None] = []
    async with raw(_resets_after(sent, seen)) as url, client(recorder) as asking:
        assert (await refusal(asking, url)).reason == "connect"
    assert len(seen) == TRIES, "aiohttp sends nothing again by itself"
    assert len(recorder.requests) == TRIES
    assert recorder.retries == {API: TRIES - 1}
    assert {code for _, code in recorder.requests} == {"200" if b"\r\n\r\n" in sent else "none"}


async def test_F01_a_refused_connection_is_retried(unused_tcp_port: int) -> None:
    """No server listens: reason connect, no status."""
    recorder = Recorder()
    async with client(recorder) as asking:
        error = await refusal(asking, f"http://127.0.0.1:{unused_tcp_port}")
    assert (error.reason, error.status) == ("connect", None)
    assert recorder.requests == [(API, "none")] * TRIES


async def _black_hole(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def _drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b" " * 10_000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("peer", [_black_hole, _drip])
async def test_F02_the_whole_request_has_a_deadline(peer: Any) -> None:
    """Neither silence nor a byte now and then outlasts request_timeout; others are served meanwhile."""
    loop = asyncio.get_running_loop()
    async with raw(peer) as url, Upstream() as upstream, client(request_timeout=0.4) as asking:
        began = loop.time()
        slow = asyncio.create_task(refusal(asking, url, 0.5))
        await ask(asking, upstream.url)
        assert loop.time() - began < 0.4
        assert (await slow).reason == "timeout"
        assert 0.4 <= loop.time() - began < 2


async def test_F02_the_poll_deadline_cuts_a_request_short() -> None:
    """The remaining time of the poll is less than request_timeout."""
    loop = asyncio.get_running_loop()
    async with raw(_black_hole) as url, client(request_timeout=30.0) as asking:
        began = loop.time()
        assert (await refusal(asking, url, 0.15)).reason == "timeout"
        assert loop.time() - began < 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + EMPTY_PAGE, "connect"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + EMPTY_PAGE, "decode"),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"dat\r\n', "connect"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", "decode"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 30\r\n\r\n" + gzip.compress(EMPTY_PAGE)[:30],
            "decode",
        ),
    ],
    ids=["short", "wrong length", "cut chunk", "broken chunk", "cut gzip"],
)
async def test_F03_half_an_answer_is_none(answer: bytes, reason: str) -> None:
    """A truncated body, a wrong Content-Length or a broken chunk never becomes a page."""
    async with raw(sends(answer)) as url, client() as asking:
        assert (await refusal(asking, url, 0.4)).reason == reason


@pytest.mark.parametrize(
    "answer",
    [
        bytes(range(256)) * 8,
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 9999 ??\r\n\r\n",
        _http(b"<html><title>Login</title></html>", "Content-Type: text/html"),
        _http(b"\x00\xff\xfe random \x80"),
    ],
    ids=["random", "ssh", "huge header", "bad status", "html", "random body"],
)
async def test_F04_what_is_no_answer_is_decode(answer: bytes) -> None:
    """Another protocol, random bytes, a login page under 200: not retried, reported in a short clean text."""
    recorder = Recorder()
    async with raw(sends(answer)) as url, client(recorder) as asking:
        error = await refusal(asking, url)
    assert error.reason == "decode"
    assert len(recorder.requests) == 1
    assert len(str(error)) <= 256
    assert not any(character < " " for character in str(error))


# ---- limits of the body ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(EMPTY_PAGE)),
        ("x-gzip", gzip.compress(EMPTY_PAGE)),
        ("gzip", gzip.compress(EMPTY_PAGE[:9]) + gzip.compress(b"") + gzip.compress(EMPTY_PAGE[9:])),
        ("deflate", zlib.compress(EMPTY_PAGE)),
        ("deflate", zlib.compress(EMPTY_PAGE)[2:-4]),
        ("identity", EMPTY_PAGE),
        ("", EMPTY_PAGE),
    ],
    ids=["gzip", "x-gzip", "members", "deflate", "deflate without header", "identity", "none"],
)
async def test_F05_encodings_that_are_understood(encoding: str, body: bytes) -> None:
    """gzip of any number of members and both kinds of deflate."""
    async with Upstream(reply(body, Content_Encoding=encoding)) as upstream, client() as asking:
        assert await ask(asking, upstream.url) == 0


@pytest.mark.parametrize("encoding", ["gzip, gzip", "deflate, gzip", "br", "zstd", "gzip"])
async def test_F05_other_encodings_are_refused(encoding: str) -> None:
    """Nested and unknown encodings, and what is not encoded as it says."""
    body = EMPTY_PAGE if encoding == "gzip" else gzip.compress(gzip.compress(EMPTY_PAGE))
    async with Upstream(reply(body, Content_Encoding=encoding)) as upstream, client() as asking:
        assert (await refusal(asking, upstream.url)).reason == "decode"


async def test_F05_a_gzip_bomb_is_cut_at_the_limit() -> None:
    """200 KB that become 200 MB: refused, in memory of less than twice the limit, while the loop keeps turning."""
    limit = 4 * 2**20
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async with Upstream(reply(bomb, Content_Encoding="gzip")) as upstream, client(max_response_bytes=limit) as asking:
        ticking = asyncio.create_task(tick())
        tracemalloc.start()
        error = await refusal(asking, upstream.url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        ticking.cancel()
    assert (error.reason, error.status) == ("too_large", 200)
    assert peak < 2 * limit
    assert ticks > limit // 2**20


@pytest.mark.parametrize("body", [b'{"code": 0, "data": "' + b"x" * 2**21, b" " * 2**22], ids=["decode", "too_large"])
async def test_F05_an_error_does_not_keep_its_response(body: bytes) -> None:
    """A poll collects the errors of many calls. That costs no memory, however large the answers were."""
    packed = gzip.compress(body)
    async with (
        Upstream(reply(packed, Content_Encoding="gzip")) as upstream,
        client(max_response_bytes=3 * 2**20) as asking,
    ):
        errors = [await refusal(asking, upstream.url)]
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            errors += [await refusal(asking, upstream.url) for _ in range(3)]
            for _ in range(100):  # the thread that decoded the newest response may not have dropped it yet
                kept, _ = tracemalloc.get_traced_memory()
                if kept < 2**21:
                    break
                await asyncio.sleep(0.05)
        finally:
            tracemalloc.stop()
            gc.enable()
    assert len({error.reason for error in errors}) == 1
    assert kept < 2**21, "not even one body"


async def test_F05_the_limit_holds_for_what_is_received_too() -> None:
    """An announced length is believed, a body without one is counted."""
    async with Upstream(reply(b" " * 2000)) as upstream, client(max_response_bytes=1000) as asking:
        error = await refusal(asking, upstream.url)
    assert error.reason == "too_large"
    assert "announced" in str(error)


async def test_F06_an_endless_body_is_cut() -> None:
    """No length, no end."""

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b" " * 10_000)
            await writer.drain()

    recorder = Recorder()
    async with raw(endless) as url, client(recorder, max_response_bytes=100_000) as asking:
        assert (await refusal(asking, url)).reason == "too_large"
    assert recorder.requests == [(API, "200")]


async def _chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "raw deflate", ""]), st.integers(1, 50))
def test_F50_inflating_does_not_depend_on_how_bytes_arrive(data: bytes, encoding: str, size: int) -> None:
    """Any chunking gives the same body."""
    packer = zlib.compressobj(wbits={"gzip": 31, "deflate": 15, "raw deflate": -15, "": 15}[encoding])
    packed = packer.compress(data) + packer.flush() if encoding else data
    body = asyncio.run(read_body(_chunks(packed, size), encoding.removeprefix("raw "), 1000))
    assert bytes(body) == data


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]), st.integers(1, 50))
def test_F50_any_bytes_inflate_or_fail_cleanly(data: bytes, encoding: str, size: int) -> None:
    """Garbage is an ApiError and nothing else."""
    with contextlib.suppress(ApiError):
        assert len(asyncio.run(read_body(_chunks(data, size), encoding, 1000))) <= 1000


# ---- pace ------------------------------------------------------------------------------------------------------------


def _spacings(times: Iterable[float]) -> list[float]:
    return [after - before for before, after in pairwise(sorted(times))]


async def test_one_budget_paces_all_scopes() -> None:
    """Calls of many pollers leave at the configured rate, without a burst at the start. They leave one by one, as the
    next test shows in virtual time."""
    recorder = Recorder()
    async with Upstream() as upstream, client(recorder, requests_per_second=50) as asking:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(ask(asking, upstream.url) for _ in range(15)))
        took = asyncio.get_running_loop().time() - began
    assert took >= 14 / 50
    assert recorder.waited > 14 * 15 / 2 / 50 * 0.9


@pytest.mark.looptime(noop_cycles=2)
async def test_late_wake_ups_do_not_add_up() -> None:
    """Who finds itself late lets the next one go when it was due: 200 a second stay 200 on a machine that is busy."""
    loop = asyncio.get_running_loop()
    clock = Clock(monotonic=lambda: loop.time() // 0.004 * 0.004 + 1e-6)  # time is seen up to 4 ms late
    gate = Gate(200, 1000, clock, lambda waited: None)
    passed = []

    async def turn() -> None:
        async with gate.turn(Call(API, "job", SCOPE), Deadline(60, clock)):
            passed.append(loop.time())

    await asyncio.gather(*(turn() for _ in range(200)))
    assert passed[-1] - passed[0] == pytest.approx(199 / 200, rel=0.1)
    assert min(_spacings(passed)) >= 0.0025 - 1e-5


async def test_waiting_for_the_budget_does_not_eat_the_deadline() -> None:
    """At a start many pollers queue; none of them may time out in the queue."""
    async with Upstream() as upstream, client(requests_per_second=20) as asking:
        answers = await asyncio.gather(*(ask(asking, upstream.url, 0.4) for _ in range(12)))
    assert answers == [0] * 12


async def test_no_more_than_max_concurrency_are_under_way() -> None:
    """The slots are shared too, and all of them are used."""
    recorder = Recorder()

    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return reply()

    async with Upstream(slow) as upstream, client(recorder, max_concurrency=3) as asking:
        await asyncio.gather(*(ask(asking, upstream.url, 0.5) for _ in range(12)))
    assert recorder.most_flying == 3
    assert recorder.flying == 0


async def test_a_cancelled_call_gives_its_slot_back() -> None:
    """Reload and shutdown cancel polls in the middle of a request."""
    async with raw(_black_hole) as hole, Upstream() as upstream, client(max_concurrency=1) as asking:
        stuck = asyncio.create_task(ask(asking, hole))
        queued = asyncio.create_task(ask(asking, hole))
        await asyncio.sleep(0.05)
        queued.cancel()
        stuck.cancel()
        await asyncio.gather(stuck, queued, return_exceptions=True)
        assert await ask(asking, upstream.url) == 0


async def test_what_is_final_is_not_tried_again() -> None:
    """Permission, not_found, auth and the like: one request."""
    recorder = Recorder()
    async with client(recorder) as asking:
        for status in (400, 401, 403, 404, 302, 204):
            async with Upstream(reply(b"", status)) as upstream:
                await refusal(asking, upstream.url)
                assert len(upstream.asked) == 1
    assert not recorder.retries


async def test_F19_a_retry_that_does_not_fit_is_not_made() -> None:
    """The error comes at once, not at the end of the deadline."""
    loop = asyncio.get_running_loop()
    async with Upstream(reply(b"", 429, Retry_After="30")) as upstream, client() as asking:
        began = loop.time()
        error = await refusal(asking, upstream.url, 5.0)
        assert loop.time() - began < 1
    assert (error.reason, error.retry_after) == ("rate_limited", 30.0)
    assert len(upstream.asked) == 1


def _in(seconds: float) -> str:
    return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "7.5"}, 7.5),
        ({"Retry_After": "-3"}, 0.0),
        ({"Retry_After": "99999999999"}, MAX_PAUSE),
        ({"Retry_After": "1e400"}, None),
        ({"Retry_After": "nan"}, None),
        ({"Retry_After": "soon"}, None),
        ({"Retry_After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry_After": "Fri, 31 Dec 9999 23:59:59 GMT"}, MAX_PAUSE),
        ({"X_Bkapi_RateLimit_Reset": "9"}, 9.0),
        ({"X_Bkapi_RateLimit_Reset": "9", "Retry_After": "4"}, 4.0),
        ({}, None),
    ],
)
async def test_F19_the_asked_wait_is_understood_and_capped(headers: dict[str, str], expected: float | None) -> None:
    """Seconds, a date, the gateway's own header, and nonsense."""
    async with Upstream(reply(b"", 429, **headers)) as upstream, client() as asking:
        assert (await refusal(asking, upstream.url, 0.5)).retry_after == expected
    async with Upstream(reply(b"", 429, Retry_After=_in(20), Date=_in(0))) as upstream, client() as asking:
        assert (await refusal(asking, upstream.url, 0.5)).retry_after == pytest.approx(20, abs=2)


async def test_F19_a_503_that_asks_to_wait_is_obeyed() -> None:
    """Retry-After counts with any 5xx; the gateway's reset header, which comes with every answer, does not."""
    loop = asyncio.get_running_loop()
    async with Upstream(reply(b"", 503, Retry_After="0.3"), reply()) as upstream, client() as asking:
        began = loop.time()
        assert await ask(asking, upstream.url) == 0
        assert loop.time() - began >= 0.3
    async with Upstream(reply(b"", 503, X_Bkapi_RateLimit_Reset="60"), reply()) as upstream, client() as asking:
        assert await ask(asking, upstream.url) == 0


async def test_F19_a_429_slows_down_every_scope() -> None:
    """The platform counts by application: a limit that one call of an API meets holds for all its calls."""
    loop = asyncio.get_running_loop()
    async with Upstream(reply(b"", 429, Retry_After="0.4"), reply()) as upstream, client() as asking:
        first = asyncio.create_task(ask(asking, upstream.url))
        await asyncio.sleep(0.1)
        assert len(upstream.asked) == 1
        limited = loop.time()
        await asyncio.gather(first, *(ask(asking, upstream.url) for _ in range(3)))
        assert min(asked.at for asked in upstream.asked[1:]) >= limited + 0.25


async def test_F19_during_a_pause_a_short_poll_gives_up_at_once() -> None:
    """Time spent in a pause does count: a poll that cannot outlast it says rate_limited without a request."""
    recorder = Recorder()
    async with Upstream(reply(b"", 429, Retry_After="30"), reply()) as upstream, client(recorder) as asking:
        await refusal(asking, upstream.url, 0.5)
        error = await refusal(asking, upstream.url, 5.0)
    assert (error.reason, error.status) == ("rate_limited", None)
    assert error.retry_after == pytest.approx(30, abs=3)
    assert len(upstream.asked) == len(recorder.requests) == 1


async def test_F60_silent_scopes_hold_a_quarter_of_the_connections() -> None:
    """On real sockets: once they have timed out, eight of forty scopes hold two of eight connections, and every call of
    the others is answered."""
    flying: Counter[str] = Counter()
    most = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal most
        scope = request.query["scope"]
        if int(scope) < 8:
            flying[scope] += 1
            most = max(most, flying.total())
            try:
                await asyncio.sleep(60)
            finally:
                flying[scope] -= 1
        return reply()

    async def call(asking: Client, url: str, scope: int) -> int:
        return await ask(asking, url, params={"scope": scope}, scope=Scope("biz", str(scope)))

    async with Upstream(answer) as upstream, client(request_timeout=0.3) as asking:
        silent = [asyncio.create_task(call(asking, upstream.url, scope)) for scope in range(8)]
        await asyncio.gather(*silent, return_exceptions=True)
        most = 0
        silent = [asyncio.create_task(call(asking, upstream.url, scope)) for scope in range(8) for _ in range(2)]
        for _ in range(5):
            assert await asyncio.gather(*(call(asking, upstream.url, scope) for scope in range(8, 40))) == [0] * 32
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
    assert 1 <= most <= 4, "the server sees a little later that a request was given up"


async def test_F59_one_busy_scope_costs_the_others_nothing() -> None:
    """On real sockets: while it is left alone for two seconds, nine others make all of their calls."""
    loop = asyncio.get_running_loop()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return reply(b"", 503, Retry_After="2") if request.query["scope"] == "9" else reply()

    async with Upstream(answer) as upstream, client() as asking:

        async def calls(scope: int, count: int) -> None:
            for _ in range(count):
                with contextlib.suppress(ApiError):
                    await ask(asking, upstream.url, params={"scope": scope}, scope=Scope("biz", str(scope)))

        busy = asyncio.create_task(calls(9, 2))
        began = loop.time()
        while loop.time() < began + 2.5:
            await asyncio.gather(*(calls(scope, 5) for scope in range(9)))
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
    times = {
        str(scope): [asked.at for asked in upstream.asked if asked.query["scope"] == str(scope)] for scope in range(10)
    }
    assert min(_spacings(times["9"])) > 1.9
    during = [at for scope in range(9) for at in times[str(scope)] if times["9"][0] < at < times["9"][1]]
    assert len(during) >= 45


async def test_F21_tries_end_with_the_deadline() -> None:
    """Many quick failures are at most three requests."""
    recorder = Recorder()
    async with Upstream(reply(b"", 500)) as upstream, client(recorder) as asking:
        error = await refusal(asking, upstream.url, 30.0)
    assert (error.reason, error.status) == ("http_5xx", 500)
    assert len(upstream.asked) == len(recorder.requests) == TRIES


async def test_no_time_for_another_try_does_not_hide_what_the_platform_said() -> None:
    """The deadline passes during the second try: the reason is that of the answer, not a timeout."""

    async def silent(_: object) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response()

    recorder = Recorder()
    async with Upstream(reply(b"", 502), silent) as upstream, client(recorder) as asking:
        assert (await refusal(asking, upstream.url, 1.2)).reason == "http_5xx"
    assert [code for _, code in recorder.requests] == ["502", "none"]
