"""The web server from outside: raw bytes on sockets, slow clients and clients that break the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from exporter import log, systemd
from exporter.config import schema
from exporter.errors import ConfigError, ExporterError
from exporter.status import FailingExecution, FailingHost, FailureFilter, Failures, PollerStatus, Status
from exporter.web.connection import Limits
from exporter.web.server import CHECK_CLIENTS, listen
from tests.support.components import eventually
from tests.support.paths import ROOT
from tests.support.web import Running, expose, parsed, resident, running

OPENMETRICS = "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
LINE = (
    b'blueking_job_host_failing_since_timestamp_seconds{bk_scope_type="biz",bk_scope_id="2",ip="10.0.0.1"} 1.78e+09\n'
)
BIG = [LINE * 500 for _ in range(200)]
SIZE = len(LINE) * 500 * 200


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged meanwhile, as JSON lines."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    log.configure("info", "json", stream=stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:], root.level = before


@pytest.fixture
async def server(lines: io.StringIO) -> AsyncIterator[Running]:
    async with running() as run:
        yield run


# ---- what is answered ------------------------------------------------------------------------------------------------


async def test_formats_by_negotiation(server: Running) -> None:
    """Classic text unless OpenMetrics is liked as much, one gzip member when asked, an exact length otherwise."""
    status, headers, body = await server.get("/metrics")
    assert (status, body) == (200, b"up 1\n")
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["content-length"] == "5"
    _, headers, body = await server.get("/metrics", OPENMETRICS)
    assert headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert body == b"up 1\n# EOF\n"
    _, headers, body = await server.get("/metrics", "Accept-Encoding: deflate, gzip;q=0.5")
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(body) == b"up 1\n"
    assert "accept-encoding" in headers["vary"].lower()


async def test_HEAD_has_the_headers_and_no_body(server: Running) -> None:
    """HEAD answers like GET without the body, on every page."""
    for path in ("/metrics", "/", "/failures", "/-/healthy", "/-/ready", "/api/v1/status", "/api/v1/failures"):
        status, headers, body = await server.get(path, method="HEAD")
        assert (status, body) == (200, b"")
        # The size of the failures is known when they have been sent, as that of what is compressed.
        assert int(headers.get("content-length", 0)) > 0 or path == "/api/v1/failures"


async def test_an_HTTP_1_0_client_sees_where_the_body_ends(server: Running) -> None:
    """What has no length ends with the connection, also for one that asked to keep it."""
    for path, header in (("/api/v1/failures", ""), ("/metrics", "Accept-Encoding: gzip\r\n")):
        answer = await server.raw(f"GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n{header}\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200")
        assert body == b'{"executions":[],"hosts":[]}' or gzip.decompress(body)


async def test_names_select_families(server: Running) -> None:
    """name[] reaches the page; an unknown name is an empty page with 200, 101 names are a 400."""
    for query in ("name[]=nothing", "name%5B%5D=nothing"):
        status, _, body = await server.get(f"/metrics?{query}")
        assert (status, body) == (200, b"")
    assert (await server.get("/metrics?" + "&".join(["name[]=a"] * 100)))[0] == 200
    assert (await server.get("/metrics?" + "&".join(["name[]=a"] * 101)))[0] == 400


async def test_methods_and_paths(server: Running) -> None:
    """Pages are for GET and HEAD, the reload for POST; other paths do not exist, whatever the method."""
    for path in ("/metrics", "/", "/failures", "/-/healthy", "/-/ready", "/api/v1/status", "/api/v1/failures"):
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            status, headers, _ = await server.get(path, method=method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")
    for path in ("/metrics/", "/favicon.ico", "/..%2fetc/passwd", "/-/", "/API/v1/status"):
        status, headers, body = await server.get(path)
        assert (status, body) == (404, b"Not Found\n")
        assert headers["content-type"] == "text/plain; charset=utf-8"


async def test_headers_that_protect(server: Running) -> None:
    """No version of the library, no sniffing, no caching of what changes, and no script in HTML."""
    for path in ("/metrics", "/", "/-/ready", "/api/v1/status", "/nothing"):
        _, headers, _ = await server.get(path)
        assert headers["server"] == "blueking-exporter"
        assert headers["x-content-type-options"] == "nosniff"
        if path != "/metrics":
            assert headers["cache-control"] == "no-store"
    _, headers, _ = await server.get("/")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "script" not in policy


async def test_ready_follows_the_daemon(lines: io.StringIO) -> None:
    """200 or 503 by what the daemon says; healthy either way."""
    async with running(ready=lambda: False) as server:
        assert (await server.get("/-/ready"))[0] == 503
        assert (await server.get("/-/healthy"))[0] == 200


async def test_other_telemetry_path(lines: io.StringIO) -> None:
    """The page moves, and the landing page links to where it went."""
    async with running(settings=schema.Server(telemetry_path="/other/metrics")) as server:
        assert (await server.get("/other/metrics"))[2] == b"up 1\n"
        assert (await server.get("/metrics"))[0] == 404
        assert b'href="/other/metrics"' in (await server.get("/"))[2]


async def test_status_and_failures_as_json(lines: io.StringIO) -> None:
    """The API gives what the daemon knows, filtered by scope; secrets of the platform's texts are redacted."""
    log.redact_values(["t0ps3cret-value"])
    watch = PollerStatus(
        collector="job", bk_scope_type="biz", bk_scope_id="2", name="a", state="failing", message="no t0ps3cret-value"
    )
    asked: list[FailureFilter] = []

    async def failures(wanted: FailureFilter) -> Failures:
        asked.append(wanted)
        one = FailingExecution(
            collector="job", bk_scope_type="biz", bk_scope_id="2", status="failed", job_instance_id=7
        )
        host = FailingHost(
            collector="job", bk_scope_type="biz", bk_scope_id="2", bk_cloud_id="0", bk_host_id="3", ip="10.0.0.1",
            code="104", reason="script_nonzero_exit", since=1.0, consecutive=2, job_instance_id=7,
        )  # fmt: skip
        return Failures((one,), (host,))

    status = Status(version="1", started=1.0, uptime=2.0, ready=True, pollers=(watch,))
    async with running(status=lambda: status, failures=failures) as server:
        _, headers, body = await server.get("/api/v1/status")
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert json.loads(body)["watches"][0]["message"] == "no ***"
        document = json.loads((await server.get("/api/v1/failures?bk_scope_type=biz&bk_scope_id=2"))[2])
        assert document["executions"][0]["job_instance_id"] == 7
        assert document["hosts"][0]["consecutive"] == 2
        await server.get("/api/v1/failures?bk_scope_type=&bk_scope_id=")
        assert asked == [FailureFilter("biz", "2"), FailureFilter()]
        for query in (
            "bk_scope_type=planet",
            "bk_scope_id=0",
            "bk_scope_id=2;drop",
            "bk_scope_id=1&bk_scope_id=2",
            "x=1",
            "code=1",
        ):
            assert (await server.get(f"/api/v1/failures?{query}"))[0] == 400
        assert len(asked) == 2


