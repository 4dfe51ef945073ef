"""What things cost, counted instead of timed, so that no slow machine fails: calls, decodes, commits, bytes rendered.

The times themselves are measured by bench/, see docs/en/performance.md.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from exporter import log
from exporter.blueking.client import Client
from exporter.blueking.envelope import Reply, ResponseDecoder, read
from exporter.blueking.job import LIST_V3, LIST_V4, STATUS
from exporter.clock import Clock
from exporter.collectors.base import MANY, fold
from exporter.collectors.job.fold import CREATED, DURATION, FINISHED, WAIT
from exporter.config.load import load
from exporter.exposed import page_families
from exporter.fleet import pollers
from exporter.metrics.family import Chunk, Family, Labels
from exporter.metrics.negotiate import Format
from exporter.metrics.page import PIECE, Page
from exporter.metrics.render import render_gauge, scope_prefix
from exporter.model import Key, Scope
from exporter.poller import Poller, Services, flush
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, target
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry
from tests.support.calls import Calls
from tests.support.paths import FIXTURES

SCOPE = Scope("biz", "2")
INTERVAL = 30.0


class CountingStore(MemoryStore):
    """Notes the size of every commit."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []

    async def commit(self, key: Key, payload: bytes) -> None:
        self.commits.append(len(payload))
        await super().commit(key, payload)


class CountingPage(Page):
    """Notes which chunks are put: those have been rendered."""

    def __init__(self) -> None:
        super().__init__(page_families())
        self.rendered: dict[str, Chunk] = {}

    def change(self, key: Key | None, chunks: Mapping[str, Chunk | None]) -> None:
        self.rendered |= {name: chunk for name, chunk in chunks.items() if chunk is not None}
        super().change(key, chunks)


class Watched:
    """One scope of a simulated platform and its poller, in a time that jumps."""

    def __init__(self, platform: Platform, poller: Poller, store: CountingStore, page: CountingPage) -> None:
        self.platform = platform
        self.poller = poller
        self.store = store
        self.page = page
        self.passed = 0.0

    async def poll(self, intervals: int = 1) -> None:
        """So many intervals, in each of them everything that is to be read."""
        for _ in range(intervals):
            self.passed += INTERVAL
            while await self.poller.poll():
                pass
            assert self.poller.success, self.poller.message

    def run(self, plan: int, *, fails: bool = False) -> None:
        """An execution of this plan on one host of its own, over after two seconds."""
        step = StepScript(1, 2.0, {target(plan): (104, 1) if fails else 9})
        self.platform.job.start(SCOPE, plan_id=1_000_000 + plan, steps=[step])

    def forget(self) -> None:
        """Count from here on."""
        self.platform.calls.clear()
        self.store.commits.clear()
        self.page.rendered.clear()

    @property
    def calls(self) -> Counter[str]:
        """`window`: what has been created lately; `look`: how something known is doing; `status`: steps and hosts."""
        counted: Counter[str] = Counter()
        for call in self.platform.calls:
            looks = "job_instance_id" in call.params or "status" in call.params
            counted["status" if call.api.endswith("_status") else "look" if looks else "window"] += 1
        return counted


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[Watched]:
    """After the baseline."""
    began = time.monotonic()
    one: Watched | None = None

    def now() -> float:
        return 1_789_000_000.0 + time.monotonic() - began + (one.passed if one else 0.0)

    platform = Platform(scopes=[SCOPE], now=now)
    async with SimulatorServer(platform) as server:
        file = folder / "config.yaml"
        file.write_text(
            f"""\
blueking:
  job: {{url: "{server.url}/api/bk-job/prod"}}
  auth: {{app_code: blueking-exporter, app_secret: simulated, username: admin}}
  requests_per_second: 10000
  request_timeout: 5s
collectors:
  job: {{interval: 30s, lookback: 10m, reopen_window: 24h}}
counter_birth_hold: 0s
stale_after: 3
scopes: [{{bk_scope_type: biz, bk_scope_id: "2", name: a}}]
"""
        )
        config = load(file).config
        clock, telemetry = Clock(now, now), Telemetry()
        store, page = CountingStore(), CountingPage()
        async with Client(config.blueking, clock, telemetry, log.get()) as client:
            (poller,) = pollers(config, client, Services(store, page, telemetry, clock))
            one = Watched(platform, poller, store, page)
            await one.poll(2)
            one.forget()
            yield one
            poller.close()


