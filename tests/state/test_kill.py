"""kill -9 at any moment: nothing is lost, nothing is counted twice, no counter that was seen falls."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sqlite3
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from exporter.collectors.job.state import JobState
from exporter.model import Scope
from exporter.simulator.platform import Platform
from exporter.simulator.world import Outcome, StepScript, target
from tests.support.components import eventually
from tests.support.process import Daemon, Samples, Simulated, configuration, expected, shown, total

LANES = 2
"""Daemons that are killed side by side, each with a scope of its own."""
KINDS = (
    ("restart-app", 1, None),
    ("clean-logs", 1, None),
    ("push-config", 2, None),
    ("nightly", 0, 1001),
    ("weekly", 0, 1002),
)
"""Name, task type, plan. Each has hosts of its own: whether the success of one plan is asked for its hosts depends on
what fails at that moment, and a poll that catches up sees many moments as one."""
OUTCOMES: tuple[Outcome, ...] = (*[9] * 36, (104, 1), (104, 127), 310, 303)


class Traffic:
    """Some 20 short executions a second in one scope, planned ahead; `stop` ends it."""

    def __init__(self, simulated: Simulated, scope: Scope, seed: int) -> None:
        self.scope = scope
        self.running = True
        self._random = random.Random(seed)
        self._simulated = simulated
        simulated.do(self._happen)

    def stop(self) -> None:
        self.running = False

    def _happen(self, platform: Platform) -> None:
        if not self.running:
            return
        draw, world = self._random, platform.job
        # At times several in one millisecond, or a row that is committed late.
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            kind = draw.randrange(len(KINDS))
            name, task_type, plan = KINDS[kind]
            hosts = [target(10 * kind + host) for host in range(4)]
            steps = [
                StepScript(
                    2 if task_type == 2 else 1,
                    draw.uniform(0, 0.4),
                    {host: draw.choice(OUTCOMES) for host in draw.sample(hosts, draw.randint(1, 3))},
                )
                for _ in range(draw.choice((1, 1, 2)))
            ]
            late = draw.randrange(700) if draw.random() < 0.05 else 0
            world.start(
                self.scope, name=name, task_type=task_type, launch_mode=draw.choice((1, 2, 3)),
                plan_id=plan, steps=steps,
                pending_for=draw.uniform(0, 0.1), visible_from=world.time + late,
            )  # fmt: skip
        world.at(world.time + int(draw.expovariate(1 / 100)), lambda: self._happen(platform))

    def retry(self, counted: Mapping[int, float]) -> bool:
        """Retry one execution of whose failure the daemon says that it has counted it (id → end, unix seconds)."""

        def retry(platform: Platform) -> bool:
            world = platform.job
            for number, end in counted.items():
                row = world.find(self.scope, number)
                if row and row.status == 4 and row.end_time == round(end * 1000):
                    failed = next(step for step in row.steps if step.status == 4)
                    if failed.execute_count == 0:
                        world.retry(number, duration=0.2, results={result.target: 9 for result in failed.results})
                        return True
            return False

        return self._simulated.do(retry)


@dataclass
class Lane:
    """The history of one daemon."""

    rounds: int = 0
    served: int = 0
    scrapes: int = 0
    executions: int = 0
    highest: dict[object, float] = field(default_factory=dict)
    last: Samples = field(default_factory=dict)


def no_counter_fell(lane: Lane, page: Samples) -> None:
    """Compare the counters of 4.2 with the highest value that was ever seen."""
    lane.scrapes += 1
    seen = 0
    for key, value in page.items():
        name = key[0]
        if not name.startswith("blueking_job_") or not name.endswith(("_total", "_count", "_bucket", "_sum")):
            continue
        seen += 1
        assert value >= lane.highest.get(key, 0.0), f"{key} fell from {lane.highest[key]} to {value}"
        lane.highest[key] = value
    assert seen or not lane.highest, "the counters are gone"


def kill_again_and_again(folder: Path, simulated: Simulated, scope: Scope, rounds: int, seed: int) -> Lane:
    """Many short runs of one daemon; then one quiet one, in which everything must be as the ledger has it."""
    draw, lane = random.Random(seed), Lane()
    simulated.start(scope, name="long", steps=[StepScript(duration=8.0, results={target(1): 9})])
    changes = {"collectors": {"job": {"interval": "100ms", "lookback": "10s"}}}
    daemon = Daemon(folder, configuration(simulated.url, [scope], **changes))
    watermark = "blueking_exporter_collector_watermark_timestamp_seconds"
    try:
        daemon.start()
        daemon.wait_success(scope)
        since_ms = simulated.do(lambda platform: platform.job.time)
        time.sleep(0.002)
        traffic = Traffic(simulated, scope, seed)
        while lane.rounds < rounds:
            kind = draw.random()
            if kind < 0.15:
                # Before or while it starts.
                time.sleep(draw.uniform(0, 0.7))
            else:
                daemon.url = eventually(daemon.address, 20, 0.01)
                lane.served += 1
                first = None
                end = time.monotonic() + draw.uniform(0, 0.5)
                while True:
                    page = daemon.metrics()
                    no_counter_fell(lane, page)
                    lane.last = page
                    now, mark = time.monotonic(), total(page, watermark)
                    first = mark if first is None else first
                    # Most lives end soon after a commit, however slow the machine is: so there is progress to lose.
                    if now > end and (kind < 0.4 or mark > first or now > end + 5):
                        break
                    time.sleep(0.02)
                failures = json.loads(daemon.get("/api/v1/failures")[1])["executions"]
                traffic.retry({failed["job_instance_id"]: failed["end_time"] for failed in failures})
            time.sleep(draw.uniform(0, 0.02))
            daemon.kill()
            lane.rounds += 1
            daemon.spawn()
        traffic.stop()
        daemon.url = eventually(daemon.address, 20, 0.01)

        def all_ended() -> bool:
            return not simulated.truth(scope).unfinished

        eventually(all_ended, 30)
        truth = simulated.truth(scope, since_ms)
        lane.executions = sum(truth.finished.values())
        ended = simulated.do(lambda platform: platform.job.time) / 1000
        in_time = sum(shown(lane.last, scope)["finished"].values())
        assert in_time > lane.executions / 2, "the lives were too short to get on"
        # A poll that is complete may be a slice of what is to be caught up.
        eventually(lambda: total(daemon.metrics(), watermark) > ended, 60)
        page = daemon.wait_success(scope)
        no_counter_fell(lane, page)
        assert shown(page, scope) == expected(truth)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    return lane


def side_by_side(folder: Path, rounds: int, seed: int) -> list[Lane]:
    scopes = [Scope("biz", str(2 + lane)) for lane in range(LANES)]
    with Simulated(*scopes) as simulated, ThreadPoolExecutor(LANES) as pool:
        lanes = []
        for index, scope in enumerate(scopes):
            own = folder / str(index)
            own.mkdir()
            lanes.append(pool.submit(kill_again_and_again, own, simulated, scope, rounds // LANES, seed + index))
        return [lane.result() for lane in lanes]


def report(lanes: list[Lane]) -> None:
    """Figures for those who ask with --log-cli-level=INFO."""
    for name in ("rounds", "served", "scrapes", "executions"):
        logging.getLogger(__name__).info("%s: %d", name, sum(getattr(lane, name) for lane in lanes))


@pytest.mark.timeout(240)
def test_F39_fifty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """After 50 kills at random moments every count equals the ledger, and no counter that was seen ever fell."""
    lanes = side_by_side(tmp_path, 50, 20260101)
    report(lanes)
    assert sum(lane.rounds for lane in lanes) == 50
    assert sum(lane.executions for lane in lanes) > 500


@pytest.mark.parametrize("ended_by", ["kill -9", "SIGTERM"])
def test_F39_the_end_of_a_quiet_daemon_costs_nothing_but_reading_again(tmp_path: Path, ended_by: str) -> None:
    """Polls that found nothing new are not committed one by one. After `kill -9` an older watermark is continued: what
    happened meanwhile is counted once, there is no gap, and no counter falls. SIGTERM commits the newest one."""
    scope = Scope("biz", "2")
    gap = "blueking_exporter_collector_gap_seconds_total"
    watermark = "blueking_exporter_collector_watermark_timestamp_seconds"
    with Simulated(scope) as simulated:
        changes = {"collectors": {"job": {"interval": "100ms", "lookback": "1s"}}, "counter_birth_hold": "0s"}
        daemon = Daemon(tmp_path, configuration(simulated.url, [scope], **changes))
        try:
            daemon.start()
            daemon.wait_success(scope)
            since_ms = simulated.do(lambda platform: platform.job.time)
            time.sleep(0.002)
            lane = Lane()
            for _ in range(4):
                simulated.start(scope, steps=[StepScript(duration=0.0, results={target(1): (104, 1)})])
                eventually(lambda: no_news(daemon, tmp_path), 20, 0.05)
                page = daemon.metrics()
                no_counter_fell(lane, page)
                stored, seen = committed(tmp_path), total(page, watermark)
                if ended_by == "SIGTERM":
                    assert daemon.stop() == 0
                    assert committed(tmp_path) >= seen
                else:
                    daemon.kill()
                    assert committed(tmp_path) == stored < seen
                simulated.start(scope, steps=[StepScript(duration=0.0, results={target(2): 9})])
                daemon.start()
                page = daemon.wait_success(scope)
                no_counter_fell(lane, page)
                assert shown(page, scope) == expected(simulated.truth(scope, since_ms))
                assert total(page, gap) == 0
        finally:
            daemon.kill()


def committed(folder: Path) -> float:
    """The watermark in the state file."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'state.db'}?mode=ro", uri=True)) as db:
        ((payload,),) = db.execute("SELECT payload FROM state").fetchall()
    return msgspec.msgpack.decode(payload, type=JobState).watermark or 0.0


def no_news(daemon: Daemon, folder: Path) -> bool:
    """Whether a poll of a second ago and all since have found nothing new."""
    return total(daemon.metrics(), "blueking_exporter_collector_watermark_timestamp_seconds") - committed(folder) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_F39_kill_soak_200(tmp_path: Path) -> None:
    """The same for 200 kills, with another seed each time."""
    lanes = side_by_side(tmp_path, 200, random.SystemRandom().randrange(10**9))
    report(lanes)
    assert sum(lane.rounds for lane in lanes) == 200
