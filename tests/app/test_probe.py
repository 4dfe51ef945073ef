"""`probe`: is everything reachable and permitted, and what will it cost?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ApiError
from exporter.model import Scope
from exporter.probe import explain
from exporter.simulator import nodeman_api
from exporter.simulator.nodeman_world import Target
from exporter.simulator.platform import Platform
from exporter.simulator.world import StepScript, target
from tests.support.process import BIZ, OTHER, Simulated, command, configuration

OURS, THEIRS = Target(2, "10.2.0.1", 1), Target(3, "10.3.0.1", 301)


def probe(folder: Path, config: dict[str, Any]) -> tuple[int, list[str], str]:
    """Exit code, lines, standard error."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    done = command("probe", f"--config.file={file}")
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_probe_tells_cost_and_quota(tmp_path: Path, simulated: Simulated) -> None:
    """One line per scope with series and calls per day, what the gateway says is left, a sum; exit 0. No state."""
    simulated.do(lambda platform: setattr(platform, "rate_limit", 500))
    simulated.start(steps=[StepScript(duration=0.0, results={target(1): 310})])
    config = configuration(simulated.url, [BIZ, OTHER], collectors={"job": {"interval": "1m"}})
    code, lines, err = probe(tmp_path, config)
    assert (code, err) == (0, "")
    first, second, *quotas, last = lines
    assert first.startswith("ok    job biz/2: about ")
    assert second.startswith("ok    job biz/3: about ")
    # 1,440 polls a day; in the first scope also the failed execution and its watch.
    assert " 1440 API calls per day" in second
    assert int(first.split(", ")[1].split()[0]) > 1440
    assert {line.split()[1] for line in quotas} == {"get_job_instance_list:", "get_job_instance_status:"}
    for line in quotas:
        assert 470 <= int(line.split()[2]) < 500, line
    assert last.startswith("total about ")
    assert not (tmp_path / "state.db").exists()


def test_probe_says_nothing_of_a_quota_that_nobody_told(tmp_path: Path, simulated: Simulated) -> None:
    """Without the gateway's headers there is no quota line."""
    code, lines, _ = probe(tmp_path, configuration(simulated.url))
    assert code == 0
    assert not [line for line in lines if line.startswith("quota")]


def test_probe_names_the_missing_permission(tmp_path: Path, simulated: Simulated) -> None:
    """A scope that may not be read fails with the action by name, the other is fine; exit 1."""
    simulated.do(lambda platform: platform.denied.add(OTHER))
    code, lines, _ = probe(tmp_path, configuration(simulated.url, [BIZ, OTHER]))
    assert code == 1
    assert lines[0].startswith("ok    job biz/2")
    assert lines[1].startswith("FAIL  job biz/3: get_job_instance_list: permission; code ")
    assert "missing permission: access_business" in lines[1]


def test_probe_of_a_scope_that_job_does_not_know(tmp_path: Path, simulated: Simulated) -> None:
    """JOB tells an unknown business from an idle one, but of an idle one not whether its history may be read."""
    code, lines, _ = probe(tmp_path, configuration(simulated.url, [OTHER, Scope("biz", "99")]))
    assert code == 1
    assert lines[0].startswith("ok    job biz/3: about ")
    assert lines[0].endswith("whether view_history is granted cannot be told")
    assert lines[1].startswith("FAIL  job biz/99: get_job_instance_list: not_found; ")


def test_probe_asks_for_host_results_too(tmp_path: Path, simulated: Simulated) -> None:
    """view_history is another permission than the list's: it is found out before the first failure is."""
    simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})])
    simulated.do(lambda platform: platform.denied_history.add(BIZ))
    code, lines, _ = probe(tmp_path, configuration(simulated.url))
    assert code == 1
    assert "get_job_instance_status: permission" in lines[0]
    assert "view_history" in lines[0]


