"""A real Prometheus scrapes the daemon that watches the simulator: what its query API says is the truth."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.model import Scope
from exporter.simulator.world import Outcome, StepScript, Target, target
from tests.support.components import Prometheus, Stack, eventually, free_port, http, require
from tests.support.process import BIZ, FINISHED, OTHER, Daemon, Simulated, configuration, daemon, expected, shown, total

pytestmark = pytest.mark.component

SET = Scope("biz_set", "9001")
NAMES = (
    'quote " back \\ slash',
    "line\nbreak",
    "nul \0 bell \a",
    "bidi \u202e turned",
    "雪",
    "x" * 1_000_000,
)
"""What people and programs call their jobs."""


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    with Simulated(BIZ, SET, OTHER) as running:
        yield running


def mixed(simulated: Simulated, scope: Scope = BIZ, rounds: int = 4) -> None:
    """Executions of every kind: success, failed hosts with and without exit code, a file step."""
    for number in range(rounds):
        for task_type in (0, 1, 2):
            # Hosts of its own for each: all of these end in the same millisecond.
            hosts = [target(100 * task_type + 10 * number + host) for host in range(3)]
            results: dict[Target, Outcome] = {hosts[0]: (104, 3), hosts[1]: 310, hosts[2]: 9}
            step = StepScript(2 if task_type == 2 else 1, 0.0, results if number % 2 else {hosts[0]: 9})
            simulated.start(
                scope, task_type=task_type, launch_mode=1 + number % 3, steps=[step], name=f"kind {task_type}"
            )


def address(running: Daemon) -> str:
    return running.url.removeprefix("http://")


def scraped(prometheus: Prometheus, after: float) -> None:
    """Until Prometheus has a sample of the target that is newer than `after` (unix seconds)."""
    # timestamp() of anything but a selector would be the time of the query.
    eventually(lambda: (prometheus.value("timestamp(up)") or 0) > after and prometheus.value("up") == 1, 20, 0.1)


def stored(prometheus: Prometheus) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every JOB series of its newest scrape, as `samples` would read them off the page."""
    found = {}
    for row in prometheus.query('{__name__=~"blueking_job_.*"}'):
        labels = {name: text for name, text in row["metric"].items() if name not in ("job", "instance")}
        found[labels.pop("__name__"), frozenset(labels.items())] = float(row["value"][1])
    return found


def test_counts_read_back_equal_the_ledger(tmp_path: Path, simulated: Simulated, stack: Stack) -> None:
    """Every JOB series of two scopes as Prometheus has stored it equals the ledger (F49: a business and a set with
    the same executions are kept apart by their labels); every family has its type and help; exemplars have arrived."""
    with daemon(tmp_path, simulated, scopes=[BIZ, SET]) as running:
        running.wait_success()
        running.wait_success(SET)
        since = simulated.do(lambda platform: platform.job.time) - 1
        prometheus = stack.prometheus(
            [address(running)], interval="250ms", arguments=["--enable-feature=exemplar-storage"]
        )
        for scope in (BIZ, SET):
            mixed(simulated, scope)
        for scope in (BIZ, SET):
            running.wait_success(scope)
        scraped(prometheus, time.time())
        page = stored(prometheus)
        for scope in (BIZ, SET):
            assert shown(page, scope) == expected(simulated.truth(scope, since))
            assert sum(shown(page, scope)["finished"].values()) == 12
        assert shown(page, BIZ)["finished"] == shown(page, SET)["finished"]

        metadata = prometheus.json("/api/v1/targets/metadata")["data"]
        own = {row["metric"]: row for row in metadata if row["metric"].startswith("blueking_")}
        assert len(own) > 30
        assert all(row["help"] and row["type"] in ("counter", "gauge", "histogram") for row in own.values())

        around = f"start={time.time() - 60}&end={time.time() + 60}"
        exemplars = prometheus.json(f"/api/v1/query_exemplars?query=blueking_job_host_failures_total&{around}")["data"]
        ids = {int(one["labels"]["job_instance_id"]) for row in exemplars for one in row["exemplars"]}
        known = simulated.do(lambda platform: set(platform.job.ledger.records))
        assert ids
        assert ids <= known


def test_F48_increase_over_a_restart_is_the_true_count(tmp_path: Path, simulated: Simulated, stack: Stack) -> None:
    """kill -9 and a restart between scrapes: increase() finds what happened before, during and after, and no more."""
    config = configuration(simulated.url, server={"listen_address": [f"127.0.0.1:{free_port()}"]})
    running = Daemon(tmp_path, config)
    with running:
        running.wait_success()
        prometheus = stack.prometheus([address(running)], interval="250ms")
        scraped(prometheus, time.time())
        mixed(simulated, rounds=2)
        running.wait_success()
        scraped(prometheus, time.time())
        scraped(prometheus, time.time())
        first = total(running.metrics(), FINISHED)
        mixed(simulated, rounds=1)
        running.wait_success()
        scraped(prometheus, time.time())
        running.kill()
        mixed(simulated, rounds=1)
        running.start()
        running.wait_success()
        mixed(simulated, rounds=1)
        running.wait_success()
        scraped(prometheus, time.time())
        scraped(prometheus, time.time())
        assert total(running.metrics(), FINISHED) == first + 9
        assert prometheus.value(f"sum(resets({FINISHED}[1m]))") == 0
        assert prometheus.value(f"sum({FINISHED})") == first + 9
        # increase() extrapolates to the ends of the range; what was really added is the difference of the ends.
        delta = prometheus.query(f"sum({FINISHED}) - sum(min_over_time({FINISHED}[1m]))")
        assert float(delta[0]["value"][1]) == first + 9
        raised = prometheus.value(f"sum(increase({FINISHED}[1m]))")
        assert raised is not None
        assert raised == pytest.approx(first + 9, rel=0.15)


