"""Rules and alerts by promtool: what is shipped is what the sources say, and every alert fires, is silent, resolves."""

from __future__ import annotations

import json
import pathlib
import subprocess
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from exporter.collectors import COLLECTORS
from exporter.web.query import failure_filter
from mixin.render import HERE, evaluate, render
from tests.support.components import require
from tests.support.paths import GOLDEN, ROOT

PAGES = GOLDEN / "pages.yml"
MIXIN = evaluate()
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in MIXIN["prometheusAlerts"]["groups"] for rule in group["rules"]
}
GROUPS = [group["name"] for part in ("prometheusRules", "prometheusAlerts") for group in MIXIN[part]["groups"]]

TARGET = {"job": "blueking", "instance": "exporter:10071"}
BIZ = {**TARGET, "bk_scope_type": "biz", "bk_scope_id": "2"}
OTHER = {**TARGET, "bk_scope_type": "biz", "bk_scope_id": "3"}
JOB = {**BIZ, "collector": "job"}
HOST = {**BIZ, "bk_cloud_id": "0", "bk_host_id": "101", "ip": "10.0.0.1"}
BACKUP = {**BIZ, "job_name": "nightly-backup"}
AGENT = {"code": "310", "reason": "gse_agent_abnormal"}


def series(name: str, labels: Mapping[str, str], values: str) -> dict[str, str]:
    """An input of promtool; a sample every 30 s: `0x10` are eleven, `_x10` is nothing for ten, `stale` the end."""
    inside = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


@dataclass(frozen=True)
class Case:
    """`expect`: (time, the label sets that fire then), beside severity and component. The page shown at `page` is
    compared with the golden file."""

    alert: str
    about: str
    given: Sequence[dict[str, str]]
    expect: Sequence[tuple[str, Sequence[Mapping[str, str]]]]
    page: str = ""
    known: Sequence[dict[str, str]] = field(
        default=(
            series("blueking_scope_info", {**BIZ, "name": "Demo business"}, "1x1000"),
            series(
                "blueking_job_status_code_info",
                {**TARGET, **AGENT, "category": "agent", "text_zh": "GSE Agent异常"},
                "1x1000",
            ),
        )
    )


def finished(status: str, values: str) -> dict[str, str]:
    labels = {**BIZ, "task_type": "script", "launch_mode": "api", "status": status}
    return series("blueking_job_executions_finished_total", labels, values)


def poller(
    scope: Mapping[str, str], success: str, last: str = "0+30x1000", collector: str = "job"
) -> list[dict[str, str]]:
    labels = {**scope, "collector": collector}
    return [
        series("blueking_exporter_collector_success", labels, success),
        series("blueking_exporter_collector_last_success_timestamp_seconds", labels, last),
        series("blueking_exporter_collector_interval_seconds", labels, "30x1000"),
    ]


def watched(outcome: str, values: str) -> dict[str, str]:
    labels = {**BACKUP, "outcome": outcome}
    return series("blueking_job_watched_last_finished_timestamp_seconds", labels, values)


def failing(values: str, since: str) -> list[dict[str, str]]:
    return [
        series("blueking_job_host_consecutive_failures", HOST, values),
        series("blueking_job_host_failing_since_timestamp_seconds", {**HOST, **AGENT}, since),
    ]


def installs(job_type: str, values: str) -> dict[str, str]:
    labels = {**BIZ, "collector": "nodeman_job", "job_type": job_type, "step": "push_upgrade_package", "code": ""}
    return series("blueking_nodeman_host_failures_total", labels, values)


def owned(owned: str, instance: str = "exporter:10071") -> list[dict[str, str]]:
    """Scopes that a replica has, of 17 in the configuration."""
    labels = {**TARGET, "instance": instance}
    return [
        series("blueking_exporter_scopes_owned", labels, owned),
        series("blueking_exporter_scopes_configured", labels, "17x100"),
    ]


def replica(values: str, sha256: str, instance: str = "exporter:10071") -> list[dict[str, str]]:
    labels = {**TARGET, "instance": instance}
    return [
        series("blueking_exporter_config_info", {**labels, "sha256": sha256}, values),
        series("blueking_exporter_lease_valid", labels, "1x200"),
    ]


def shard(ordinal: int, total: int, times: str, pod: str = "") -> list[dict[str, str]]:
    labels = {**TARGET, "instance": f"exporter-{ordinal}{pod}:10071"}
    return [
        series("blueking_exporter_shard_ordinal", labels, f"{ordinal}{times.replace(' 1x', f' {ordinal}x')}"),
        series("blueking_exporter_total_shards", labels, f"{total}{times.replace(' 1x', f' {total}x')}"),
    ]