class Hosts(Sequence[FailingHost]):
    """So many hosts; `taken` is the number of the last one that was read."""

    def __init__(self, count: int) -> None:
        self.size = count
        self.taken = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if index >= self.size:
            raise IndexError
        self.taken = index + 1
        return FailingHost(
            collector="job", bk_scope_type="biz", bk_scope_id="2", bk_cloud_id="0", bk_host_id=str(self.taken),
            ip="10.0.0.1", code="104", reason="script_nonzero_exit", since=1.0, consecutive=2,
        )  # fmt: skip


async def test_F72_a_secret_of_digits_leaves_the_JSON_valid(lines: io.StringIO) -> None:
    """Texts that repeat a secret are redacted, numbers that look like it are not, in JSON and on the pages."""
    log.redact_values(["000000", 's3cret"quoted'])
    execution = FailingExecution(
        collector="job", bk_scope_type="biz", bk_scope_id="2", status="failed", name='a s3cret"quoted 000000',
        job_instance_id=20000000001, end_time=1780000000.0,
    )  # fmt: skip
    host = FailingHost(
        collector="job", bk_scope_type="biz", bk_scope_id="2", bk_cloud_id="000000", bk_host_id="3", ip="000000",
        code="104", reason="script_nonzero_exit", since=1780000000.0, consecutive=2, job_instance_id=20000000001,
    )  # fmt: skip

    async def failures(wanted: FailureFilter) -> Failures:
        return Failures((execution,), (host,))

    poller = PollerStatus(
        collector="job", bk_scope_type="biz", bk_scope_id="2", name="a000000", state="ok", last_success=1780000000.0
    )
    status = Status(version="1", started=1780000000.0, uptime=2.0, ready=True, pollers=(poller,))
    async with running(status=lambda: status, failures=failures) as server:
        found = json.loads((await server.get("/api/v1/failures"))[2])
        assert found["executions"][0]["name"] == "a *** ***"
        assert found["executions"][0]["job_instance_id"] == 20000000001
        assert (found["hosts"][0]["ip"], found["hosts"][0]["since"]) == ("***", 1780000000.0)
        (shown,) = json.loads((await server.get("/api/v1/status"))[2])["watches"]
        assert (shown["name"], shown["last_success"]) == ("a***", 1780000000.0)
        for path in ("/", "/failures"):
            page = (await server.get(path))[2].decode()
            assert "***" in page
            assert "s3cret" not in page
            assert ">000000" not in page


