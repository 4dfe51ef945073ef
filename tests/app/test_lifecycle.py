"""Start, readiness, stop: a real process and its signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from exporter import log
from exporter.app import App
from exporter.blueking.client import Client
from exporter.clock import Clock
from exporter.collectors.job.collector import JobCollector
from exporter.config.load import load
from exporter.config.schema import Auth, Collectors, JobPlatform, ScopeConfig
from exporter.config.secret import Secret
from exporter.exposed import page_families
from exporter.fleet import platforms
from exporter.metrics.family import Chunk
from exporter.metrics.page import Page
from exporter.model import Key, Scope
from exporter.poller import Poller, Services, Settings
from exporter.reload import Options
from exporter.simulator.faults import Fault
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, target
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry
from tests.support import upstream
from tests.support.components import LOOPBACK, eventually, free_port
from tests.support.process import (
    BIZ,
    OTHER,
    PROGRAM,
    Daemon,
    NotifySocket,
    Simulated,
    configuration,
    daemon,
    scope_entry,
    select,
    total,
)

SUCCESS = "blueking_exporter_collector_success"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_F42_a_signal_ends_it_with_0(tmp_path: Path, simulated: Simulated, number: signal.Signals) -> None:
    """SIGTERM and SIGINT: exit 0 at once when nothing is under way, and the log says so."""
    with daemon(tmp_path, simulated) as running:
        running.wait_success()
        begun = time.monotonic()
        running.signal(number)
        assert running.exit_code() == 0
        assert time.monotonic() - begun < 3
        assert "event=stopping" in running.log
        assert "level=error" not in running.log


def names() -> list[dict[str, object]]:
    """Scopes with names only: a page that is larger than all buffers."""
    off = {"job": {"enabled": False}}
    return [
        {"bk_scope_type": "biz", "bk_scope_id": str(number), "name": "x" * 120, "collectors": off}
        for number in range(10_000, 16_000)
    ]


class SlowReader:
    """A scraper that asks for the page and reads a byte now and then."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.connect((host, int(port)))
        self.socket.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert self.socket.recv(1)

    def close(self) -> None:
        self.socket.close()


def test_F42_a_stop_waits_neither_for_blueking_nor_for_scrapers(tmp_path: Path, simulated: Simulated) -> None:
    """During a hanging poll and a scrape that does not read, SIGTERM ends it with 0 within 5 seconds; it is unready at
    once and what was committed is there in the next run."""
    simulated.fault("blackhole", bk_scope_type="biz", bk_scope_id="3")
    config = configuration(simulated.url, [BIZ, OTHER], blueking={"request_timeout": "30s"})
    config["scopes"] += names()
    running = Daemon(tmp_path, config)
    with running:
        running.wait_success()
        simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})])
        running.wait_success()
        reader = SlowReader(running.url)
        with contextlib.closing(reader):
            begun = time.monotonic()
            running.signal(signal.SIGTERM)
            eventually(lambda: running.get("/-/ready")[0] == 503, 2, 0.02)
            assert running.exit_code() == 0
            seconds = time.monotonic() - begun
            assert 1 < seconds < 5, "the scrape is given its time, and no more"
    with daemon(tmp_path, simulated) as again:
        assert total(again.metrics(), "blueking_job_executions_finished_total") == 1


def test_F42_a_second_signal_ends_it_at_once(tmp_path: Path, simulated: Simulated) -> None:
    """While it is stopping, another SIGTERM is the end: exit 1 at once."""
    config = configuration(simulated.url)
    config["scopes"] += names()
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        with contextlib.closing(SlowReader(running.url)):
            running.signal(signal.SIGTERM)
            eventually(lambda: "event=stopping" in running.log, 5, 0.01)
            begun = time.monotonic()
            running.signal(signal.SIGTERM)
            assert running.exit_code() == 1
            assert time.monotonic() - begun < 1