MANY = [{**TARGET, "bk_scope_type": "biz", "bk_scope_id": str(number)} for number in range(2, 52)]
STEP = {**BIZ, "collector": "nodeman_job", "step": "push_upgrade_package"}
V3_STEP = {**BIZ, "collector": "nodemgr", "step": "wait_gse_ready"}
MAX_AGE = series("blueking_job_watched_max_age_seconds", BACKUP, "3600x1000")

CASES = [
    Case(
        "BlueKingExporterDown",
        "the target does not answer for 5 minutes",
        [series("up", TARGET, "1x10 0x20 1x20")],
        [("10m", []), ("11m", [TARGET]), ("17m", [])],
        page="11m",
    ),
    Case("BlueKingExporterDown", "there is no target at all", [], [("4m", []), ("6m", [{}])]),
    Case(
        "BlueKingPlatformUnreachable",
        "all 50 businesses fail, in one alert",
        [one for scope in MANY for one in poller(scope, "1x10 0x20 1x20")]
        + poller(BIZ, "1x100", collector="nodeman_job"),
        [("5m30s", []), ("8m", [TARGET]), ("17m", [])],
        page="8m",
    ),
    Case(
        "BlueKingPlatformUnreachable",
        "polls of all businesses hang, but have not failed yet",
        [one for scope in MANY for one in poller(scope, "1x100", "0+30x10 300x20 960+30x20")],
        [("6m30s", []), ("8m", [TARGET]), ("17m", [])],
    ),
    Case(
        "BlueKingPlatformUnreachable",
        "one business still answers",
        [*poller(BIZ, "0x100"), *poller(OTHER, "1x100")],
        [("20m", [])],
    ),
    Case(
        "BlueKingCollectorFailing",
        "one business fails for 15 minutes",
        [*poller(BIZ, "1x10 0x40 1x20"), *poller(OTHER, "1x100")],
        [("20m", []), ("21m", [JOB]), ("26m", [])],
        page="21m",
    ),
    Case(
        "BlueKingCollectorFailing",
        "all 50 businesses fail",
        [one for scope in MANY for one in poller(scope, "0x100")],
        [("30m", [])],
    ),
    Case(
        "BlueKingDataStale",
        "polls hang for ten minutes",
        [*poller(BIZ, "1x100", "0+30x10 300x19 930+30x50"), *poller(OTHER, "1x100")],
        [("7m", []), ("8m", [JOB]), ("16m", [])],
        page="8m",
    ),
    Case(
        "BlueKingDataStale",
        "all 50 businesses fail",
        [one for scope in MANY for one in poller(scope, "1x10 0x100", "0+30x10 300x100")],
        [("30m", [])],
    ),
    Case(
        "BlueKingDataStale",
        "polls of all 50 businesses hang",
        [one for scope in MANY for one in poller(scope, "1x100", "0+30x10 300x100")],
        [("30m", [])],
    ),
    Case(
        "BlueKingPermissionLost",
        "the first refusal, in a series that is born at zero",
        [series("blueking_exporter_collector_errors_total", {**JOB, "reason": "permission"}, "_x10 0x2 1x100")],
        [("6m", []), ("7m", [{**TARGET, "collector": "job", "reason": "permission"}]), ("22m", [])],
        page="7m",
    ),
    Case(
        "BlueKingPermissionLost",
        "another error is no refusal",
        [series("blueking_exporter_collector_errors_total", {**JOB, "reason": "timeout"}, "0x2 0+1x100")],
        [("7m", [])],
    ),
    Case(
        "BlueKingHistoryGap",
        "ten minutes are given up",
        [series("blueking_exporter_collector_gap_seconds_total", JOB, "0x10 600x300")],
        [("5m", []), ("6m", [JOB]), ("70m", [])],
        page="6m",
    ),
    Case(
        "BlueKingHistoryGap",
        "the exporter was away for longer than max_catchup, and Prometheus saw nothing meanwhile",
        [series("blueking_exporter_collector_gap_seconds_total", JOB, "_x200 86400x300")],
        [("99m", []), ("101m", [JOB]), ("162m", [])],
    ),
    Case(
        "BlueKingHistoryGap",
        "a restart as another pod brings an old gap along",
        [
            series(
                "blueking_exporter_collector_gap_seconds_total", {**JOB, "instance": "10.1.0.1:10071"}, "600x200 stale"
            ),
            series(
                "blueking_exporter_collector_gap_seconds_total", {**JOB, "instance": "10.1.0.2:10071"}, "_x201 600x300"
            ),
        ],
        [("102m", []), ("130m", [])],
    ),
    Case(
        "BlueKingHistoryTruncated",
        "one execution was counted without its hosts",
        [series("blueking_exporter_collector_truncated_total", JOB, "0x10 1x300")],
        [("5m", []), ("6m", [JOB]), ("70m", [])],
        page="6m",
    ),
    Case(
        "BlueKingExporterRateLimited",
        "the gateway says 429 for ten minutes",
        [
            series(
                "blueking_exporter_api_requests_total",
                {**TARGET, "api": "job_list", "code": "429"},
                "0x9 0+5x20 100x100",
            ),
            series("blueking_exporter_api_requests_total", {**TARGET, "api": "job_list", "code": "200"}, "0+5x1000"),
        ],
        [("5m", []), ("12m", [TARGET]), ("32m", [])],
        page="12m",
    ),
    Case(
        "BlueKingExporterRateLimited",
        "the refusal stands under HTTP 200",
        [series("blueking_exporter_collector_errors_total", {**JOB, "reason": "rate_limited"}, "0x2 0+1x100")],
        [("8m", [TARGET])],
    ),
    Case(
        "BlueKingExporterUnknownValues",
        "the first one, in a series that is not born at zero",
        [series("blueking_exporter_unknown_values_total", {**TARGET, "field": "job.status"}, "_x10 1x300")],
        [("4m30s", []), ("6m", [{**TARGET, "field": "job.status"}]), ("70m", [])],
        page="6m",
    ),
    Case(
        "BlueKingExporterSeriesLimit",
        "forty hosts are cut",
        [
            series(
                "blueking_exporter_series_dropped_total",
                {**TARGET, "family": "blueking_job_host_consecutive_failures"},
                "_x10 40x300",
            )
        ],
        [("4m30s", []), ("6m", [{**TARGET, "family": "blueking_job_host_consecutive_failures"}]), ("70m", [])],
        page="6m",
    ),
    Case(
        "BlueKingExporterStateNotWritten",
        "one transaction fails",
        [series("blueking_exporter_state_write_errors_total", TARGET, "0x10 1x100")],
        [("5m", []), ("6m", [TARGET]), ("22m", [])],
        page="6m",
    ),
    Case(
        "BlueKingExporterLeaseLost",
        "the store does not answer one replica for two minutes",
        [
            series("blueking_exporter_lease_valid", TARGET, "1x10 0x6 1x20"),
            series("blueking_exporter_lease_valid", {**TARGET, "instance": "exporter:2"}, "1x40"),
        ],
        [("5m", []), ("7m", [TARGET]), ("9m", [])],
        page="7m",
    ),
    Case(
        "BlueKingExporterLeaseLost",
        "a frozen replica wakes",
        [series("blueking_exporter_lease_valid", TARGET, "1x10 0 1x20")],
        [("6m", [])],
    ),
    Case(
        "BlueKingExporterScopesUnowned",
        "one of two replicas is gone, and nobody takes over",
        owned("10x10 stale") + owned("7x30 17x60", "exporter:2"),
        [("5m", []), ("8m", [{"job": "blueking"}]), ("20m", [])],
        page="8m",
    ),
    Case(
        "BlueKingExporterScopesUnowned",
        "a killed replica is taken over within a minute",
        owned("10x10 stale") + owned("7x11 17x40", "exporter:2"),
        [("6m", []), ("8m", [])],
    ),
    Case(
        "BlueKingExporterConfigDiffers",
        "one of two replicas keeps the old configuration for an hour",
        replica("1x200", "a")
        + replica("1x10 stale", "a", "exporter:2")
        + replica("_x10 1x120 stale", "b", "exporter:2")
        + replica("_x131 1x60", "a", "exporter:2"),
        [("20m", []), ("40m", [{"job": "blueking"}]), ("70m", [])],
        page="40m",
    ),
    Case(
        "BlueKingExporterConfigDiffers",
        "two exporters that share nothing",
        [
            series("blueking_exporter_config_info", {**TARGET, "instance": name, "sha256": name}, "1x200")
            for name in "ab"
        ],
        [("40m", [])],
    ),
    Case(
        "BlueKingExporterShards",
        "F47: shard 1 of 3 is missing for ten minutes",
        shard(0, 3, "x60") + shard(1, 3, "x10 stale _x20 1x30") + shard(2, 3, "x60"),
        [("4m", []), ("12m", [{"job": "blueking"}]), ("20m", [])],
        page="12m",
    ),
    Case(
        "BlueKingExporterShards",
        "F47: shard 0 runs twice and shard 1 not at all",
        shard(0, 2, "x60") + shard(0, 2, "x60", "twin"),
        [("4m", []), ("6m", [{"job": "blueking"}])],
    ),
    Case(
        "BlueKingExporterShards",
        "F47: they disagree on how many they are",
        shard(0, 2, "x60") + shard(1, 3, "x60"),
        [("6m", [{"job": "blueking"}])],
    ),
    Case("BlueKingExporterShards", "one process alone", shard(0, 1, "x60"), [("10m", [])]),
    Case(
        "BlueKingExporterReloadFailed",
        "a bad file is loaded, then a good one",
        [series("blueking_exporter_config_last_reload_successful", TARGET, "1x10 0x20 1x20")],
        [("6m", []), ("7m", [TARGET]), ("17m", [])],
        page="7m",
    ),
    Case(
        "BlueKingJobFailureRateHigh",
        "half of the executions fail for half an hour",
        [finished("success", "0+1x300"), finished("failed", "0x20 0+1x60 60x200")],
        [("10m", []), ("35m", [BIZ]), ("80m", [])],
        page="35m",
    ),
    Case(
        "BlueKingJobFailureRateHigh",
        "the first failures of a business, in a series that is born at zero",
        [finished("success", "0x100"), finished("failed", "0x10 12x100")],
        [("5m", []), ("11m", [BIZ])],
    ),
    Case(
        "BlueKingJobFailureRateHigh",
        "three executions, all failed, are too few",
        [finished("success", "0x100"), finished("failed", "0x10 3x100")],
        [("11m", []), ("20m", [])],
    ),
    Case(
        "BlueKingJobHostRepeatedlyFailing",
        "three failures in a row, then a success",
        failing("1x4 2x4 3x20 stale", "100x30 stale"),
        [("4m30s", []), ("5m", [{**HOST, **AGENT}]), ("16m", [])],
        page="5m",
    ),
    Case(
        "BlueKingJobAgentOutage",
        "twenty hosts have lost their agent, others fail for other reasons",
        [
            series("blueking_job_hosts_failing", {**BIZ, "code": "1", "reason": "agent_abnormal"}, "0x4 15x20 0x20"),
            series("blueking_job_hosts_failing", {**BIZ, **AGENT}, "0x8 5x20 0x20"),
            series("blueking_job_hosts_failing", {**OTHER, "code": "104", "reason": "script_nonzero_exit"}, "100x100"),
        ],
        [("6m", []), ("7m", [BIZ]), ("14m", [])],
        page="7m",
    ),
    Case(
        "BlueKingJobStuck",
        "one runs for two hours, one waits for a person",
        [
            series("blueking_job_oldest_unfinished_timestamp_seconds", {**BIZ, "status": "running"}, "0x300 stale"),
            series("blueking_job_oldest_unfinished_timestamp_seconds", {**BIZ, "status": "waiting_user"}, "0x1000"),
            series("blueking_job_oldest_unfinished_timestamp_seconds", {**BIZ, "status": "rolling_waiting"}, "0x1000"),
        ],
        [("2h5m", []), ("2h6m", [{**BIZ, "status": "running"}]), ("2h32m", [])],
        page="2h6m",
    ),
    Case(
        "BlueKingJobWatchedOverdue",
        "the last success is older than max_age",
        [MAX_AGE, watched("success", "0x140 4200x200")],
        [("60m", []), ("61m", [BACKUP]), ("72m", [])],
        page="61m",
    ),
    Case(
        "BlueKingJobWatchedOverdue",
        "a success has never been seen: the time counts from when the job was first watched",
        [MAX_AGE, watched("failure", "1800x1000"), watched("success", "_x140 4200x200")],
        [("59m", []), ("61m", [BACKUP]), ("72m", [])],
    ),
    Case(
        "BlueKingJobWatchedFailed",
        "a failure after a success, then a success again",
        [watched("failure", "_x10 300x100"), watched("success", "0x40 1230x60")],
        [("4m30s", []), ("6m", [{**BACKUP, "outcome": "failure"}]), ("21m", [])],
        page="6m",
    ),
    Case(
        "BlueKingJobWatchedFailed",
        "the very first execution fails",
        [watched("failure", "_x10 300x100")],
        [("4m30s", []), ("6m", [{**BACKUP, "outcome": "failure"}])],
    ),
    Case(
        "BlueKingNodemanInstallFailing",
        "the first three failures of a step, in a series that is born at zero",
        [installs("INSTALL_AGENT", "_x10 0x2 2x300"), installs("MAIN_INSTALL_PLUGIN", "_x10 0x4 1x300")],
        [("7m", []), ("8m", [STEP]), ("70m", [])],
        page="8m",
    ),
    Case(
        "BlueKingNodemanInstallFailing",
        "to uninstall is no install",
        [installs("UNINSTALL_AGENT", "0x2 10x300")],
        [("8m", [])],
    ),
    Case(
        "BlueKingNodemanJobStuck",
        "a job runs for more than an hour",
        [series("blueking_nodeman_oldest_unfinished_timestamp_seconds", BIZ, "0x150 stale")],
        [("65m", []), ("66m", [BIZ]), ("77m", [])],
        page="66m",
    ),
    Case(
        "BlueKingNodemanJobStuck",
        "a workflow of NodeMan V3 runs for more than an hour, jobs of 2.x beside it do not",
        [
            series("blueking_nodeman_oldest_unfinished_timestamp_seconds", BIZ, "0x20 stale"),
            series("blueking_nodemgr_oldest_unfinished_timestamp_seconds", {**BIZ, "domain": "node"}, "0x150 stale"),
        ],
        [("65m", []), ("66m", [{**BIZ, "domain": "node"}]), ("77m", [])],
    ),
    Case(
        "BlueKingNodemanInstallFailing",
        "installs of NodeMan V3",
        [
            series(
                "blueking_nodeman_host_failures_total",
                {**V3_STEP, "job_type": "install_agent", "code": "failed"},
                "_x10 0x4 3x300",
            )
        ],
        [("7m", []), ("8m", [V3_STEP])],
    ),
    Case(
        "BlueKingNodemanSubscriptionFailing",
        "two instances fail, then none",
        [
            series(
                "blueking_nodeman_subscription_instances",
                {**BIZ, "subscription_id": "7", "status": "failed"},
                "0x4 2x40 0x40",
            ),
            series(
                "blueking_nodeman_subscription_instances", {**BIZ, "subscription_id": "7", "status": "success"}, "9x100"
            ),
        ],
        [("12m", []), ("13m", [{**BIZ, "subscription_id": "7"}]), ("24m", [])],
        page="13m",
    ),
]