@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 25_000])
async def test_a_flood_of_failures_comes_in_pieces(count: int, lines: io.StringIO) -> None:
    """Tens of thousands of failing hosts are one JSON document, read off while it is sent: no more than a few thousand
    rows are ever taken without anything having been sent."""
    hosts = Hosts(count)

    async def failures(wanted: FailureFilter) -> Failures:
        return Failures((), hosts)

    async with running(failures=failures) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /api/v1/failures HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.read(1)
        assert hosts.taken <= min(count, 5000)
        writer.close()
        document = json.loads((await server.get("/api/v1/failures"))[2])
    assert [host["bk_host_id"] for host in document["hosts"]] == [str(number) for number in range(1, count + 1)]
    assert document["executions"] == []


async def test_the_status_of_thousands_of_pollers_comes_in_pieces(lines: io.StringIO) -> None:
    """It is one JSON document, without a length that would need all of it at once."""
    pollers = tuple(
        PollerStatus(collector="job", bk_scope_type="biz", bk_scope_id=str(number), name="a", state="ok")
        for number in range(1, 2502)
    )
    status = Status(version="1", started=1.0, uptime=2.0, ready=True, pollers=pollers)
    async with running(status=lambda: status) as server:
        _, headers, body = await server.get("/api/v1/status")
        assert "content-length" not in headers
        found = json.loads(body)
        assert [poller["bk_scope_id"] for poller in found["watches"]] == [str(number) for number in range(1, 2502)]
        assert (found["version"], found["ready"]) == ("1", True)


async def test_failures_are_found_for_one_request_at_a_time(lines: io.StringIO) -> None:
    """Many requests at once keep one thread busy; when connections run out, the one that waits longest gives way."""
    now, most = 0, 0
    released = asyncio.Event()

    async def failures(wanted: FailureFilter) -> Failures:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            await released.wait()
        finally:
            now -= 1
        return Failures()

    async with running(failures=failures, limits=Limits(connections=8)) as server:
        asked = [asyncio.create_task(server.get(path)) for path in ("/failures", "/api/v1/failures") for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: now == 1)
        assert (await server.get("/metrics"))[0] == 200
        released.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, tuple) and answer[0] == 200 for answer in answers) == 7
    assert most == 1