@pytest.mark.parametrize(
    ("fault", "reason"), [("bad_credentials", "auth"), ("html_200", "decode"), ("blackhole", "timeout")]
)
def test_probe_tells_the_reason(tmp_path: Path, simulated: Simulated, fault: str, reason: str) -> None:
    """What the platform answers instead is classified as the metric would; exit 1."""
    simulated.fault(fault)
    config = configuration(simulated.url, blueking={"request_timeout": "300ms"})
    code, lines, _ = probe(tmp_path, config)
    assert code == 1
    assert lines[0].startswith(f"FAIL  job biz/2: get_job_instance_list: {reason}; ")


def test_probe_explains_the_vague_code_of_the_esb() -> None:
    """1306201 hides many causes, the removed route of NodeMan 1.x among them: the line says so."""
    text = explain(ApiError("http_5xx", "Component request error", api="get_task_info", code="1306201"))
    assert text.startswith("get_task_info: http_5xx; code 1306201; Component request error; ")
    assert "NodeMan 2.x no longer has" in text


def test_probe_of_an_unreachable_platform(tmp_path: Path) -> None:
    """No server listens: reason connect, exit 1, and the secret is nowhere."""
    config = configuration("http://127.0.0.1:1", blueking={"auth": {"app_secret": "canary-secret-value"}})
    code, lines, err = probe(tmp_path, config)
    assert code == 1
    assert ": connect; " in lines[0]
    assert "canary" not in "".join(lines) + err


# NodeMan


def nodeman(url: str, scopes: tuple[Scope, ...] = (BIZ,), **collectors: Any) -> dict[str, Any]:
    """A configuration with these collectors of NodeMan, by their names without prefix."""
    enabled = {f"nodeman_{name}": {"enabled": True, "interval": "1m", **keys} for name, keys in collectors.items()}
    platforms = {"nodeman": {"url": f"{url}/api/bk-nodeman/prod"}, "nodeman_legacy": {"url": url}}
    return configuration(url, scopes, blueking=platforms, collectors={"job": {"enabled": False}, **enabled})


def start_job(simulated: Simulated, *hosts: Target, **given: Any) -> int:
    """A job that ends at once; its id."""

    def start(platform: Platform) -> int:
        world = nodeman_api.world_of(platform)
        job = world.start_job("INSTALL_AGENT", dict.fromkeys(hosts), duration=0.0, **given)
        world.refresh(job)
        return job.id

    return simulated.do(start)


def test_probe_names_what_to_ask_for_when_no_user_arrives(tmp_path: Path, simulated: Simulated) -> None:
    """JOB refuses and NodeMan lists nothing: both lines tell what the gateway's administrator has to change."""
    start_job(simulated, OURS)
    simulated.do(lambda platform: setattr(platform, "takes_bk_username", False))
    simulated.do(lambda platform: setattr(platform, "job_reads_header", False))
    config = nodeman(simulated.url, job={})
    config["blueking"]["job"] = {"url": f"{simulated.url}/api/bk-job/prod"}
    config["collectors"]["job"] = {"enabled": True}
    code, lines, _ = probe(tmp_path, config)
    assert code == 1
    assert lines[0].startswith("FAIL  job biz/2: get_job_instance_list: auth; code 1247002")
    assert lines[1].startswith("?     nodeman_job biz/2: ")
    for line in lines[:2]:
        assert "from_username" in line
        assert "skip_user_verification" in line


def test_probe_prints_the_request_id(tmp_path: Path, simulated: Simulated) -> None:
    """With it the platform's people find the request in their own logs."""
    simulated.do(lambda platform: setattr(platform, "app_secret", "another"))
    code, (line, *_), _ = probe(tmp_path, configuration(simulated.url))
    assert code == 1
    assert re.search(r"; request id [0-9a-f]{32}", line)


def test_probe_of_an_idle_forbidden_or_unknown_business(tmp_path: Path, simulated: Simulated) -> None:
    """NodeMan answers an empty list in all three cases: probe says that they cannot be distinguished; exit 0 as
    before."""
    start_job(simulated, OURS)
    code, lines, _ = probe(tmp_path, nodeman(simulated.url, (BIZ, OTHER), job={}))
    assert code == 0
    assert lines[0].startswith("ok    nodeman_job biz/2: about ")
    assert lines[1].startswith("?     nodeman_job biz/3: about ")
    assert "cannot be told apart from an idle business" in lines[1]
    simulated.do(lambda platform: nodeman_api.world_of(platform).denied.add(2))
    code, lines, _ = probe(tmp_path, nodeman(simulated.url, job={}))
    assert code == 0
    assert lines[0].startswith("?     nodeman_job biz/2: about ")