def promtool(folder: pathlib.Path, tests: Sequence[dict[str, Any]]) -> str:
    """What `promtool test rules` complains of; empty when all is as expected."""
    document = {
        "rule_files": ["rules.yml", "alerts.yml"],
        "evaluation_interval": "30s",
        "group_eval_order": GROUPS,
        "tests": tests,
    }
    (folder / "tests.yml").write_text(json.dumps(document))
    argv = [require("promtool"), "test", "rules", "tests.yml"]
    result = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def expected(case: Case, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"exp_labels": {**ALERTS[case.alert]["labels"], **labels}, "exp_annotations": dict(annotations or {})}


def test_rendered_files_are_those_of_the_sources() -> None:
    """What lies in prometheus/ and grafana/ is what jsonnet makes of the sources, no more and no less."""
    files = render()
    assert {path: (ROOT / path).read_text(encoding="utf-8") for path in files} == files
    lying = {str(file.relative_to(ROOT)) for folder in ("prometheus", "grafana") for file in (HERE / folder).iterdir()}
    assert lying == {path for path in files if path.startswith("mixin/")}


@pytest.mark.component
def test_promtool_accepts_the_rendered_rules() -> None:
    """Recording rules and alerts parse."""
    files = [str(HERE / "prometheus" / name) for name in ("rules.yml", "alerts.yml")]
    argv = [require("promtool"), "check", "rules", *files]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.component
