"""The landing page in a real browser: both languages, both themes, a phone and a desk."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from exporter.status import PollerStatus, Status
from exporter.web.pages.html import preferred
from exporter.web.pages.landing import MOST_ROWS, page
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
        image = base64.b64decode((await self.call("Page.captureScreenshot", captureBeyondViewport=True))["data"])
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
    html = page(status(watch(name=HOSTILE, state="failing", reason="api_error", message=HOSTILE)), "en", "/metrics")
    assert html.count("<script") == 0
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html
    assert "\\u202e" in html


def test_thousands_of_scopes_are_cut_with_a_word() -> None:
    """A page of 3,000 scopes shows the most urgent rows and says how many are missing."""
    many = [watch(bk_scope_id=str(number)) for number in range(1, 3000)]
    html = page(status(*many, watch(bk_scope_id="77777", state="failing", reason="auth")), "en", "/metrics")
    assert html.count("<tr>") == MOST_ROWS + 1
    assert html.index("biz/77777") < html.index("biz/2<")
    assert f"{3000 - MOST_ROWS:,} more are not shown" in html
