"""The web pages, also in a real browser: both languages, light and dark, narrow and wide."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from exporter.status import FailingExecution, FailingHost, FailureFilter, FailureReason, Failures, PollerStatus, Status
from exporter.web.pages import failures
from exporter.web.pages.html import Choice, preferred
from exporter.web.pages.landing import MOST_ROWS, page
from exporter.web.pages.texts import TEXTS
from tests.support.components import require
from tests.support.web import running

NOW = 1_780_000_000.0
HOSTILE = 'Pay <script>alert(1)</script><img src=x onerror=alert(2)> "\u202egnp.exe\x1b[31m'
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def watch(**changes: Any) -> PollerStatus:
    plain: dict[str, Any] = {
        "collector": "job",
        "bk_scope_type": "biz",
        "bk_scope_id": "2",
        "name": "Demo business",
        "state": "ok",
        "last_success": NOW - 12,
        "age": 12.0,
        "next_poll": 18.0,
        "interval": 30.0,
        "failing_hosts": 0,
        "series": 120,
    }
    return PollerStatus(**plain | changes)


def status(*pollers: PollerStatus) -> Status:
    return Status(version="0.1.0", started=NOW - 93784, uptime=93784.0, ready=True, series=84213, pollers=pollers)


PERMISSION = {"reason": "permission", "message": "JOB 9900403: 没有业务访问权限 access_business", "age": 700.0}
SAMPLE = status(
    watch(),
    watch(bk_scope_id="10", name="游戏运营 · 华南大区", failing_hosts=37),
    watch(collector="nodeman_job", interval=60.0, next_poll=0.0),
    watch(bk_scope_id="8", name=HOSTILE, state="stale", reason="timeout", message="no answer in 30 s", age=93000.0),
    watch(bk_scope_id="7", name="支付核心", state="failing", last_success=NOW - 700, **PERMISSION),
    watch(bk_scope_type="biz_set", bk_scope_id="9991001", name="", state="starting", last_success=None, age=None,
          next_poll=None, failing_hosts=None),
    watch(collector="nodeman_subscription", bk_scope_id="3", name="A business whose name is longer than names are",
          state="failing", reason="rate_limited", message="API_QUOTA " + "x" * 400, failing_hosts=1204),
)  # fmt: skip


class Tab:
    """One page of a browser, over the DevTools protocol. `faults`: what the console or the network complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.faults: list[object] = []
        self.requested: list[str] = []

    async def read(self) -> None:
        async for message in self._socket:
            event = message.json()
            parameters = event.get("params", {})
            match event.get("method"):
                case None:
                    self._waiting.pop(event["id"]).set_result(event)
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Network.requestWillBeSent":
                    self.requested.append(parameters["request"]["url"])
                case (
                    "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Network.loadingFailed"
                ):
                    self.faults.append(parameters)

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        result = await asyncio.wait_for(answer, 15)
        assert "error" not in result, result
        return result["result"]

    async def open(self, url: str, width: int, height: int, theme: str = "light", language: str = "en-US") -> None:
        phone = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        await self.call("Network.setExtraHTTPHeaders", headers={"Accept-Language": language})
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), 15)

    async def evaluate(self, expression: str) -> Any:
        # DevTools may look into a page whose policy lets no script run.
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True))["result"].get("value")

    async def screenshot(self, name: str) -> bytes:
        size = await self.evaluate("[innerWidth, Math.min(1700, document.documentElement.scrollHeight)]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        image = base64.b64decode(shot["data"])
        if folder := os.environ.get("SCREENSHOTS"):
            (Path(folder) / f"{name}.png").write_bytes(image)
        return image


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """A tab in a fresh Chromium, which ends with the context."""
    argv = [require("chromium"), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        marker = folder / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not marker.exists() or "\n" not in marker.read_text():
            assert process.returncode is None, "chromium ended"
            assert time.monotonic() < end, "chromium does not listen"
            await asyncio.sleep(0.05)
        port = marker.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                address = next(one for one in await answer.json() if one["type"] == "page")["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                reading = asyncio.create_task(tab.read())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                yield tab
                assert not reading.done() or reading.exception() is None
        await reading
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


@pytest.mark.component
async def test_landing_page_in_a_browser(tmp_path: Path) -> None:
    """The failing scope comes first, in both languages; nothing overflows, is loaded or is complained of."""
    async with running(status=lambda: SAMPLE) as server, browser(tmp_path / "profile") as tab:
        backgrounds = set()
        for language, word in (("en-US", "failing"), ("zh-CN", "失败")):
            for theme in ("light", "dark"):
                for width, height in ((390, 844), (1280, 900)):
                    await tab.open(server.url, width, height, theme, f"{language},fr;q=0.5")
                    first = await tab.evaluate("document.querySelector('tbody tr').innerText")
                    assert word in first
                    assert "rate_limited" in first
                    assert await tab.evaluate("document.documentElement.scrollWidth") <= width
                    assert (
                        await tab.evaluate("document.scripts.length + document.querySelectorAll('td img').length") == 0
                    )
                    assert "<script>alert(1)</script>" in await tab.evaluate("document.body.innerText")
                    backgrounds.add((theme, await tab.evaluate("getComputedStyle(document.body).backgroundColor")))
                    assert len(await tab.screenshot(f"{language}-{theme}-{width}")) > 10_000
        assert len(backgrounds) == 2, "the stylesheet is in force, and each theme has its own colours"
        await tab.open(f"{server.url}/?lang=zh", 1280, 900)
        assert await tab.evaluate("document.documentElement.lang") == "zh-Hans"
        assert await tab.evaluate("document.querySelector('.lang a').href") == f"{server.url}/?lang=en"
        assert tab.faults == []
        assert {url for url in tab.requested if not url.startswith((server.url, "data:"))} == set()


JOB_URL = "https://job.example.com/api_execute/20000000007"


def host(number: int, **changes: Any) -> FailingHost:
    plain: dict[str, Any] = {
        "collector": "job",
        "bk_scope_type": "biz",
        "bk_scope_id": "2",
        "bk_cloud_id": "0",
        "bk_host_id": str(1000 + number),
        "ip": f"10.0.{number // 250}.{number % 250}",
        "code": "104",
        "reason": "script_nonzero_exit",
        "since": NOW - 90_000 + number,
        "consecutive": 3,
        "job_instance_id": 20000000007,
        "url": JOB_URL,
    }
    return FailingHost(**plain | changes)


HOSTS = (
    host(1, consecutive=1204),
    host(2, code="310", reason="gse_agent_abnormal", ip="2001:db8:1234:5678:9abc:def0:1234:5678", bk_cloud_id="1200"),
    host(3, collector="nodeman_job", code="", reason="check_policy_gse_to_proxy", job_instance_id=None, job_id=88,
         url="https://nodeman.example.com/#/task-list/detail/88"),
    host(4, collector="nodeman_subscription", code="", reason="other", job_instance_id=None, url=None),
    host(5, collector="nodeman_task", code="3801999", reason="", bk_host_id="", bk_scope_id="9991001",
         job_instance_id=None, job_id=12, url=None),
    host(6, code=HOSTILE, reason="unknown_code", ip=HOSTILE, bk_host_id=HOSTILE),
    *(host(number) for number in range(7, 451)),
)  # fmt: skip


def execution(**changes: Any) -> FailingExecution:
    plain: dict[str, Any] = {"collector": "job", "bk_scope_type": "biz", "bk_scope_id": "2", "status": "failed"}
    return FailingExecution(**plain | changes)


EXECUTIONS = (
    execution(name="Nightly backup of databases", job_instance_id=20000000007, end_time=NOW - 600, url=JOB_URL),
    execution(name=HOSTILE, status="abnormal", job_instance_id=20000000006, end_time=NOW - 7000, url=JOB_URL),
    execution(collector="nodeman_job", name="INSTALL_AGENT", status="part_failed", job_id=88),
    execution(bk_scope_type="biz_set", bk_scope_id="9991001", name="发布支付核心服务到华南大区",
              job_instance_id=20000000005, end_time=NOW - 90_000, url=JOB_URL),
)  # fmt: skip
REASONS = (
    (FailureReason("job", "104", "script_nonzero_exit"), 445),
    (FailureReason("job", "310", "gse_agent_abnormal"), 1),
    (FailureReason("nodeman_job", "", "check_policy_gse_to_proxy"), 1),
    (FailureReason("nodeman_subscription", "", "other"), 1),
    (FailureReason("nodeman_task", "3801999", ""), 1),
    (FailureReason("job", HOSTILE, "unknown_code"), 1),
)
FOUND = Failures(EXECUTIONS, HOSTS, REASONS, {("biz", "2"): "游戏运营 · 华南大区"}, unread=2)


class Find:
    """Finds `FOUND`, and keeps what was asked for."""

    def __init__(self, found: Failures = FOUND) -> None:
        self.found = found
        self.asked: list[FailureFilter] = []

    async def __call__(self, wanted: FailureFilter) -> Failures:
        self.asked.append(wanted)
        return self.found


@pytest.mark.component
async def test_failures_page_in_a_browser(tmp_path: Path) -> None:
    """Hosts, executions and their links, in both languages; nothing overflows, is loaded or is complained of; the form
    asks for what was typed."""
    find = Find()
    async with running(failures=find) as server, browser(tmp_path / "profile") as tab:
        for language, word in (("en-US", "script nonzero exit"), ("zh-CN", "脚本返回码非零")):
            for theme in ("light", "dark"):
                for width, height in ((390, 844), (1280, 900)):
                    await tab.open(f"{server.url}/failures", width, height, theme, language)
                    assert word in await tab.evaluate("document.querySelector('tbody tr').innerText")
                    assert await tab.evaluate("document.querySelectorAll('tbody tr').length") == 200 + len(EXECUTIONS)
                    assert await tab.evaluate("document.documentElement.scrollWidth") <= width
                    assert (
                        await tab.evaluate("document.scripts.length + document.querySelectorAll('td img').length") == 0
                    )
                    assert await tab.evaluate(f"document.querySelectorAll('td a[href=\"{JOB_URL}\"]').length") > 100
                    assert len(await tab.screenshot(f"failures-{language}-{theme}-{width}")) > 10_000
        await tab.open(f"{server.url}/failures?lang=zh&collector=job&page=2", 1280, 900)
        assert await tab.evaluate("document.documentElement.lang") == "zh-Hans"
        switch = await tab.evaluate("document.querySelector('.lang a').href")
        assert switch == f"{server.url}/failures?collector=job&page=2&lang=en"
        await tab.evaluate(
            "document.querySelector('[name=text]').value = '10.0 &<';"
            "document.querySelector('[name=bk_scope_type]').value = 'biz';"
            "document.querySelector('form').requestSubmit()"
        )
        async with asyncio.timeout(30):
            while find.asked[-1].text != "10.0 &<":  # noqa: ASYNC110 - the browser asks
                await asyncio.sleep(0.05)
        assert find.asked[-1] == FailureFilter(bk_scope_type="biz", collector="job", text="10.0 &<")
        assert [url for url in tab.requested if url.startswith(server.url)][-1].endswith("&lang=zh")
        assert tab.faults == []
        assert {url for url in tab.requested if not url.startswith((server.url, "data:"))} == set()


async def test_failures_page_shows_200_rows_a_time() -> None:
    """Each page has its rows and links to its neighbours, with the same filter; one past the last is the last one."""
    find = Find()
    async with running(failures=find) as server:
        seen: list[str] = []
        for number in (1, 2, 3):
            status, headers, body = await server.get(f"/failures?collector=job&page={number}")
            document = body.decode()
            assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
            seen += re.findall(r'<td class="host"><b>(10\.[\d.]+)</b>', document)
            assert ('/failures?collector=job&amp;page=3">' in document) == (number == 2)
            assert f"Page {number} of 3" in document
            assert ("Nightly backup" in document) == (number == 1)
        assert len(seen) == len(set(seen)) == len(HOSTS) - 2
        assert b"Page 3 of 3" in (await server.get("/failures?page=999"))[2]
        assert set(find.asked) == {FailureFilter(collector="job"), FailureFilter()}
        for query in (
            "page=0",
            "page=x",
            "page=1&page=2",
            "bk_scope_type=planet",
            "bk_scope_id=0",
            "x=1",
            "text=" + "x" * 201,
        ):
            assert (await server.get(f"/failures?{query}"))[0] == 400


async def test_failures_page_says_what_is_not_known() -> None:
    """No failures, none that match, and scopes that could not be read are distinguished."""
    async with running(failures=Find(Failures())) as server:
        page = (await server.get("/failures"))[2].decode()
        assert "No host fails." in page
        assert "No recent execution failed." in page
        assert page.count("Nothing matches the filter.") == 0
        page = (await server.get("/failures?code=104"))[2].decode()
        assert page.count("Nothing matches the filter.") == 2
        assert "could not" not in page
    async with running(failures=Find(Failures(unread=3, untracked=1200))) as server:
        page = (await server.get("/failures"))[2].decode()
        assert "The newest poll of 3 scopes and collectors failed" in page
        assert "1,200 more hosts fail" in page
        assert page.count("None is known.") == 2
    async with running(failures=Find(Failures(visible=False))) as server:
        page = (await server.get("/failures?code=104"))[2].decode()
        assert "has lost its lease" in page
        assert page.count("None is known.") == 2


def test_F28_names_of_others_cannot_write_html_on_the_failures_page() -> None:
    """Host, code, name and filter are escaped, their controls and bidi marks made visible."""
    view = failures.View(FOUND, FailureFilter(text=HOSTILE, collector=HOSTILE), 1, Choice("zh", "zh"), NOW)
    html = failures.page(view)
    assert html.count("<script") == 0
    assert "<img" not in html
    assert not {"\u202e", "\x1b"} & set(html)
    assert html.count("&lt;script&gt;") >= 5


def test_every_text_is_in_both_languages() -> None:
    """No text is empty, and both languages fill in the same number of values."""
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    for key, english in TEXTS["en"].items():
        assert english
        assert english.count("{}") == TEXTS["zh"][key].count("{}")


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-GB,en;q=0.9,zh;q=0.8", "en"),
        ("fr, zh-Hant;q=0.4, en;q=0.1", "zh"),
        ("zh;q=nonsense, en", "en"),
        ("zh;q=0, en;q=0", "en"),
        ("zh;q=99", "en"),
        (";;;,,,=" * 500, "en"),
    ],
)
def test_language_by_header(header: str, language: str) -> None:
    """The better liked language wins; what makes no sense is English."""
    assert preferred(header) == language


def test_F28_names_of_others_cannot_write_html_or_turn_the_line_around() -> None:
    """Names and messages of the platform are escaped, their controls and bidi marks made visible."""
    html = page(
        status(watch(name=HOSTILE, state="failing", reason="api_error", message=HOSTILE)), Choice("en"), "/metrics"
    )
    assert html.count("<script") == 0
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html
    assert "\\u202e" in html


def test_thousands_of_scopes_are_cut_with_a_message() -> None:
    """A page of 3,000 scopes shows the most urgent rows and says how many are missing."""
    many = [watch(bk_scope_id=str(number)) for number in range(1, 3000)]
    html = page(status(*many, watch(bk_scope_id="77777", state="failing", reason="auth")), Choice("en"), "/metrics")
    assert html.count("<tr>") == MOST_ROWS + 1
    assert html.index("biz/<wbr>77777") < html.index("biz/<wbr>2<")
    assert f"{3000 - MOST_ROWS:,} more are not shown" in html
