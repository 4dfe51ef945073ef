"""From a failure on the platform to the pager, over real servers: simulator, daemon, Prometheus, Alertmanager, webhook.

Rules and Alertmanager's configuration are the shipped ones; only their waiting times are shorter.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
import yaml

from exporter.model import Scope
from exporter.simulator.world import StepScript, target
from mixin.render import HERE, evaluate, render
from tests.support.components import LOOPBACK, Prometheus, Server, Stack, eventually, http, require
from tests.support.process import BIZ, OTHER, Daemon, Simulated, daemon, select

pytestmark = pytest.mark.component

FAST = {
    "collectorFailingFor": "10s",
    "platformUnreachableFor": "1s",
    "staleFor": "2s",
    "agentOutageFor": "1s",
    "failureRateFor": "5s",
}
HOST = target(1)
GSE_AGENT_ABNORMAL = 310


class Pager:
    """A webhook of Alertmanager: what it was sent, each alert with the receiver that it came for."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        pager = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                pager.sent += [{**alert, "receiver": message["receiver"]} for alert in message["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}/"

    def __enter__(self) -> Pager:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def got(self, status: str, name: str = "") -> list[dict[str, Any]]:
        return [
            alert for alert in self.sent if alert["status"] == status and name in ("", alert["labels"]["alertname"])
        ]


def example(pager: Pager) -> str:
    """mixin/alertmanager.yml, quick, with a webhook in every receiver."""
    config = yaml.safe_load((HERE / "alertmanager.yml").read_text(encoding="utf-8"))
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s", "repeat_interval": "1h"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": pager.url, "send_resolved": True}]
    return json.dumps(config)


def quick_rules(folder: pathlib.Path) -> list[pathlib.Path]:
    """The rules, rendered from the same sources with shorter times."""
    files = []
    for path, content in render(FAST).items():
        if path.startswith("mixin/prometheus/"):
            files.append(folder / pathlib.Path(path).name)
            files[-1].write_text(content, encoding="utf-8")
    return files


class Chain(NamedTuple):
    """Three of its links; Alertmanager is behind the pager."""

    exporter: Daemon
    prometheus: Prometheus
    pager: Pager


@contextmanager
def chain(
    folder: pathlib.Path, stack: Stack, simulated: Simulated, scopes: Sequence[Scope], interval: str
) -> Iterator[Chain]:
    changes = {"counter_birth_hold": "2s", "collectors": {"job": {"interval": interval}}}
    with Pager() as pager, daemon(folder, simulated, scopes=scopes, **changes) as exporter:
        exporter.wait_ready()
        alertmanager = stack.alertmanager(config=example(pager))
        address = exporter.url.removeprefix("http://")
        prometheus = stack.prometheus([address], rules=quick_rules(folder), alertmanager=alertmanager)
        eventually(lambda: prometheus.value("count(blueking_exporter_collector_success == 1)") == len(scopes), 20)
        yield Chain(exporter, prometheus, pager)


def run(simulated: Simulated, result: int) -> None:
    """One execution of a plan on one host."""
    step = StepScript(duration=0.2, results={HOST: result})
    simulated.start(BIZ, name="nightly-backup", task_type=0, plan_id=1001, steps=[step])


def test_a_failing_host_pages_and_resolves(tmp_path: pathlib.Path, stack: Stack) -> None:
    """Within 15 s of the third failure the owner of the business is paged with host and reason, and told when it is
    over."""
    with (
        Simulated(BIZ, OTHER) as simulated,
        chain(tmp_path, stack, simulated, (BIZ, OTHER), "1s") as (_, prometheus, pager),
    ):
        run(simulated, GSE_AGENT_ABNORMAL)
        run(simulated, GSE_AGENT_ABNORMAL)
        time.sleep(3)
        assert pager.sent == []

        began = time.monotonic()
        run(simulated, GSE_AGENT_ABNORMAL)
        name = "BlueKingJobHostRepeatedlyFailing"
        (alert,) = eventually(lambda: pager.got("firing", name), 15)
        paged = time.monotonic() - began
        labels = alert["labels"]
        expected = {
            "bk_scope_type": "biz",
            "bk_scope_id": "2",
            "bk_cloud_id": "0",
            "bk_host_id": str(HOST.bk_host_id),
            "ip": HOST.ip,
            "code": "310",
            "reason": "gse_agent_abnormal",
        }
        assert expected.items() <= labels.items()
        assert alert["receiver"] == "business-2"
        for text in (alert["annotations"]["summary"], alert["annotations"]["summary_zh"]):
            assert str(HOST.ip) in text
            assert f"Scope {BIZ}" in text
            assert "3" in text
        assert "gse_agent_abnormal" in alert["annotations"]["summary"]
        for link, language in (("failures_url", "en"), ("failures_url_zh", "zh")):
            status, page = http(alert["annotations"][link])
            assert status == 200
            assert str(HOST.ip).encode() in page
            assert f'lang="{language}'.encode() in page

        began = time.monotonic()
        run(simulated, 9)
        (over,) = eventually(lambda: pager.got("resolved", name), 15)
        resolved = time.monotonic() - began
        assert over["fingerprint"] == alert["fingerprint"]
        assert {one["labels"]["alertname"] for one in pager.sent} == {name}
        # The series was born with the first failure, and its first event is seen too.
        seen = prometheus.value('increase(blueking_job_host_failures_total{code="310"}[1m])')
        assert seen == pytest.approx(3, abs=0.5)
    print(f"paged after {paged:.1f} s, resolved after {resolved:.1f} s")  # noqa: T201