def test_F42_a_scrape_under_way_is_finished(tmp_path: Path, simulated: Simulated) -> None:
    """A reader that began before the stop gets its whole answer."""
    config = configuration(simulated.url)
    config["scopes"] += names()
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        reader = SlowReader(running.url)
        body = b"H"
        with contextlib.closing(reader):
            running.signal(signal.SIGTERM)
            eventually(lambda: "event=stopping" in running.log, 5, 0.01)
            while piece := reader.socket.recv(65536):
                body += piece
        head, _, page = body.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length
        assert len(page) == int(length[1]) > 1_000_000
        assert running.exit_code() == 0


def test_F42_a_stop_during_a_reload_ends_it(tmp_path: Path, simulated: Simulated) -> None:
    """A reload that is under way at SIGTERM starts nothing that would continue for ever."""
    config = configuration(simulated.url)
    config["scopes"] += names()
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        with contextlib.closing(SlowReader(running.url)):
            config["scopes"].append(scope_entry(OTHER))
            running.write(config)
            running.signal(signal.SIGHUP)
            time.sleep(0.1)
            assert "event=reloaded" not in running.log, "the reload was too fast for this test"
            running.signal(signal.SIGTERM)
            assert running.exit_code(5) == 0
        assert "level=error" not in running.log


HANGS = "import concurrent.futures, time; concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 100); "
"""A blocked thread, as a silent resolver leaves it: normally the interpreter waits for it at exit."""


def test_F64_a_thread_that_hangs_does_not_delay_the_end(tmp_path: Path, simulated: Simulated) -> None:
    """SIGTERM ends the process with 0, long before the thread would."""
    program = (*PROGRAM[:-1], HANGS + PROGRAM[-1])
    with Daemon(tmp_path, configuration(simulated.url), program=program) as running:
        running.wait_success()
        running.signal(signal.SIGTERM)
        assert running.exit_code(30) == 0
        assert "event=stopped_by_force" in running.log


