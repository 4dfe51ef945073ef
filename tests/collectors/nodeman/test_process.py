"""NodeMan and the daemon as a real process: kill -9, once, probe, and a real Prometheus that joins it with JOB.

The platform's clock runs fast: its own background task comes by every 30 of its seconds.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.model import Scope
from exporter.simulator import nodeman_api
from exporter.simulator.nodeman_world import Job, NodemanWorld, Target, steps_of
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import Outcome, StepScript
from exporter.simulator.world import Target as JobTarget
from tests.support.components import Stack, eventually, free_port, http
from tests.support.process import (
    BIZ,
    OTHER,
    PROGRAM,
    Daemon,
    Samples,
    Simulated,
    by_labels,
    command,
    configuration,
    environment,
    samples,
    select,
    total,
)

SPEED = 30.0
HOSTS = [Target(2, f"10.2.0.{number}", number) for number in range(1, 31)]
WATERMARK = "blueking_exporter_collector_watermark_timestamp_seconds"
TYPES = ("INSTALL_AGENT", "RESTART_AGENT", "MAIN_INSTALL_PLUGIN")


class Fast(Simulated):
    """A platform whose clock runs so many times faster than ours, from the present moment on.

    `subscription_ids`: those that are watched; each job has one too.
    """

    subscription_ids = ""

    def __init__(self, *scopes: Scope) -> None:
        super().__init__(*scopes)
        begun = time.time()
        self.platform = Platform(scopes=scopes or (BIZ,), now=lambda: begun + (time.time() - begun) * SPEED)
        self._server = SimulatorServer(self.platform)

    @property
    def nodeman(self) -> NodemanWorld:
        return nodeman_api.world_of(self.platform)

    def now(self) -> float:
        return self.platform.now()

    def act(self, work: Callable[[NodemanWorld], Any]) -> Any:
        """Do something in the world, in the simulator's thread."""
        return self.do(lambda platform: work(self.nodeman))

    def ledger(self, since: float = 0.0, biz: int = 2) -> dict[str, Any]:
        """The truth as another process reads it."""
        status, body = http(
            f"{self.url}/-/nodeman/ledger?bk_biz_id={biz}&subscription_ids={self.subscription_ids}&since={since}"
        )
        assert status == 200
        told: dict[str, Any] = json.loads(body)
        return told


def watching(url: str, scopes: list[Scope], **changes: Any) -> dict[str, Any]:
    """A configuration that watches all of NodeMan in these scopes, and not JOB."""
    collectors = {
        "job": {"enabled": False},
        "nodeman_job": {"enabled": True, "interval": "100ms"},
        "nodeman_subscription": {"enabled": True, "interval": "100ms", "subscription_ids": [11]},
        "nodeman_task": {"enabled": True, "interval": "100ms", "job_ids": [181]},
    }
    platforms = {"nodeman": {"url": f"{url}/api/bk-nodeman/prod"}, "nodeman_legacy": {"url": url}}
    return configuration(url, scopes, **{"collectors": collectors, "blueking": platforms, **changes})


@pytest.fixture
def fast() -> Iterator[Fast]:
    with Fast(BIZ, OTHER) as running:
        yield running