def test_a_dead_platform_is_one_alert(tmp_path: pathlib.Path, stack: Stack) -> None:
    """When a platform with 40 businesses stops answering, one alert is sent; none about single businesses, and none
    about the host that was failing before, though its series are gone."""
    scopes = [BIZ, *(Scope("biz", str(number)) for number in range(100, 139))]
    with Simulated(*scopes) as simulated, chain(tmp_path, stack, simulated, scopes, "2s") as (exporter, _, pager):
        for _ in range(3):
            run(simulated, GSE_AGENT_ABNORMAL)
        eventually(lambda: pager.got("firing", "BlueKingJobHostRepeatedlyFailing"), 15)
        simulated.fault("blackhole")
        (alert,) = eventually(lambda: pager.got("firing", "BlueKingPlatformUnreachable"), 25)
        assert alert["receiver"] == "operators"
        # Longer than gauges live, and than each of the alerts about single scopes waits.
        time.sleep(12)
        assert not select(exporter.metrics(), "blueking_job_host_consecutive_failures")
        assert len(pager.sent) == 2, [(one["status"], one["labels"]) for one in pager.sent]


INHIBITED = [
    ("BlueKingPlatformUnreachable", {}, "BlueKingJobHostRepeatedlyFailing", {"bk_scope_id": "2"}, True),
    ("BlueKingPlatformUnreachable", {}, "BlueKingDataStale", {"bk_scope_id": "2", "collector": "job"}, True),
    ("BlueKingPlatformUnreachable", {}, "BlueKingExporterStateNotWritten", {}, False),
    ("BlueKingDataStale", {"bk_scope_id": "2", "collector": "job"}, "BlueKingJobStuck", {"bk_scope_id": "2"}, True),
    ("BlueKingDataStale", {"bk_scope_id": "2", "collector": "job"}, "BlueKingJobStuck", {"bk_scope_id": "3"}, False),
    (
        "BlueKingDataStale",
        {"bk_scope_id": "2", "collector": "job"},
        "BlueKingNodemanJobStuck",
        {"bk_scope_id": "2"},
        False,
    ),
    (
        "BlueKingDataStale",
        {"bk_scope_id": "2", "collector": "nodemgr"},
        "BlueKingNodemanJobStuck",
        {"bk_scope_id": "2"},
        True,
    ),
    (
        "BlueKingJobAgentOutage",
        {"bk_scope_id": "2"},
        "BlueKingJobHostRepeatedlyFailing",
        {"bk_scope_id": "2", "reason": "gse_agent_abnormal"},
        True,
    ),
    (
        "BlueKingJobAgentOutage",
        {"bk_scope_id": "2"},
        "BlueKingJobHostRepeatedlyFailing",
        {"bk_scope_id": "2", "reason": "script_nonzero_exit"},
        False,
    ),
]


def test_the_example_of_alertmanager_inhibits_explained_alerts(stack: Stack) -> None:
    """Of two alerts that fire together, the second is inhibited if, and only if, the first one explains it."""
    components = {
        rule["alert"]: rule["labels"]["component"]
        for group in evaluate()["prometheusAlerts"]["groups"]
        for rule in group["rules"]
    }

    def labels(name: str, given: Mapping[str, str], instance: str) -> dict[str, str]:
        scope = {"bk_scope_type": "biz"} if "bk_scope_id" in given else {}
        return {
            "alertname": name,
            "component": components[name],
            "job": "blueking",
            "instance": instance,
            **scope,
            **given,
        }

    with Pager() as pager:
        alertmanager = stack.alertmanager(config=example(pager))
        # An exporter of its own for each pair, so that they do not meet.
        for number, (greater, its, lesser, own, _) in enumerate(INHIBITED):
            post(alertmanager, [labels(greater, its, str(number)), labels(lesser, own, str(number))])

        def silenced() -> dict[str, bool]:
            return {
                alert["labels"]["instance"]: bool(alert["status"]["inhibitedBy"])
                for alert in alertmanager.json("/api/v2/alerts")
                if alert["labels"]["alertname"] == INHIBITED[int(alert["labels"]["instance"])][2]
            }

        wanted = {str(number): inhibited for number, (*_, inhibited) in enumerate(INHIBITED)}
        eventually(lambda: silenced() == wanted, 15)


def post(alertmanager: Server, alerts: Sequence[Mapping[str, str]]) -> None:
    body = json.dumps([{"labels": labels} for labels in alerts]).encode()
    status, answer = http(alertmanager.url + "/api/v2/alerts", body, headers={"Content-Type": "application/json"})
    assert status == 200, answer


def test_the_example_of_alertmanager_routes_by_business() -> None:
    """amtool accepts the example; its routes send a business to its owner, the exporter to its operators."""
    amtool, file = require("amtool"), str(HERE / "alertmanager.yml")
    assert subprocess.run([amtool, "check-config", file], capture_output=True, check=False).returncode == 0

    def route(**labels: str) -> str:
        argv = [amtool, "config", "routes", "test", f"--config.file={file}", *(f"{k}={v}" for k, v in labels.items())]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    assert route(component="job", bk_scope_type="biz", bk_scope_id="2") == "business-2"
    assert route(component="job", bk_scope_type="biz", bk_scope_id="3") == "operators"
    assert route(component="exporter", bk_scope_type="biz", bk_scope_id="2") == "operators"