def test_a_new_series_is_born_at_zero(tmp_path: Path, simulated: Simulated, stack: Stack) -> None:
    """The first failure with a code that was never seen is visible to increase(), since its series was 0 before."""
    with daemon(tmp_path, simulated, counter_birth_hold="2s") as running:
        running.wait_success()
        prometheus = stack.prometheus([address(running)], interval="250ms")
        scraped(prometheus, time.time())
        simulated.start(steps=[StepScript(results={target(1): (104, 42)}, duration=0.0)])
        running.wait_success()
        series = 'blueking_job_host_exit_codes_total{exit_code="42"}'
        eventually(lambda: prometheus.value(series) == 1, 20, 0.2)
        assert prometheus.value(f"min_over_time({series}[1m])") == 0
        assert (prometheus.value(f"increase({series}[1m])") or 0) > 0


@pytest.mark.parametrize("form", ["text", "openmetrics"])
def test_promtool_finds_nothing(tmp_path: Path, simulated: Simulated, form: str) -> None:
    """`promtool check metrics` is clean on JOB and self metrics; it reads the classic text, which OpenMetrics is but
    for exemplars, units and `_created`."""
    promtool = require("promtool")
    accept = {"text": "text/plain", "openmetrics": "application/openmetrics-text;version=1.0.0"}[form]
    with daemon(tmp_path, simulated) as running:
        running.wait_success()
        mixed(simulated)
        running.wait_success()
        status, body = running.get("/metrics", headers={"Accept": accept})
    assert status == 200
    if form == "openmetrics":
        lines = body.decode().splitlines()
        assert lines[-1] == "# EOF"
        body = "\n".join(_as_classic(lines)).encode() + b"\n"
    done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False, timeout=30)
    # What prometheus_client says of the process has the names that every Python program uses.
    complaints = [line for line in done.stderr.decode().splitlines() if not line.startswith(("process_", "python_"))]
    assert complaints == []
    assert done.returncode == 0 or done.stderr


def _as_classic(lines: list[str]) -> Iterator[str]:
    """OpenMetrics without what the classic parser does not know."""
    counters = {line.split()[2] for line in lines if line.startswith("# TYPE") and line.endswith(" counter")}
    for line in lines:
        if line.startswith("# ") and line.split()[1] in ("HELP", "TYPE") and line.split()[2] in counters:
            mark, kind, name, rest = line.split(" ", 3)
            yield f"{mark} {kind} {name}_total {rest}"
        elif not line.startswith(("# EOF", "# UNIT")) and "_created" not in line.split("{")[0]:
            yield line.split(" # {")[0]


def test_F09_F10_hostile_names_do_not_break_the_scrape(tmp_path: Path, simulated: Simulated, stack: Stack) -> None:
    """Names with quotes, line feeds, NUL, bidi marks, half a surrogate or a megabyte, and invalid UTF-8 on the wire:
    `up` stays 1, the counts are right."""
    watch = [{"name": "*", "as": 'evil "name" \\ with {braces}'}]
    simulated.fault("invalid_utf8", every=3)
    simulated.fault("lone_surrogate", every=2)
    config = configuration(simulated.url, collectors={"job": {"watch": watch}})
    config["scopes"][0]["name"] = 'scope "two" \\ 二'
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        prometheus = stack.prometheus([address(running)], interval="250ms")
        for name in NAMES:
            simulated.start(name=name, steps=[StepScript(name=name[:100], duration=0.0, results={target(1): (104, 1)})])
        running.wait_success()
        scraped(prometheus, time.time())
        scraped(prometheus, time.time())
        assert prometheus.value("min_over_time(up[30s])") == 1
        assert prometheus.value(f'sum({FINISHED}{{status="failed"}})') == len(NAMES)
        assert prometheus.value('blueking_scope_info{name=~"(?s).*二.*"}') == 1
        status, body = running.get("/api/v1/failures")
        assert status == 200
        assert body.decode().count('"job_instance_id"') >= len(NAMES)


def test_F49_one_business_twice_is_two_sets_of_series(tmp_path: Path, simulated: Simulated) -> None:
    """biz/3 and biz_set/9001 with equal numbers of executions: no series comes twice in either format."""
    with daemon(tmp_path, simulated, scopes=[OTHER, SET]) as running:
        running.wait_success(OTHER)
        running.wait_success(SET)
        for scope in (OTHER, SET):
            mixed(simulated, scope, rounds=2)
            running.wait_success(scope)
        page = running.metrics()
        assert shown(page, OTHER)["finished"] == shown(page, SET)["finished"]
        headers = {"Accept": "application/openmetrics-text"}
        lines = http(f"{running.url}/metrics", headers=headers)[1].decode().splitlines()
        names = [line.rpartition(" # ")[0] or line for line in lines if not line.startswith("#")]
        series = [name.rpartition(" ")[0] for name in names]
        assert len(series) == len(set(series))