def shown(page: Samples) -> dict[str, Any]:
    """The values of NodeMan on a page for business 2, in the form of `expected`."""
    own = {"bk_scope_type": "biz", "bk_scope_id": "2"}

    def read(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return by_labels(page, f"blueking_nodeman_{name}", labels, **own)

    failure = ("collector", "job_type", "step", "code")
    return {
        "jobs_finished": read("jobs_finished_total", "job_type", "status"),
        "jobs_unfinished": read("jobs_unfinished", "job_type", "status"),
        "job_instances": read("job_instances", "job_type", "status"),
        "host_failures": read("host_failures_total", *failure),
        "hosts_failing": read(
            "host_failing_since_timestamp_seconds", "collector", "bk_cloud_id", "bk_host_id", "ip", *failure[1:]
        ),
    }


def expected(truth: dict[str, Any]) -> dict[str, Any]:
    """What a page must show, by the ledger. When a host of 1.x ended nobody tells: it is when it was seen."""

    def since(row: dict[str, Any]) -> Any:
        return pytest.approx(row["since"], abs=1e9 if row["collector"] == "nodeman_task" else 1)

    def labels(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(text for name, text in row.items() if name not in ("value", "since"))

    return {
        name: {labels(row): since(row) if name == "hosts_failing" else row["value"] for row in rows}
        for name, rows in truth.items()
    }


class Traffic:
    """Two or three jobs a second on NodeMan; `retry` runs one again whose end has been seen for sure."""

    def __init__(self, fast: Fast, seed: int) -> None:
        self.fast = fast
        self.random = random.Random(seed)
        self.running = True
        self.jobs: list[Job] = []
        fast.act(self._happen)

    def _happen(self, world: NodemanWorld) -> None:
        if not self.running:
            return
        draw = self.random
        job_type = draw.choice(TYPES)
        steps = [step.code for step in steps_of(job_type)]
        hosts = draw.sample(HOSTS, draw.randint(1, 6))
        outcomes = {host: draw.choice([None, None, None, draw.choice(steps)]) for host in hosts}
        duration = draw.uniform(5, 40)
        self.jobs.append(
            world.start_job(job_type, outcomes, duration=duration, pending=draw.uniform(0, 10), jitter=0.4)
        )
        world.plan(world.now() + draw.expovariate(1 / 12), lambda: self._happen(world))

    def retry(self, before: float) -> bool:
        def retry(world: NodemanWorld) -> bool:
            world.advance()
            for job in self.jobs[-60:]:
                ended = job.end_time is not None and job.end_time < before - 5
                if ended and job.status in ("FAILED", "PART_FAILED") and len(job.task_ids) == 1:
                    world.retry(job, duration=20)
                    return True
            return False

        return bool(self.fast.act(retry))


def kill_again_and_again(folder: Path, fast: Fast, rounds: int, seed: int) -> dict[str, float]:
    """Many short runs of one daemon, then a quiet one in which everything must be as the ledger has it."""
    draw = random.Random(seed)
    highest: dict[object, float] = {}
    retried = scrapes = 0
    collectors = {"nodeman_subscription": {"enabled": False}, "nodeman_task": {"enabled": False}}
    daemon = Daemon(folder, watching(fast.url, [BIZ], collectors=collectors | {"nodeman_job": {"interval": "100ms"}}))
    config = watching(fast.url, [BIZ])
    config["collectors"] |= collectors
    daemon.write(config)

    def look() -> float:
        nonlocal scrapes
        page = daemon.metrics()
        scrapes += 1
        for key, value in page.items():
            if "_nodeman_" in key[0] and key[0].endswith(("_total", "_bucket", "_count", "_sum")):
                assert value >= highest.get(key, 0.0), f"{key} fell"
                highest[key] = value
        return total(page, WATERMARK)

    try:
        daemon.start()
        daemon.wait_polled(fast.now(), collector="nodeman_job")
        since = fast.now()
        traffic = Traffic(fast, seed)
        for _ in range(rounds):
            kind = draw.random()
            if kind < 0.15:
                time.sleep(draw.uniform(0, 0.6))
            else:
                daemon.url = eventually(daemon.address, 20, 0.01)
                first, end = look(), time.monotonic() + draw.uniform(0, 0.5)
                # Most lives end soon after a commit, so that there is progress to lose.
                while not (time.monotonic() > end and (kind < 0.4 or look() > first or time.monotonic() > end + 5)):
                    time.sleep(0.02)
                retried += traffic.retry(look())
            daemon.kill()
            daemon.spawn()
        traffic.running = False
        daemon.url = eventually(daemon.address, 20, 0.01)
        eventually(lambda: not fast.ledger()["jobs_unfinished"], 30)
        daemon.wait_polled(fast.now(), collector="nodeman_job")
        look()
        page, truth = daemon.metrics(), fast.ledger(since)
        told, true = shown(page), expected(truth)
        for name in told:
            assert told[name] == true[name], name
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    jobs = sum(row["value"] for row in truth["jobs_finished"])
    failures = sum(row["value"] for row in truth["host_failures"])
    return {"jobs": jobs, "failures": failures, "retried": retried, "scrapes": scrapes}


@pytest.mark.timeout(240)
def test_F39_nodeman_kills_lose_and_double_nothing(
    tmp_path: Path, fast: Fast, record_property: Callable[[str, object], None]
) -> None:
    """After 15 kills at random moments every count of NodeMan equals the ledger, and no counter ever fell."""
    result = kill_again_and_again(tmp_path, fast, 15, 20260202)
    for name, value in result.items():
        record_property(name, value)
    assert result["jobs"] > 15
    assert result["retried"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_F39_nodeman_kill_soak_100(tmp_path: Path, fast: Fast, record_property: Callable[[str, object], None]) -> None:
    """The same for 100 kills, with another seed each time."""
    for name, value in kill_again_and_again(tmp_path, fast, 100, random.SystemRandom().randrange(10**9)).items():
        record_property(name, value)


def populate(fast: Fast) -> None:
    """A failure for each of the three collectors."""

    def begin(world: NodemanWorld) -> None:
        hosts = {HOSTS[0]: "install_package", HOSTS[1]: None}
        world.start_subscription("MAIN_INSTALL_PLUGIN", dict(hosts), duration=30)
        world.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT", HOSTS[1]: None}, duration=30)

    fast.act(begin)
    fast.subscription_ids = "11"


def once(file: Path) -> tuple[int, Samples]:
    done = command("once", f"--config.file={file}")
    assert "Traceback" not in done.stderr
    return done.returncode, samples(done.stdout)


def test_once_covers_nodeman(tmp_path: Path, fast: Fast) -> None:
    """All three collectors are polled once, and a second call counts what happened since."""
    populate(fast)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(watching(fast.url, [BIZ])))
    code, page = once(file)
    assert code == 0
    assert total(page, "blueking_nodeman_subscription_instances", subscription_id="11") == 2
    assert total(page, "blueking_nodeman_task_hosts", job_id="181") == 2
    since = fast.now()
    fast.act(lambda world: world.start_job("INSTALL_AGENT", {HOSTS[5]: "install"}, duration=20))
    eventually(lambda: fast.ledger(since)["jobs_finished"], 10)
    code, page = once(file)
    assert code == 0
    assert shown(page)["jobs_finished"] == {("INSTALL_AGENT", "failed"): 1}
    assert shown(page)["host_failures"][("nodeman_job", "INSTALL_AGENT", "install", "")] == 1


def test_probe_covers_nodeman(tmp_path: Path, fast: Fast) -> None:
    """A line per collector and scope with its cost; a missing permission by name; what 1306201 may mean."""
    populate(fast)
    file = tmp_path / "config.yaml"
    config = watching(fast.url, [BIZ])
    config["collectors"]["nodeman_job"] |= {"interval": "1m", "job_ids": [181]}
    config["collectors"]["nodeman_task"]["interval"] = "1m"
    file.write_text(json.dumps(config))
    fast.act(lambda world: world.start_job("INSTALL_AGENT", {HOSTS[5]: "install"}, duration=5, created_by="ann"))
    eventually(lambda: not fast.ledger()["jobs_unfinished"], 10)
    done = command("probe", f"--config.file={file}")
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.split()[1].startswith("nodeman")}
    assert done.returncode == 0
    assert set(lines) == {"nodeman_job", "nodeman_subscription", "nodeman_task"}
    # Two calls a minute, and the job with a failing host every five.
    assert f" {2 * 1440 + 288} API calls per day" in lines["nodeman_job"]
    assert " 1440 API calls per day" in lines["nodeman_task"]

    fast.act(lambda world: world.denied.add(2))
    fast.act(lambda world: setattr(world, "legacy", False))
    done = command("probe", f"--config.file={file}")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1
    assert "job_details: permission" in lines["nodeman_job"]
    assert "missing permission: task_history_view" in lines["nodeman_job"]
    assert lines["nodeman_subscription"].startswith("ok")
    assert "code 1306201" in lines["nodeman_task"]
    assert "NodeMan 2.x no longer has" in lines["nodeman_task"]


# Real Prometheus

FAILS_IN_BOTH = """
  (
      blueking_job_host_failing_since_timestamp_seconds
    * on (code, reason) group_left ()
      blueking_job_status_code_info{category="agent"}
  )
and on (bk_scope_type, bk_scope_id, bk_host_id)
  blueking_nodeman_host_failing_since_timestamp_seconds{bk_host_id!=""}
"""
"""Hosts that fail in JOB because of their agent, and on which NodeMan has failed too."""


@pytest.mark.component
def test_prometheus_reads_nodeman_back_and_joins_it_with_job(tmp_path: Path, fast: Fast, stack: Stack) -> None:
    """What is stored equals the ledger; one query finds the hosts that fail in JOB by their agent and in NodeMan."""
    populate(fast)
    config = watching(fast.url, [BIZ, OTHER])
    config["collectors"]["job"] = {"enabled": True, "interval": "200ms"}
    with Daemon(tmp_path, config) as daemon:
        # The platform shows the newest task of a subscription only: let the first be over, and seen, before the next.
        eventually(lambda: len(fast.ledger()["hosts_failing"]) == 2, 20)
        for collector in ("job", "nodeman_job", "nodeman_subscription", "nodeman_task"):
            daemon.wait_polled(fast.now(), collector=collector)
        since = fast.now()
        prometheus = stack.prometheus([daemon.url.removeprefix("http://")], interval="250ms")
        # 7: agent trouble in JOB, install failed. 8: agent trouble only. 9: script and NodeMan. 10: NodeMan only.
        # 301 of the other business has agent trouble here and fails in NodeMan there.
        job: dict[int, Outcome] = {7: 310, 8: 310, 9: (104, 1)}
        results = {JobTarget(bk_host_id=host, ip=f"10.2.0.{host}"): outcome for host, outcome in job.items()}
        fast.start(BIZ, steps=[StepScript(duration=0.0, results=results)])
        fast.act(
            lambda world: world.start_job(
                "INSTALL_AGENT", dict.fromkeys((HOSTS[6], HOSTS[8], HOSTS[9]), "install"), duration=20
            )
        )
        fast.act(lambda world: world.run_task(world.subscriptions[11], {HOSTS[20]: "install_package"}, duration=20))
        eventually(lambda: fast.ledger(since)["jobs_finished"], 20)
        # All six have failed: three in the job, two in the subscription, one in the task of 1.x.
        eventually(lambda: len(fast.ledger()["hosts_failing"]) == 6, 20)
        mark = fast.now()
        for collector in ("job", "nodeman_job", "nodeman_subscription", "nodeman_task"):
            daemon.wait_polled(mark, collector=collector)
        begun = time.time()
        eventually(lambda: (prometheus.value("timestamp(up)") or 0) > begun, 20)

        found = {}
        for row in prometheus.query('{__name__=~"blueking_nodeman_.*"}'):
            labels = {name: text for name, text in row["metric"].items() if name not in ("job", "instance")}
            # A label without a value is none to Prometheus.
            labels = {"code": "", "bk_host_id": ""} | labels
            found[labels.pop("__name__"), frozenset(labels.items())] = float(row["value"][1])
        told = shown(found)
        truth = expected(fast.ledger())
        # What had failed before is known, and not counted.
        assert told["hosts_failing"] == truth["hosts_failing"]
        assert told["job_instances"] == truth["job_instances"]
        assert told["jobs_finished"] == expected(fast.ledger(since))["jobs_finished"]
        metadata = prometheus.json("/api/v1/targets/metadata")["data"]
        kinds = {row["metric"]: row["type"] for row in metadata if row["metric"].startswith("blueking_nodeman_")}
        assert set(kinds.values()) == {"counter", "gauge", "histogram"}

        both = prometheus.query(FAILS_IN_BOTH)
        assert [(row["metric"]["bk_host_id"], row["metric"]["reason"]) for row in both] == [("7", "gse_agent_abnormal")]


def test_demo_shows_nodeman(tmp_path: Path) -> None:
    """Jobs, a policy and a task of 1.x are on the page of `demo` within 20 seconds, with hosts that fail."""
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [*PROGRAM, "demo", f"--web.listen-address={address}"], stdout=output, stderr=output, env=environment()
        )
    try:

        def complete() -> bool:
            page = samples(http(f"http://{address}/metrics")[1].decode())
            names = ("job_instances", "subscription_instances", "task_hosts", "hosts_failing")
            assert all(total(page, f"blueking_nodeman_{name}") > 0 for name in names)
            success = select(page, "blueking_exporter_collector_success")
            polled = {dict(labels)["collector"] for labels, value in success.items() if value == 1}
            return polled == {"job", "nodeman_job", "nodeman_subscription", "nodeman_task"}

        eventually(complete, 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