def test_every_alert_fires_is_silent_and_resolves(tmp_path: pathlib.Path) -> None:
    """Each alert at the times of its cases, by promtool; texts are left out here."""
    bare = json.loads(json.dumps(MIXIN["prometheusAlerts"]))
    for group in bare["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "alerts.yml").write_text(json.dumps(bare))
    (tmp_path / "rules.yml").write_text((HERE / "prometheus/rules.yml").read_text())
    tests = [
        {
            "name": f"{case.alert}: {case.about}",
            "interval": "30s",
            "input_series": list(case.given),
            "alert_rule_test": [
                {"eval_time": at, "alertname": case.alert, "exp_alerts": [expected(case, one) for one in alerts]}
                for at, alerts in case.expect
            ],
        }
        for case in CASES
    ]
    assert not promtool(tmp_path, tests)


def test_every_alert_has_cases() -> None:
    """Over all its cases every alert is silent before it fires, fires, and is silent again; one case shows its page."""
    for name in ALERTS:
        cases = [case for case in CASES if case.alert == name]
        assert any(
            [bool(alerts) for _, alerts in case.expect] == [False, True, False]
            or [bool(alerts) for _, alerts in case.expect][:3] == [False, True, False]
            for case in cases
        ), name
        assert sum(bool(case.page) for case in cases) == 1, name


@pytest.mark.component
def test_pages_say_what_the_golden_file_says(tmp_path: pathlib.Path) -> None:
    """Summary, description and runbook of every alert as somebody gets them, in both languages, names looked up."""
    golden = yaml.safe_load(PAGES.read_text(encoding="utf-8"))
    assert list(golden) == list(ALERTS)
    for name in ("rules.yml", "alerts.yml"):
        (tmp_path / name).write_text((HERE / "prometheus" / name).read_text(encoding="utf-8"), encoding="utf-8")
    tests = []
    for case in CASES:
        if not case.page:
            continue
        (labels,) = dict(case.expect)[case.page]
        alert = expected(case, labels, golden[case.alert])
        tests.append(
            {
                "interval": "30s",
                "input_series": [*case.given, *case.known],
                "alert_rule_test": [{"eval_time": case.page, "alertname": case.alert, "exp_alerts": [alert]}],
            }
        )
    assert not promtool(tmp_path, tests)


LINKED = {
    "BlueKingJobFailureRateHigh",
    "BlueKingJobHostRepeatedlyFailing",
    "BlueKingJobAgentOutage",
    "BlueKingJobWatchedOverdue",
    "BlueKingJobWatchedFailed",
    "BlueKingNodemanInstallFailing",
    "BlueKingNodemanSubscriptionFailing",
}
"""Alerts about failed executions and hosts, which the page /failures lists."""


def test_alerts_have_their_labels_and_annotations() -> None:
    """Severity, component, texts in both languages, a runbook of the same name, a link to the failures."""
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity", "component"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        texts = rule["annotations"]
        wanted = ["summary", "description", "runbook_url", *(["failures_url"] if name in LINKED else [])]
        assert texts.keys() == {f"{text}{language}" for text in wanted for language in ("", "_zh")}
        for language, key in (("en", "runbook_url"), ("zh", "runbook_url_zh")):
            assert texts[key].endswith(f"/{language}/runbooks/{name}.md")
        for text in ("summary_zh", "description_zh"):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in texts[text])