async def test_F36_reload_is_off_unless_enabled(lines: io.StringIO) -> None:
    """403 when off, POST only when on, 500 with every error; quit and debug pages do not exist."""
    calls: list[int] = []
    errors = ["config.yaml:1:1: scopes: is required"]

    async def reload() -> list[str]:
        calls.append(1)
        return errors

    async with running(reload=reload) as server:
        assert (await server.get("/-/reload", method="POST"))[0] == 403
        assert not calls
    async with running(reload=reload, settings=schema.Server(enable_lifecycle=True)) as server:
        assert (await server.get("/-/reload"))[0] == 405
        assert not calls
        status, _, body = await server.get("/-/reload", "Content-Length: 0", method="POST")
        assert (status, body) == (500, b"config.yaml:1:1: scopes: is required\n")
        errors.clear()
        assert (await server.get("/-/reload", "Content-Length: 0", method="POST"))[0] == 200
        for path in ("/-/quit", "/debug/pprof/", "/debug/vars", "/-/config"):
            assert (await server.get(path, method="POST"))[0] == 404


CROSS_SITE = [
    ("Origin: https://evil.example",),
    ("Origin: null",),
    ("Origin: http://exporter.example.evil.example",),
    ("Origin: http://exporter.example:1",),
    ("Origin: http://exporter.example", "Origin: null"),
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site", "Origin: http://exporter.example"),
    ("Origin: http://exporter.example", "Sec-Fetch-Site: cross-site"),
]
SAME_SITE = [
    (),
    ("Origin: http://exporter.example",),
    ("Origin: HTTPS://Exporter.example", "Sec-Fetch-Site: same-origin"),
    ("Sec-Fetch-Site: none",),
]


async def test_F73_a_page_of_another_site_may_not_reload(lines: io.StringIO) -> None:
    """403 for what a browser marks as cross-site, whether the reload is enabled or not; others may reload."""
    calls: list[int] = []

    async def reload() -> list[str]:
        calls.append(1)
        return []

    async with running(reload=reload, settings=schema.Server(enable_lifecycle=True)) as server:
        for headers in CROSS_SITE:
            status, _, body = await server.get("/-/reload", "Host: exporter.example", *headers, method="POST")
            assert (status, body) == (403, b"a page of another site may not reload\n")
        assert not calls
        for headers in SAME_SITE:
            assert (await server.get("/-/reload", "Host: exporter.example", *headers, method="POST"))[0] == 200
        assert len(calls) == len(SAME_SITE)
    async with running(reload=reload) as server:
        assert (await server.get("/-/reload", "Origin: null", method="POST"))[0] == 403


async def test_F73_pages_are_answered_under_allowed_hosts_only(lines: io.StringIO) -> None:
    """403 under other names, which a site can point at any address; the health checks are answered under every name,
    the metrics under every address."""
    allowed = ("exporter.example", "192.0.2.7", "2001:db8::7")
    pages = ("/", "/api/v1/status", "/api/v1/failures", "/nothing")
    async with running(settings=schema.Server(allowed_hosts=allowed)) as server:
        for host in ("exporter.example", "Exporter.Example.:10071", "192.0.2.7:10071", "[2001:DB8:0::7]:10071"):
            for path in (*pages, "/metrics"):
                assert (await server.get(path, f"Host: {host}"))[0] == (404 if path == "/nothing" else 200)
        for host in ("evil.example", "exporter.example.evil.example", "", "exporter.example@evil.example", "[", "a b"):
            for path in (*pages, "/metrics"):
                status, _, body = await server.get(path, f"Host: {host}")
                assert (status, b"allowed_hosts" in body) in ((403, True), (400, False))
        for host in ("192.0.2.8", "192.0.2.8:10071", "[2001:db8::8]"):
            assert [(await server.get(path, f"Host: {host}"))[0] for path in pages] == [403] * 4
            assert (await server.get("/metrics", f"Host: {host}"))[0] == 200
        for path in ("/-/healthy", "/-/ready"):
            assert (await server.get(path, "Host: evil.example"))[0] == 200
        two = "Host: exporter.example", "Host: evil.example"
        assert (await server.get("/api/v1/status", *two))[0] in (400, 403)
    async with running() as server:
        assert (await server.get("/api/v1/status", "Host: evil.example"))[0] == 200, "empty: any"


