"""The catalogue: exactly the metrics that the contract names, with these types and labels, on the page and in the
reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exporter.exposed import page_families
from exporter.metrics.family import SCOPE_LABELS, Family
from exporter.metrics.negotiate import Format
from exporter.reference import reference
from exporter.simulator.world import Outcome, StepScript, Target, target
from exporter.telemetry import PROCESS_FAMILIES, SHARING_FAMILIES
from tests.support.parsers import parse
from tests.support.process import BIZ, Daemon, Simulated, configuration

JOB = """
blueking_job_executions_created_total counter task_type launch_mode
blueking_job_executions_finished_total counter task_type launch_mode status
blueking_job_executions_reopened_total counter
blueking_job_executions_lost_total counter
blueking_job_executions_unfinished gauge task_type status
blueking_job_oldest_unfinished_timestamp_seconds gauge status
blueking_job_execution_duration_seconds histogram task_type
blueking_job_execution_wait_seconds histogram task_type
blueking_job_last_finished_timestamp_seconds gauge outcome
blueking_job_step_failures_total counter step_type
blueking_job_host_results_total counter
blueking_job_host_failures_total counter code reason
blueking_job_host_exit_codes_total counter exit_code
blueking_job_hosts_failing gauge code reason
blueking_job_host_failing_since_timestamp_seconds gauge bk_cloud_id bk_host_id ip code reason
blueking_job_host_consecutive_failures gauge bk_cloud_id bk_host_id ip
blueking_job_watched_last_finished_timestamp_seconds gauge job_name outcome
blueking_job_watched_last_duration_seconds gauge job_name
blueking_job_watched_unfinished gauge job_name
blueking_job_watched_unfinished_since_timestamp_seconds gauge job_name
blueking_job_watched_max_age_seconds gauge job_name
"""
"""Contract 4.2, with the labels besides the scope's. `status_code_info` has no scope and stands below."""

NODEMAN = """
blueking_nodeman_jobs_finished_total counter job_type status
blueking_nodeman_jobs_unfinished gauge job_type status
blueking_nodeman_oldest_unfinished_timestamp_seconds gauge
blueking_nodeman_job_instances gauge job_type status
blueking_nodeman_watched_job_instances gauge job_id job_type status
blueking_nodeman_watched_job_status gauge job_id job_type status
blueking_nodeman_job_duration_seconds histogram job_type
blueking_nodeman_subscription_instances gauge subscription_id status
blueking_nodeman_subscription_last_finished_timestamp_seconds gauge subscription_id
blueking_nodeman_task_hosts gauge job_id job_type status
blueking_nodeman_task_hosts_by_os gauge job_id job_type os_type
blueking_nodeman_host_failures_total counter collector job_type step code
blueking_nodeman_hosts_failing gauge collector job_type step code
blueking_nodeman_host_failing_since_timestamp_seconds gauge collector bk_cloud_id bk_host_id ip job_type step code
blueking_nodeman_step_duration_seconds histogram job_type step
blueking_nodemgr_workflows_finished_total counter domain workflow_type status
blueking_nodemgr_workflows_reopened_total counter domain
blueking_nodemgr_workflows_lost_total counter domain
blueking_nodemgr_workflows_unfinished gauge domain workflow_type
blueking_nodemgr_oldest_unfinished_timestamp_seconds gauge domain
blueking_nodemgr_workflow_duration_seconds histogram domain workflow_type
"""
"""Contract 4.3."""

POLLERS = """
blueking_exporter_collector_success gauge
blueking_exporter_collector_last_success_timestamp_seconds gauge
blueking_exporter_collector_interval_seconds gauge
blueking_exporter_collector_duration_seconds gauge
blueking_exporter_collector_watermark_timestamp_seconds gauge
blueking_exporter_collector_gap_seconds_total counter
blueking_exporter_collector_truncated_total counter
blueking_exporter_collector_errors_total counter reason
blueking_exporter_api_circuit_open gauge
blueking_exporter_hosts_untracked gauge
"""
"""Contract 4.4, per collector and scope; with the labels besides `collector` and the scope's."""

UNSCOPED = """
blueking_job_status_code_info gauge code reason category text_zh
"""

PROCESS_WIDE = """
blueking_exporter_api_requests_total counter api code
blueking_exporter_api_request_duration_seconds histogram api
blueking_exporter_api_retries_total counter api
blueking_exporter_api_throttle_seconds_total counter
blueking_exporter_api_inflight_requests gauge
blueking_exporter_api_quota_remaining gauge api
blueking_exporter_api_clock_skew_seconds gauge
blueking_exporter_state_resets_total counter
blueking_exporter_unknown_values_total counter field
blueking_exporter_series gauge family
blueking_exporter_series_dropped_total counter family
blueking_exporter_state_writes_total counter
blueking_exporter_state_write_errors_total counter
blueking_exporter_state_last_write_timestamp_seconds gauge
blueking_exporter_discovery_scopes gauge scope_type
blueking_exporter_discovery_last_success_timestamp_seconds gauge
blueking_exporter_discovery_errors_total counter reason
blueking_exporter_state_bytes gauge
blueking_exporter_render_duration_seconds gauge
blueking_exporter_exposition_bytes gauge
blueking_exporter_event_loop_lag_seconds gauge
blueking_exporter_config_last_reload_successful gauge
blueking_exporter_config_last_reload_success_timestamp_seconds gauge
blueking_exporter_config_info gauge sha256
blueking_exporter_shard_ordinal gauge
blueking_exporter_total_shards gauge
blueking_exporter_build_info gauge version python_version
blueking_exporter_replicas gauge phase
blueking_exporter_scopes_owned gauge
blueking_exporter_scopes_configured gauge
blueking_exporter_lease_valid gauge
blueking_exporter_lease_remaining_seconds gauge
blueking_exporter_takeovers_total counter cause
blueking_exporter_fenced_total counter
blueking_exporter_state_rollbacks_total counter
blueking_exporter_state_roundtrip_seconds histogram
blueking_exporter_state_replicas_acked gauge
"""