async def test_an_idle_poll_is_one_call_no_commit_and_a_few_lines(tmp_path: Path) -> None:
    """Where nothing happens, only the times of the newest poll are rendered, when the page is read. They are committed
    once, when all is over."""
    async with watched(tmp_path) as one:
        await one.poll(20)
        assert one.calls == {"window": 20}
        assert one.store.commits == []
        assert one.page.rendered == {}
        assert one.page.counts()
        assert {name.removeprefix("blueking_exporter_collector_") for name in one.page.rendered} == {
            "duration_seconds",
            "last_success_timestamp_seconds",
            "watermark_timestamp_seconds",
        }
        assert sum(len(chunk.text) for chunk in one.page.rendered.values()) < 1024
        assert await flush(one.store, [one.poller])
        assert await flush(one.store, [one.poller])
        assert len(one.store.commits) == 1
        assert one.store.commits[0] < 4096


async def test_a_new_execution_is_committed_once_and_renders_what_it_changes(tmp_path: Path) -> None:
    """Of the counters and histograms the page gets the four that count it. The state is encoded once: the bytes that
    are committed are those that are kept."""
    async with watched(tmp_path) as one:
        for plan in (1, 2):  # the first one brings series that are new
            one.run(plan)
            await one.poll(2)
        one.forget()
        one.run(3)
        one.passed += INTERVAL
        with Calls() as calls:
            await one.poller.poll()
        assert len(one.store.commits) == 1
        counted = {name for name in one.page.rendered if name.startswith("blueking_job_execution")}
        assert counted == {CREATED, FINISHED, DURATION, WAIT}
        assert calls.names["render_counts"] == 4
        assert calls.names["msgpack_encode"] == 1


async def test_polls_leave_nothing_behind(tmp_path: Path) -> None:
    """What one poll needed is free before the next: a daemon is as large after a year as after an hour."""
    async with watched(tmp_path) as one:
        one.run(1, fails=True)
        blocks = []
        for _ in range(3):
            await one.poll(100)
            one.forget()
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        assert blocks[2] - blocks[1] < 500


async def test_a_failing_execution_costs_one_status_call_and_a_success_none(tmp_path: Path) -> None:
    """Hosts are asked for where something failed; a plan that fails nowhere is not asked about."""
    async with watched(tmp_path) as one:
        for plan in range(40):
            one.run(plan, fails=plan % 10 == 0)
        await one.poll(2)
        assert one.calls == {"window": 2, "status": 4}
        assert len(one.store.commits) == 1


async def test_a_success_of_a_failing_plan_costs_one_call(tmp_path: Path) -> None:
    """It may clear the host; after it has, successes of the plan cost nothing again."""
    async with watched(tmp_path) as one:
        one.run(1, fails=True)
        await one.poll(1)
        one.forget()
        one.run(1)
        await one.poll(1)
        assert one.calls["status"] == 1
        one.forget()
        one.run(1)
        await one.poll(1)
        assert one.calls["status"] == 0


async def test_catching_up_reads_each_row_about_once(tmp_path: Path) -> None:
    """2,000 executions of hours fill ten pages; what overlaps and slices add is within a tenth, and two calls."""
    async with watched(tmp_path) as one:
        for plan in range(2000):
            one.run(plan)
            one.passed += 10
        await one.poll(1)
        assert one.calls.keys() == {"window"}
        assert 10 <= one.calls["window"] <= 13
        assert len(one.store.commits) <= 2


async def test_catching_up_with_a_flood_is_read_in_slices_too(tmp_path: Path) -> None:
    """10,000 executions of five minutes, all within `lookback`: no poll keeps more than a slice of them, and each is
    counted once. What it costs to find out how many they are is bounded."""
    async with watched(tmp_path) as one:
        for plan in range(10_000):
            one.run(plan)
            one.passed += 0.03
        await one.poll(1)
        assert one.calls.keys() == {"window"}
        assert 50 <= one.calls["window"] <= 50 + 25
        assert len(one.store.commits) >= 3
        state = one.poller.state
        assert state is not None
        created = state.counts.counters["blueking_job_executions_created_total"]
        assert sum(one.value for one in created.values()) == 10_000
        one.forget()
        await one.poll(1)
        assert one.calls["window"] >= 50, "the whole window is read again"
        assert one.poller.state is not None
        assert one.poller.state.counts.counters["blueking_job_executions_created_total"] == created