def test_probe_of_configured_things_that_do_not_exist(tmp_path: Path, simulated: Simulated) -> None:
    """A job, a subscription and a task that are missing beside ones that exist: each is named; exit 1."""
    job = start_job(simulated, OURS)

    def start(platform: Platform) -> tuple[int, int]:
        world = nodeman_api.world_of(platform)
        policy = world.start_subscription("RESTART_AGENT", {OURS: None}, duration=0.0)
        return policy.id, world.start_legacy_task(2, "INSTALL_PAGENT", {OURS: None}).id

    subscription, task = simulated.do(start)
    config = nodeman(
        simulated.url,
        job={"job_ids": [job, 999]},
        subscription={"subscription_ids": [subscription, 998]},
        task={"job_ids": [task, 997]},
    )
    code, lines, _ = probe(tmp_path, config)
    assert code == 1
    assert lines[0].startswith("FAIL  nodeman_job biz/2: job 999: not_found; ")
    assert lines[1].startswith("FAIL  nodeman_subscription biz/2: subscription 998: not_found; ")
    assert lines[2].startswith("FAIL  nodeman_task biz/2: task 997: api_error; ")
    config = nodeman(
        simulated.url,
        job={"job_ids": [job]},
        subscription={"subscription_ids": [subscription]},
        task={"job_ids": [task]},
    )
    code, lines, _ = probe(tmp_path, config)
    assert code == 0
    assert all(line.startswith("ok ") for line in lines[:3])


def test_probe_of_a_job_that_touches_a_forbidden_business(tmp_path: Path, simulated: Simulated) -> None:
    """The trial is a job of this business alone; where there is none, the refusal is a note and no failure."""
    start_job(simulated, OURS, THEIRS, created_by="somebody")
    simulated.do(lambda platform: nodeman_api.world_of(platform).denied.add(3))
    own = start_job(simulated, OURS)
    start_job(simulated, OURS, bk_biz_scope=[2, 4])
    code, lines, _ = probe(tmp_path, nodeman(simulated.url, job={}))
    assert code == 0
    assert lines[0].startswith("ok    nodeman_job biz/2: about ")
    simulated.do(lambda platform: nodeman_api.world_of(platform).jobs.pop(own))
    simulated.fault("permission", api="job_details")
    code, lines, _ = probe(tmp_path, nodeman(simulated.url, job={}))
    assert code == 0
    assert "touches other businesses too, and its details are refused" in lines[0]


def test_probe_of_details_that_are_forbidden(tmp_path: Path, simulated: Simulated) -> None:
    """A job of this business alone whose details are refused: the missing permission by name; exit 1."""
    start_job(simulated, OURS)
    simulated.fault("permission", api="job_details")
    code, lines, _ = probe(tmp_path, nodeman(simulated.url, job={}))
    assert code == 1
    assert lines[0].startswith("FAIL  nodeman_job biz/2: job_details: permission; ")
    assert "missing permission: task_history_view" in lines[0]


def test_probe_of_a_subscription_of_another_business(tmp_path: Path, simulated: Simulated) -> None:
    """Its instances are all of another business: probably the wrong scope, which the platform does not say."""
    policy = simulated.do(
        lambda platform: (
            nodeman_api.world_of(platform).start_subscription("RESTART_AGENT", {OURS: None}, duration=0.0).id
        )
    )
    config = nodeman(simulated.url, (OTHER,), subscription={"subscription_ids": [policy]})
    code, lines, _ = probe(tmp_path, config)
    assert code == 0
    assert lines[0].startswith("?     nodeman_subscription biz/3: about ")
    assert f"subscription {policy} has no instance of business 3" in lines[0]