PROCESS = (*PROCESS_FAMILIES, *SHARING_FAMILIES)

Row = tuple[str, tuple[str, ...]]
"""Type and labels."""


def table(text: str, *owner: str) -> dict[str, Row]:
    rows = (line.split() for line in text.strip().splitlines())
    return {name: (kind, tuple(sorted((*owner, *labels)))) for name, kind, *labels in rows}


SCOPED = table("blueking_scope_info gauge name", *SCOPE_LABELS)
WATCHED = table(JOB, *SCOPE_LABELS) | table(NODEMAN, *SCOPE_LABELS)
OWN = table(POLLERS, "collector", *SCOPE_LABELS)
WITHOUT_SCOPE = table(UNSCOPED) | table(PROCESS_WIDE)
CONTRACT = WATCHED | SCOPED | OWN | WITHOUT_SCOPE


def declared(families: tuple[Family, ...], *owner: str) -> dict[str, Row]:
    return {family.name: (family.kind, tuple(sorted((*owner, *family.labels)))) for family in families}


def test_the_catalogue_is_that_of_the_contract() -> None:
    """Names, types and labels of everything that can be on the page, no more and no less."""
    of_page = {family.name: family for family in page_families()}
    unscoped = table(UNSCOPED)
    assert of_page.keys() == CONTRACT.keys() - table(PROCESS_WIDE).keys()
    for name, family in of_page.items():
        owner = () if name in unscoped else ("collector", *SCOPE_LABELS) if name in OWN else SCOPE_LABELS
        labels = tuple(sorted({*owner, *family.labels}))
        assert (family.kind, labels) == CONTRACT[name], name
    assert declared(PROCESS) == table(PROCESS_WIDE)


def test_every_family_explains_itself_in_both_languages() -> None:
    """Help texts are there, English has no Chinese in it and the other way round."""
    for family in (*page_families(), *PROCESS):
        assert family.help, family.name
        assert not re.search(r"[一-鿿]", family.help)
        assert re.search(r"[一-鿿]", family.help_zh)
        assert family.help.endswith((".", ")"))


def test_names_follow_the_conventions() -> None:
    """Counters end in _total, base units only, and no label that Prometheus or people need for themselves."""
    for name, (kind, labels) in CONTRACT.items():
        assert re.fullmatch(r"blueking_(job|nodeman|nodemgr|exporter|scope)_[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not {"job", "instance", "type", "le", "quantile"} & set(labels)
        assert not re.search(r"(_ms|_milliseconds|_minutes|_hours|_percent|_kb|_mb)(_|$)", name)


@pytest.mark.parametrize("form", list(Format))
def test_the_page_shows_what_the_contract_names(tmp_path: Path, simulated: Simulated, form: Format) -> None:
    """A daemon that has seen everything JOB has: each metric is on its page with its type and its labels, and nothing
    else is but process_* and python_*. What needs trouble, NodeMan, Redis or discovery to appear is named here."""
    never = {
        "blueking_exporter_series_dropped_total",
        *(family.name for family in SHARING_FAMILIES),
        *(name for name in CONTRACT if name.startswith(("blueking_nodem", "blueking_exporter_discovery_"))),
    }
    simulated.do(lambda platform: setattr(platform, "rate_limit", 1000))
    watch = [{"name": "watched", "max_age": "1h"}]
    with Daemon(tmp_path, configuration(simulated.url, collectors={"job": {"watch": watch}})) as daemon:
        daemon.wait_success()
        results: dict[Target, Outcome] = {target(1): (104, 3), target(2): 310, target(3): 9}
        for name in ("watched", "other"):
            simulated.start(name=name, steps=[StepScript(duration=0.0, results=results)])
            simulated.start(name=name, steps=[StepScript(duration=60.0, results=results)])
        simulated.start(task_type=77, steps=[StepScript(duration=0.0, results={target(4): 9})])
        daemon.wait_success()
        simulated.fault("http_500", times=3)
        daemon.wait(lambda page: any(name.endswith("collector_errors_total") for name, _ in page))
        daemon.wait_success()
        daemon.wait(lambda page: any(name == "blueking_exporter_event_loop_lag_seconds" for name, _ in page))
        status, body = daemon.get("/metrics", headers={"Accept": form.value})
    assert status == 200
    shown: dict[str, Row] = {}
    for family in parse(body.decode(), form):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {tuple(sorted(sample.labels.keys() - {"le"})) for sample in family.samples}
        assert len(labels) == 1, name
        assert not any(sample.timestamp for sample in family.samples), "no sample timestamps"
        shown[name] = (family.type, labels.pop())
    extra = {name for name in shown if name.startswith(("process_", "python_"))}
    assert len(extra) > 5
    assert {name: row for name, row in shown.items() if name not in extra} == {
        name: row for name, row in CONTRACT.items() if name not in never
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_reference_lists_them_all(language: str) -> None:
    """One line per metric with its type and labels, in both languages, and nothing beside them."""
    text = reference("en" if language == "en" else "zh")
    rows = re.findall(r"^\| `(blueking_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", text, re.M)
    assert len(rows) == len({name for name, *_ in rows})
    listed = {name: (kind, tuple(sorted(set(re.findall(r"`(\w+)`", labels))))) for name, kind, labels, _ in rows}
    assert listed == CONTRACT
    assert bool(re.search(r"[一-鿿]", text)) == (language == "zh")
    assert text.endswith("\n")
    assert BIZ.bk_scope_type not in {name for name, *_ in rows}