def test_links_to_failures_have_known_parameters() -> None:
    """The page refuses other parameters; the collector, where the link has one, is one that exists."""
    for name in LINKED:
        for language, key in (("en", "failures_url"), ("zh", "failures_url_zh")):
            address = urllib.parse.urlsplit(ALERTS[name]["annotations"][key])
            assert address.path == "/failures"
            query = dict(urllib.parse.parse_qsl(address.query, strict_parsing=True))
            assert query.pop("lang") == language
            failure_filter({**query, "bk_scope_type": "biz", "bk_scope_id": "2"})
            collectors = {kind.name for kind in COLLECTORS} | {"{{ $labels.collector }}"}
            assert query.pop("collector", "job") in collectors


def test_settings_reach_the_rules() -> None:
    """A threshold, a duration and an address from outside are in the rendered alert."""
    settings = {
        "hostConsecutiveFailures": 7,
        "collectorFailingFor": "3s",
        "exporterUrl": "https://exporter.example.com",
    }
    changed = evaluate(settings)["prometheusAlerts"]
    rules = {rule["alert"]: rule for group in changed["groups"] for rule in group["rules"]}
    assert ">= 7" in rules["BlueKingJobHostRepeatedlyFailing"]["expr"]
    assert rules["BlueKingCollectorFailing"]["for"] == "3s"
    link = rules["BlueKingJobAgentOutage"]["annotations"]["failures_url"]
    assert link.startswith("https://exporter.example.com/failures?")