def test_F43_a_stuck_event_loop_feeds_no_watchdog(tmp_path: Path, simulated: Simulated) -> None:
    """While the thread of the event loop is blocked no ping is sent, although other threads run; afterwards pings are
    sent."""
    stuck = tmp_path / "stuck"
    handler = f"lambda *_: (open({str(stuck)!r}, 'w').close(), time.sleep(4))"
    program = (*PROGRAM[:-1], f"import signal, time; signal.signal(signal.SIGUSR1, {handler}); {PROGRAM[-1]}")
    with NotifySocket(tmp_path) as notify:
        environ = {"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "200000"}
        with Daemon(tmp_path, configuration(simulated.url), environ=environ, program=program) as running:
            eventually(lambda: "WATCHDOG=1" in notify.received(), 20, 0.02)
            running.signal(signal.SIGUSR1)
            eventually(stuck.exists, 10, 0.01)
            notify.received()
            time.sleep(2)
            assert notify.received() == []
            eventually(lambda: "WATCHDOG=1" in notify.received(), 20, 0.02)


def test_F54_a_disk_that_hangs(tmp_path: Path, simulated: Simulated) -> None:
    """While no commit comes to an end polls fail with reason state, the page is served, the watchdog is fed all the
    same, and SIGTERM ends the process with 0."""
    with NotifySocket(tmp_path) as notify:
        environ = {"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "400000"}
        with Daemon(tmp_path, configuration(simulated.url), environ=environ) as running:
            running.wait_success()
            with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as other:
                other.execute("BEGIN IMMEDIATE")  # holds up every commit, as a slow disk does
                fed = []
                errors = ("blueking_exporter_collector_errors_total", {"reason": "state"})
                notify.received()
                while not select(running.metrics(), errors[0], **errors[1]):
                    fed += notify.received()
                    time.sleep(0.05)
                assert fed.count("WATCHDOG=1") >= 4, "one commit is waited for for five seconds"
                running.signal(signal.SIGTERM)
                assert running.exit_code(30) == 0


def test_F64_a_stop_while_the_state_hangs_at_the_start(tmp_path: Path, simulated: Simulated) -> None:
    """A state that cannot be opened for seconds: SIGTERM ends the process with 0 without waiting for it."""
    with daemon(tmp_path, simulated) as running:
        running.wait_success()
        assert running.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        running = Daemon(tmp_path, configuration(simulated.url))
        running.spawn()
        try:
            _wait_for_handler(running, signal.SIGTERM)
            time.sleep(1.5)
            assert running.process is not None
            assert running.process.poll() is None, "SQLite waits for five seconds"
            assert "event=started" not in running.log
            running.signal(signal.SIGTERM)
            assert running.exit_code() == 0
        finally:
            running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(tmp_path: Path, simulated: Simulated, number: signal.Signals) -> None:
    """A stop at any moment of the start, from the first line of ours on, ends the process with 0."""
    for wait in (0.0, 0.2, 0.4):
        running = Daemon(tmp_path, configuration(simulated.url))
        running.spawn()
        # SIGINT has a handler of Python's from the beginning; ours come together.
        _wait_for_handler(running, signal.SIGTERM)
        time.sleep(wait)
        running.signal(number)
        assert running.exit_code() == 0
        assert "Traceback" not in running.log


def test_a_reload_during_the_start_does_not_end_it(tmp_path: Path, simulated: Simulated) -> None:
    """SIGHUP while it starts: what it reads is what it was to read."""
    running = Daemon(tmp_path, configuration(simulated.url))
    running.spawn()
    try:
        _wait_for_handler(running, signal.SIGHUP)
        running.signal(signal.SIGHUP)
        running.url = eventually(running.address, 20, 0.01)
        running.wait_success()
    finally:
        running.kill()


@pytest.mark.parametrize("state", ["empty", "left behind"])
def test_F53_50_hangups_during_the_start(tmp_path: Path, state: str) -> None:
    """SIGHUP every 20 ms in the first second, before it listens and while states load: one poller per key, at most one
    call per interval, nothing left of a scope that is removed, and READY=1 only when the port answers."""
    scopes = [Scope("biz", str(number)) for number in range(30_000, 30_120)]
    interval = 1
    with Simulated(*scopes) as simulated, NotifySocket(tmp_path) as notify:
        config = configuration(simulated.url, scopes, collectors={"job": {"interval": f"{interval}s"}})
        port = free_port()
        running = Daemon(
            tmp_path, config, f"--web.listen-address={LOOPBACK}:{port}", environ={"NOTIFY_SOCKET": notify.path}
        )
        if state == "left behind":
            with running:
                running.wait_ready()
                assert running.stop() == 0
            notify.received()
        running.spawn()
        running.url = f"http://{LOOPBACK}:{port}"
        try:
            _wait_for_handler(running, signal.SIGHUP)
            messages: list[str] = []
            for _ in range(50):
                running.signal(signal.SIGHUP)
                time.sleep(0.02)
                if not messages and (messages := notify.received()):
                    assert messages[0] == "READY=1"
                    assert running.get("/-/healthy")[0] == 200, "ready without a port that answers"
            eventually(lambda: "event=started" in running.log, 20, 0.02)
            running.wait_ready()
            assert _polled(running) == len(scopes)

            # What was asked for last is over when nothing is reloaded for an interval.
            seen = -1
            while seen != (seen := running.log.count("event=reloaded")):
                time.sleep(interval)
            first, begun = simulated.calls(), time.monotonic()
            time.sleep(3 * interval)
            calls, intervals = simulated.calls() - first, (time.monotonic() - begun) / interval
            assert 0 < calls <= len(scopes) * (intervals + 1)

            kept = scopes[:10]
            running.write(configuration(simulated.url, kept, collectors={"job": {"interval": f"{interval}s"}}))
            running.signal(signal.SIGHUP)
            eventually(lambda: _polled(running) == len(kept), 10, 0.02)
            since = time.time()
            time.sleep(1.5 * interval)
            assert _polled(running) == len(kept)
            asked = simulated.do(lambda platform: {call.scope for call in platform.calls if call.at > since})
            assert asked == {str(scope) for scope in kept}
            assert "reload_failed" not in running.log
        finally:
            running.kill()


def _polled(running: Daemon) -> int:
    """Scopes of which the page shows a poller."""
    return len(select(running.metrics(), "blueking_exporter_collector_interval_seconds"))


def _wait_for_handler(running: Daemon, number: signal.Signals) -> None:
    """Until the process catches or ignores the signal (Linux)."""
    assert running.process is not None
    status = Path(f"/proc/{running.process.pid}/status")

    def has_handler() -> bool:
        masks = [int(text, 16) for text in re.findall(r"Sig(?:Ign|Cgt):\s*([0-9a-f]+)", status.read_text())]
        return any(mask >> (number - 1) & 1 for mask in masks)

    eventually(has_handler, 10, 0.001)


def test_ready_once_every_poller_has_tried(tmp_path: Path, simulated: Simulated) -> None:
    """503 while one scope has not finished its first attempt, 200 afterwards, even if the attempt has failed."""
    simulated.fault("latency", value=1.5, bk_scope_type="biz", bk_scope_id="3")
    simulated.fault("permission", bk_scope_type="biz", bk_scope_id="2")
    with daemon(tmp_path, simulated, scopes=[BIZ, OTHER], blueking={"request_timeout": "1s"}) as running:
        running.wait(lambda page: (SUCCESS, frozenset(_owner(BIZ).items())) in page)
        assert running.get("/-/ready")[0] == 503
        assert running.get("/-/healthy")[0] == 200
        running.wait_ready()
        page = running.metrics()
        assert total(page, SUCCESS, **_owner(BIZ)) == total(page, SUCCESS, **_owner(OTHER)) == 0


def _owner(scope: Scope) -> dict[str, str]:
    return {"collector": "job", "bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}


async def test_ready_after_a_minute_all_the_same(tmp_path: Path) -> None:
    """A platform that never answers keeps it from being ready for 60 seconds, no longer; a stop takes it back."""
    ahead = 0.0
    clock = Clock(time.time, lambda: time.monotonic() + ahead)
    platform = Platform()
    platform.faults.add(Fault("blackhole"))
    async with SimulatorServer(platform) as server:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(configuration(server.url, blueking={"request_timeout": "5m"})))
        app = App(Options(file), load(file), clock)
        listening = asyncio.Event()
        running = asyncio.create_task(app.run(lambda addresses: listening.set()))
        await listening.wait()
        assert not app.process.ready()
        ahead = 59.0
        assert not app.process.ready()
        ahead = 60.1
        assert app.process.ready()
        app.stop()
        assert not app.process.ready()
        await running


def test_not_ready_while_the_state_is_being_loaded(tmp_path: Path, simulated: Simulated) -> None:
    """From the first answer on it is 503, also while thousands of scopes are still being set up; and the first page
    has all of them."""
    simulated.fault("blackhole")
    scopes = [Scope("biz", str(number)) for number in range(20_000, 21_500)]
    port = free_port()
    running = Daemon(tmp_path, configuration(simulated.url, scopes), f"--web.listen-address=127.0.0.1:{port}")
    running.spawn()
    try:
        running.url = f"http://127.0.0.1:{port}"
        answers = [eventually(lambda: running.get("/-/ready")[0], 20, 0.005)]
        page = running.metrics()
        answers += [running.get("/-/ready")[0] for _ in range(20)]
        assert set(answers) == {503}
        assert len(select(page, "blueking_exporter_collector_interval_seconds")) == len(scopes)
    finally:
        running.kill()


def test_no_scope_collects_nothing_and_is_ready(tmp_path: Path, simulated: Simulated) -> None:
    """With every collector switched off it is ready at once, and asks BlueKing for nothing."""
    with daemon(tmp_path, simulated, collectors={"job": {"enabled": False}}) as running:
        running.wait_ready()
        assert simulated.calls() == 0


def test_the_first_poll_is_at_once_and_then_the_phase_holds(tmp_path: Path, simulated: Simulated) -> None:
    """Each scope is asked right after the start; from then on at moments an interval apart, spread over it."""
    with daemon(tmp_path, simulated, scopes=[BIZ, OTHER], collectors={"job": {"interval": "1s"}}) as running:
        begun = time.time()
        running.wait_success()
        time.sleep(max(0.0, begun + 4.2 - time.time()))
        running.kill()
        # A baseline takes several calls; afterwards there is one call a poll.
        calls = simulated.do(lambda platform: [(call.scope, call.at) for call in platform.calls])
        phases = {}
        for scope in (BIZ, OTHER):
            times = [at for asked, at in calls if asked == str(scope)]
            assert times[0] < begun + 0.7
            polls = [at for at in times if at > times[0] + 0.5] or times
            gaps = [later - earlier for earlier, later in pairwise(polls[1:])]
            assert gaps
            assert all(0.7 < gap < 1.3 for gap in gaps), times
            phases[scope] = polls[-1] % 1
        apart = abs(phases[BIZ] - phases[OTHER])
        assert 0.05 < apart < 0.95, "polls of different scopes are spread"


def test_one_scope_is_never_polled_twice_at_once(tmp_path: Path, simulated: Simulated) -> None:
    """Polls that take longer than the interval delay the next one and do not pile up."""
    inflight: list[float] = []

    with daemon(tmp_path, simulated, collectors={"job": {"interval": "100ms"}}) as running:
        running.wait_success()
        simulated.fault("latency", value=0.35)
        first = simulated.calls()

        def asked_six_times() -> bool:
            inflight.append(total(running.metrics(), "blueking_exporter_api_inflight_requests"))
            return simulated.calls() - first >= 6

        eventually(asked_six_times, 60, 0.02)
    assert max(inflight) == 1


class Torn(Page):
    """A page that takes nothing from one scope."""

    def change(self, key: Key | None, chunks: Mapping[str, Chunk | None]) -> None:
        if key is not None and key.scope == OTHER:
            raise ValueError("two families of the same name")
        super().change(key, chunks)


async def test_a_page_that_breaks_stops_no_poller() -> None:
    """What one poller cannot show is counted as internal, and polling continues, counts included."""
    platform = Platform(scopes=[OTHER])
    async with SimulatorServer(platform) as server:
        config = upstream.config(
            job=JobPlatform(f"{server.url}/api/bk-job/prod"), auth=Auth("blueking-exporter", Secret("simulated"))
        )
        clock, telemetry, store = Clock(), Telemetry(), MemoryStore()
        async with Client(config, clock, telemetry, log.get()) as client:
            one = ScopeConfig(OTHER, "", Collectors())
            collector = JobCollector.build(one, platforms(client, one), clock)
            assert collector is not None
            services = Services(store, Torn(page_families()), telemetry, clock)
            poller = Poller(collector, Settings(hold=0.0, stale_after=5, request_timeout=2.0), services)
            await poller.poll()
            assert (poller.success, poller.reason) == (False, "internal")
            assert await store.load(poller.key) is not None


def test_process_starts_fast_enough_to_be_looked_at(tmp_path: Path, simulated: Simulated) -> None:
    """The page answers as soon as the log says so, with what is known: the process itself."""
    simulated.fault("blackhole")
    with daemon(tmp_path, simulated) as running:
        page = running.metrics()
        assert total(page, "blueking_exporter_build_info") == 1
        assert total(page, "blueking_exporter_collector_interval_seconds") == pytest.approx(0.2)
        assert not [name for name, _ in page if name == SUCCESS], "nothing is said of a poll that has not ended"