async def test_4_1_3_what_slices_do_not_read_again_is_read_after_them(tmp_path: Path) -> None:
    """An execution that is listed late, before the watermark of a slice, is counted; even after an outage between two
    slices that is longer than `lookback`."""
    async with watched(tmp_path) as one:
        one.platform.job.start(SCOPE, visible_from=one.platform.job.time + 600_000)
        for plan in range(9_000):
            one.run(plan)
            one.passed += 0.03
        one.passed += INTERVAL
        assert await one.poller.poll(), "a slice: there is more"
        one.passed += 900
        await one.poll(2)
        assert one.poller.state is not None
        created = one.poller.state.counts.counters["blueking_job_executions_created_total"]
        assert sum(count.value for count in created.values()) == 9_001


async def test_watching_for_retries_costs_a_hundred_calls_per_window(tmp_path: Path) -> None:
    """However many executions failed, one call looks at them all, every hundredth of `reopen_window`."""
    async with watched(tmp_path) as one:
        for plan in range(20):
            one.platform.job.start(SCOPE, plan_id=plan + 1, steps=[StepScript(1, 2.0, {}, status=4)])
        await one.poll(21)  # past `lookback`: windows do not show them any more
        one.forget()
        intervals = int(86_400 / 20 / INTERVAL)
        await one.poll(intervals)
        assert one.calls == {"window": intervals, "look": 5}


async def test_a_changed_scope_renders_its_own_lines_only(tmp_path: Path) -> None:
    """Of a page of 300 scopes every piece without the changed scope stays the same object, and so stays deflated."""
    family = Family("some_gauge", "gauge", ("a", "b"), "Help.", "")
    page = Page([family])
    samples: dict[Labels, float] = {(str(number), "x"): float(number) for number in range(50)}
    scopes = [Scope("biz", str(number)) for number in range(300)]
    for scope in scopes:
        page.put(Key("job", scope), {family.name: render_gauge(family, scope_prefix(scope), samples)})
    before = page.snapshot(Format.TEXT).pieces
    changed = render_gauge(family, scope_prefix(scopes[7]), {labels: value + 1 for labels, value in samples.items()})
    page.put(Key("job", scopes[7]), {family.name: changed})
    after = page.snapshot(Format.TEXT).pieces
    new = [piece for piece in after if piece not in before]
    assert len(before) > 10
    assert len(new) == 1
    assert new[0].size < 2 * PIECE
    assert page.snapshot(Format.TEXT) is page.snapshot(Format.TEXT)


@pytest.mark.parametrize(
    ("fixture", "decoders"),
    [
        ("job_v4_list__ok_mixed_statuses_nulls_omitted.json", LIST_V4),
        ("job_v3_list__ok_total_larger_than_page.json", LIST_V3),
        ("job_v4_status__ok_failed_with_execute_objects.json", STATUS),
        ("job_v3_status__ok_failed_with_ip_results.json", STATUS),
    ],
)
def test_usual_answers_are_decoded_once(fixture: str, decoders: tuple[ResponseDecoder[object, object], ...]) -> None:
    """What the platform usually sends fits the first and cheapest form."""
    assert read(Reply(200, (FIXTURES / fixture).read_bytes(), {}), decoders[:1])


async def test_many_rows_are_folded_beside_the_event_loop(tmp_path: Path) -> None:
    """Few rows are not worth a thread; of 20,000 results each is counted all the same."""
    here = threading.get_ident()
    assert await fold(MANY, threading.get_ident) == here
    assert await fold(MANY + 1, threading.get_ident) != here
    async with watched(tmp_path) as one:
        results = {target(number): (104, 1) if number % 100 == 0 else 9 for number in range(1, 20_001)}
        one.platform.job.start(SCOPE, steps=[StepScript(1, 2.0, results)])
        await one.poll(1)
        assert one.poller.state is not None
        assert len(one.poller.collector.failing_hosts(one.poller.state).streaks) == 200