async def test_a_bug_is_a_500_and_one_line(lines: io.StringIO) -> None:
    """An exception in a handler shows its text in the log, with its traceback, and not to the client."""

    def status() -> Status:
        raise RuntimeError("internal words")

    async with running(status=status) as server:
        code, headers, body = await server.get("/api/v1/status")
        assert (code, body) == (500, b"Internal Server Error\n")
        assert headers["server"] == "blueking-exporter"
        assert (await server.get("/metrics"))[0] == 200
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert line["event"] == "request_failed"
    assert "internal words" in line["traceback"]


# ---- rude clients ----------------------------------------------------------------------------------------------------

SMUGGLING = {
    "both lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX",
    "two lengths": b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "negative length": b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "signed length": b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na",
    "folded header": b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "space before colon": b"GET /metrics HTTP/1.1\r\nHost : a\r\n\r\n",
    "bare CR": b"GET /metrics HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "NUL in header": b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
    "unknown coding": b"POST /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "unknown method": b"BREW /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": b"GET /metrics\r\n\r\n",
    "wrong version": b"GET /metrics HTTP/9.9\r\nHost: a\r\n\r\n",
    "huge header": b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    "huge URL": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "many headers": b"GET /metrics HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32,
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_F32_malformed_requests(server: Running, lines: io.StringIO, name: str) -> None:
    """A 4xx without details and the end of the connection; nothing in the log, and the next client is served."""
    answer = await server.raw(SMUGGLING[name])
    status, headers, body = parsed(answer)
    assert 400 <= status < 500
    assert answer.count(b"HTTP/") == 1, "nothing behind the bad request is answered"
    assert headers["server"] == "blueking-exporter"
    assert len(body) < 40
    assert (await server.get("/-/healthy"))[0] == 200
    assert lines.getvalue() == ""


@pytest.mark.parametrize(
    "accept", ["\xff\xfe", "application/openmetrics-text;version=9", ";q=;;,,", "text/html;q=x", "*/*;q=0", "a" * 8000]
)
async def test_F32_senseless_accept_is_classic_text(server: Running, accept: str) -> None:
    """Whatever Accept and Accept-Encoding say, there is a page."""
    status, headers, body = await server.get("/metrics", f"Accept: {accept}", "Accept-Encoding: ;;q=,\xff")
    assert (status, body) == (200, b"up 1\n")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_F32_pipelined_requests_are_answered_in_order(server: Running) -> None:
    """Several requests in one packet get their answers, and a CONNECT or upgrade does not become a tunnel."""
    two = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\nGET /-/healthy HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = await server.raw(two)
    assert answer.index(b"up 1") < answer.index(b"healthy")
    assert parsed(await server.raw(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))[0] in (
        400,
        404,
        405,
    )
    status, _, _ = await server.get("/metrics", "Upgrade: websocket", "Sec-WebSocket-Key: eA==")
    assert status == 200


async def test_F31_slow_heads_are_cut(lines: io.StringIO) -> None:
    """Clients that never finish a request head are cut in time, whether they drip or are silent; others are served."""
    assert Limits().head_timeout + CHECK_CLIENTS <= 10

    async def drip(port: int) -> None:
        """Ends when the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n")
        while not reader.at_eof():
            try:
                writer.write(b"X")
                await asyncio.wait_for(reader.read(100), 0.1)
            except TimeoutError:
                continue
            except ConnectionError:
                break
        writer.close()

    async with running(limits=Limits(head_timeout=0.5, idle_timeout=600)) as server:
        slow: list[asyncio.Task[object]] = [asyncio.create_task(drip(server.port)) for _ in range(50)]
        slow += [asyncio.create_task(server.raw(data)) for data in (b"", b"GET")]
        assert (await server.get("/metrics"))[2] == b"up 1\n"
        await asyncio.wait_for(asyncio.gather(*slow), 30)


async def test_F31_a_later_head_on_the_same_connection_is_timed_too(lines: io.StringIO) -> None:
    """Keep-alive is for whole requests: half a second one is cut as well, an idle connection is not."""
    async with running(limits=Limits(head_timeout=0.4)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):
            writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"healthy\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(1.6)
        writer.write(b"GET /-/hea")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_F31_silent_clients_make_room(lines: io.StringIO) -> None:
    """When all connections are taken by silent clients, the oldest gives way, and a scrape is served at once."""
    async with running(limits=Limits(connections=8, head_timeout=600)) as server:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(8)]
        for _ in range(3):
            assert (await server.get("/metrics"))[0] == 200
        assert await asyncio.wait_for(silent[0][0].read(), 30) == b""
        for _, writer in silent:
            writer.close()


async def _unread(port: int, request: bytes) -> socket.socket:
    """A client that asks and does not read, with a small receive buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(client, request)
    return client


async def test_F30_slow_readers_cost_little_and_end(lines: io.StringIO) -> None:
    """Forty clients that read nothing of a 10 MB page cost under 1 MiB each, block nobody, and are cut in time."""
    assert SIZE > 10_000_000
    ask = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    async with running(exposition=expose(BIG), limits=Limits(write_timeout=1.5)) as server:
        await server.get("/metrics")
        before = resident()
        clients = [await _unread(server.port, ask) for _ in range(40)]
        await asyncio.sleep(0.5)
        assert (resident() - before) / 40 < 1 << 20
        assert len((await server.get("/metrics"))[2]) == SIZE
        # To read a little at a time does not help.
        assert await _drip(clients.pop()) < SIZE
        await asyncio.gather(*map(_until_cut, clients))
        assert (await server.get("/metrics"))[0] == 200
    assert [json.loads(line)["event"] for line in lines.getvalue().splitlines()] == ["client_too_slow"]


async def _drip(client: socket.socket) -> int:
    """Bytes until the end: one by one at first, then all that still comes."""
    size, begin, loop = 0, time.monotonic(), asyncio.get_running_loop()
    with client, contextlib.suppress(ConnectionError):
        while data := await loop.sock_recv(client, 1 if time.monotonic() - begin < 2 else 1 << 20):
            size += len(data)
            await asyncio.sleep(0.01)
    return size


async def _until_cut(client: socket.socket) -> None:
    """Waits for the reset, without reading."""
    with client:
        await asyncio.to_thread(
            eventually, lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        )


REQUESTS = {
    "metrics": "/metrics",
    "landing page": "/",
    "not found": "/nothing",
    "HEAD": "/metrics",
}


@pytest.mark.parametrize("name", [*REQUESTS, "no user"])
async def test_F61_a_client_that_pipelines_and_does_not_read(name: str, lines: io.StringIO, tmp_path: Path) -> None:
    """At most 1 MiB of answers waits for it, whatever it asks for; its requests are not read any more; it is closed."""
    request = f"{'HEAD' if name == 'HEAD' else 'GET'} {REQUESTS.get(name, '/')} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    web_file = tmp_path / "web.yml"
    web_file.write_text("basic_auth_users: {ann: $2b$04$" + "a" * 53 + "}\n" if name == "no user" else "")
    page = [LINE * 500]
    async with running(web_file, Limits(stall_timeout=2.0), exposition=expose(page)) as server:
        await server.get("/metrics")
        before = resident()
        clients = [await _unread(server.port, b"") for _ in range(4)]
        sent = await asyncio.gather(*(_send_until_blocked(client, request) for client in clients))
        assert max(sent) < MOST_SENT
        assert (resident() - before) / len(clients) < 1 << 20
        await asyncio.gather(*map(_until_cut, clients))
        assert (await server.get("/-/healthy"))[0] == (401 if name == "no user" else 200)
    assert [json.loads(line)["event"] for line in lines.getvalue().splitlines()] == ["client_too_slow"]


MOST_SENT = 8 << 20


async def _send_until_blocked(client: socket.socket, request: bytes) -> int:
    """Bytes that the server took: until it has taken none for a second, or `MOST_SENT`."""
    loop, sent, batch = asyncio.get_running_loop(), 0, request * 200
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    with contextlib.suppress(TimeoutError, ConnectionError):
        while sent < MOST_SENT:
            async with asyncio.timeout(1):
                await loop.sock_sendall(client, batch)
            sent += len(batch)
    return sent


async def test_F61_a_client_that_pipelines_and_reads_gets_every_answer(server: Running) -> None:
    """Two thousand requests at once are two thousand answers in their order."""
    paths = [f"/{number}" if number % 2 else "/metrics" for number in range(1999)]
    requests = "".join(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n" for path in paths)
    last = "GET /-/healthy HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answers = (await server.raw((requests + last).encode(), until=30)).decode()
    statuses = [line.split()[1] for line in answers.splitlines() if line.startswith("HTTP/1.1 ")]
    assert statuses == ["404" if number % 2 else "200" for number in range(1999)] + ["200"]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_F62_clients_that_do_not_read_do_not_use_up_the_connections(encoding: str, lines: io.StringIO) -> None:
    """However many there are, a new scrape is answered at once, long before they are closed for their slowness."""
    ask = f"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: {encoding}\r\n\r\n".encode()
    page = [os.urandom(20_000).hex().encode() + b" 1\n" for _ in range(250)]
    async with running(exposition=expose(page), limits=Limits(connections=8)) as server:
        clients = [await _unread(server.port, ask) for _ in range(12)]
        for _ in range(3):
            status, _, body = await server.get("/metrics", f"Accept-Encoding: {encoding}")
            assert status == 200
            assert (gzip.decompress(body) if encoding == "gzip" else body) == b"".join(page)
        for client in clients:
            client.close()


async def test_F62_a_chunk_of_megabytes_is_shared_by_all_scrapes(lines: io.StringIO) -> None:
    """Twenty clients that read nothing of a page of one 11 MB chunk cost under 1 MiB each."""
    page = [b"# HELP a b\n", LINE * 100_000, b"c 1\n"]
    async with running(exposition=expose(page)) as server:
        for encoding in ("identity", "gzip"):
            ask = f"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: {encoding}\r\n\r\n".encode()
            _, _, body = await server.get("/metrics", f"Accept-Encoding: {encoding}")
            assert (gzip.decompress(body) if encoding == "gzip" else body) == b"".join(page)
            before = resident()
            clients = [await _unread(server.port, ask) for _ in range(20)]
            await server.get("/metrics")
            assert (resident() - before) / 20 < 1 << 20
            for client in clients:
                client.close()


async def test_F33_fifty_scrapes_at_once(lines: io.StringIO) -> None:
    """Fifty scrapes of a 10 MB page are the same bytes; the loop is never held for 100 ms, memory stays bounded."""
    worst = 0.0

    async def watch_loop() -> None:
        nonlocal worst
        while True:
            # In time of this thread: what other processes take of the machine is not ours.
            at = time.thread_time()
            await asyncio.sleep(0.005)
            worst = max(worst, time.thread_time() - at)

    script = (
        "import sys,urllib.request,concurrent.futures as f\n"
        "get=lambda _: len(urllib.request.urlopen(sys.argv[1]).read())\n"
        "with f.ThreadPoolExecutor(50) as pool: print(set(pool.map(get, range(50))))\n"
    )
    async with running(exposition=expose(BIG)) as server:
        await server.get("/metrics")
        before = resident()
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, f"{server.url}/metrics", stdout=asyncio.subprocess.PIPE
        )
        task = asyncio.create_task(watch_loop())
        output, _ = await client.communicate()
        task.cancel()
        assert output.decode().strip() == f"{{{SIZE}}}"
        assert worst < 0.1
        assert resident() - before < 50 << 20


FEW_FILES = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from exporter import log
from tests.support.web import running
async def main():
    log.configure("info", "logfmt")
    asyncio.get_running_loop().set_exception_handler(log.on_loop_exception)
    async with running() as server:
        print(server.port, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            files = [open("/dev/null") for _ in range(12)]
            print(len(files), flush=True)
            [one.close() for one in files]
asyncio.run(main())
"""


def test_F34_a_flood_with_64_descriptors() -> None:
    """With 64 descriptors a flood leaves enough for pollers and state, a few log lines, and a server that works."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES], stdin=-1, stdout=-1, stderr=-1, text=True, env=environment
    )
    assert process.stdin
    assert process.stdout
    try:
        port = int(process.stdout.readline())
        flood = []
        for _ in range(300):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            flood.append(client)
        time.sleep(0.5)
        process.stdin.write("open\n")
        process.stdin.flush()
        assert process.stdout.readline() == "12\n"
        assert eventually(lambda: _healthy(port), 5)
        for client in flood:
            client.close()
        assert eventually(lambda: _healthy(port), 5)
        _, errors = process.communicate("", timeout=10)
        assert errors.count("\n") <= 2
        assert "Traceback" not in errors
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def _healthy(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 2) as client:
        client.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
        return client.recv(100).startswith(b"HTTP/1.0 200")


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_F42_stop_lets_a_running_scrape_finish(lines: io.StringIO) -> None:
    """A reader in the middle of the page gets the rest; a new client is refused; an idle one does not delay the end."""
    async with running(exposition=expose(BIG), limits=Limits(drain=60)) as server:
        idle = await asyncio.open_connection("127.0.0.1", server.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.create_task(server.stop())
        await asyncio.to_thread(eventually, lambda: _refused(server.port))
        assert len(await reader.read()) == SIZE
        await asyncio.wait_for(stopping, 30)
        assert await idle[0].read() == b""
        for one in (idle[1], writer):
            one.close()


def _refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


async def test_F42_stop_does_not_wait_for_ever(lines: io.StringIO) -> None:
    """A client that reads nothing is cut once the time is up."""
    async with running(exposition=expose(BIG), limits=Limits(drain=0.5)) as server:
        client = await _unread(server.port, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        await asyncio.wait_for(server.stop(), 30)
        assert time.monotonic() - begin > 0.4
        client.close()
    assert "connections_cut" in lines.getvalue()
    assert Limits().drain == 3.0


# ---- listeners -------------------------------------------------------------------------------------------------------


def test_listen_addresses() -> None:
    """A name, an IPv4, an IPv6 address and all addresses; one that is taken is an error that names it."""
    listeners = listen(["127.0.0.1:0", "localhost:0", ":0", "[::1]:0"])
    try:
        families = [listener.family for listener in listeners]
        assert families == [socket.AF_INET, socket.AF_INET, socket.AF_INET6, socket.AF_INET6]
        everywhere = listeners[2].getsockname()[1]
        with socket.create_connection(("127.0.0.1", everywhere), 1), socket.create_connection(("::1", everywhere), 1):
            pass
        taken = f"127.0.0.1:{listeners[0].getsockname()[1]}"
        with pytest.raises(ExporterError, match=f"cannot listen on {taken}"):
            listen(["127.0.0.1:0", taken])
    finally:
        for listener in listeners:
            listener.close()


def test_systemd_words() -> None:
    """No manager, no message; a watchdog only for this very process; no passed socket is an error."""
    assert not systemd.notify("READY=1", environ={})
    assert not systemd.notify("READY=1", environ={"NOTIFY_SOCKET": "/nonexistent/notify"})
    assert systemd.watchdog_interval({"WATCHDOG_USEC": "30000000"}) == 15.0
    assert systemd.watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert systemd.watchdog_interval({"WATCHDOG_USEC": "soon"}) is None
    for environ in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}):
        with pytest.raises(ConfigError, match="systemd passed no socket"):
            systemd.sockets(environ)
