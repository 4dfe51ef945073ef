"""Reload: validate all, then swap; what was counted survives."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
import urllib.request
from email.message import Message
from pathlib import Path

from exporter.model import Scope
from exporter.simulator.world import StepScript, target
from tests.support.components import eventually, http
from tests.support.process import (
    BIZ,
    FINISHED,
    OTHER,
    Daemon,
    Samples,
    Simulated,
    configuration,
    daemon,
    merged,
    scope_entry,
    select,
    total,
)

LOADED = "blueking_exporter_config_last_reload_successful"
LOADED_AT = "blueking_exporter_config_last_reload_success_timestamp_seconds"
INFO = "blueking_exporter_config_info"


def finish(simulated: Simulated, scope: Scope = BIZ, seconds: float = 0.0) -> None:
    simulated.start(scope, steps=[StepScript(duration=seconds, results={target(1): 9})])


def of(page: Samples, scope: Scope) -> set[str]:
    """Names of the series of one scope."""
    pairs = {("bk_scope_type", scope.bk_scope_type), ("bk_scope_id", scope.bk_scope_id)}
    return {name for name, labels in page if pairs <= labels}


def sighup(running: Daemon) -> None:
    """Reload by signal; returns when the attempt is over."""
    page = running.metrics()
    before = total(page, LOADED_AT)
    failures = running.log.count("event=reload_failed")
    running.signal(signal.SIGHUP)
    eventually(
        lambda: running.value(LOADED_AT) > before or running.log.count("event=reload_failed") > failures, 10, 0.02
    )


def test_F38_a_removed_scope_leaves_at_once_and_comes_back_continued(tmp_path: Path, simulated: Simulated) -> None:
    """Its series are gone with the reload, the other scope counts on, and what it missed is counted on its return."""
    both = configuration(simulated.url, [BIZ, OTHER])
    with Daemon(tmp_path, both) as running:
        running.wait_success()
        running.wait_success(OTHER)
        for scope in (BIZ, OTHER):
            finish(simulated, scope)
        running.wait_success()
        running.wait_success(OTHER)
        assert running.value(FINISHED) == 2

        running.write(configuration(simulated.url, [BIZ]))
        sighup(running)
        page = running.metrics()
        assert of(page, OTHER) == set()
        assert total(page, FINISHED) == 1
        finish(simulated, OTHER)
        finish(simulated, BIZ)
        assert total(running.wait_success(), FINISHED) == 2

        running.write(both)
        sighup(running)
        page = running.metrics()
        assert total(page, FINISHED, bk_scope_id="3") >= 1, "its counters are back with the reload"
        assert total(running.wait_success(OTHER), FINISHED, bk_scope_id="3") == 2


def test_F38_a_collector_that_is_switched_off_leaves_at_once(tmp_path: Path, simulated: Simulated) -> None:
    """Only the scope's name stays; switched on again it continues."""
    on = configuration(simulated.url)
    with Daemon(tmp_path, on) as running:
        running.wait_success()
        finish(simulated)
        running.wait_success()
        running.write(merged(on, {"collectors": {"job": {"enabled": False}}}))
        sighup(running)
        assert of(running.metrics(), BIZ) == {"blueking_scope_info"}
        running.write(on)
        sighup(running)
        assert total(running.wait_success(), FINISHED) == 1


def test_F38_reloads_while_polls_run_count_everything_once(tmp_path: Path, simulated: Simulated) -> None:
    """Ten reloads with a changed client, each in the middle of slow polls: nothing is lost or doubled."""
    simulated.fault("latency", value=0.05)
    config = configuration(simulated.url)
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        for number in range(10):
            finish(simulated, seconds=0.1)
            running.write(merged(config, {"blueking": {"max_concurrency": 2 + number}}))
            sighup(running)
            assert running.value(LOADED) == 1
        time.sleep(0.15)
        page = running.wait_success()
        assert total(page, FINISHED) == total(page, "blueking_job_executions_created_total") == 10


def test_F36_a_bad_file_changes_nothing(tmp_path: Path, simulated: Simulated) -> None:
    """By signal and by POST: the old configuration stays, the metric says 0, the answer names every error; the next
    good one is taken."""
    good = configuration(simulated.url)
    with Daemon(tmp_path, good, "--web.enable-lifecycle") as running:
        page = running.wait_success()
        before = {name: select(page, name) for name in (INFO, LOADED_AT)}
        finish(simulated)
        running.write(merged(good, {"stale_after": "x", "max_series": -1, "scopes": []}))
        sighup(running)
        status, body = running.get("/-/reload", data=b"")
        problems = body.decode().splitlines()
        assert status == 500
        for key in ("stale_after", "max_series", "scopes"):
            assert [line for line in problems if f": {key}: " in line and line.startswith(str(running.file))], key
        page = running.wait_success()
        assert total(page, LOADED) == 0
        assert {name: select(page, name) for name in before} == before
        assert total(page, FINISHED) == 1
        assert running.get("/-/ready")[0] == 200
        running.file.unlink()
        assert running.get("/-/reload", data=b"")[0] == 500
        running.write(merged(good, {"stale_after": 7}))
        assert running.get("/-/reload", data=b"")[0] == 200
        page = running.metrics()
        assert total(page, LOADED) == 1
        assert select(page, INFO) != before[INFO]
        assert total(page, LOADED_AT) > sum(before[LOADED_AT].values())


def test_F36_reload_is_off_by_default_and_post_only(tmp_path: Path, simulated: Simulated) -> None:
    """403 without the flag, 405 for GET, 404 for what does not exist; SIGHUP works all the same."""
    with daemon(tmp_path, simulated) as running:
        assert running.get("/-/reload", data=b"")[0] == 403
        assert running.get("/-/reload")[0] == 405
        assert running.get("/-/quit", data=b"")[0] == 404
        assert "event=reloaded" not in running.log
        sighup(running)
        assert "event=reloaded" in running.log


def test_a_scope_file_is_followed(tmp_path: Path, simulated: Simulated) -> None:
    """Added, changed and removed scope files are in force within 10 seconds, without a signal."""
    config = configuration(simulated.url, scope_files=["scopes/*.yaml"])
    folder = tmp_path / "scopes"
    folder.mkdir()
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        begun = time.monotonic()
        (folder / "more.yaml").write_text(json.dumps([scope_entry(OTHER)]))
        eventually(lambda: of(running.metrics(), OTHER), 10, 0.1)
        assert time.monotonic() - begun < 10
        (folder / "more.yaml").unlink()
        eventually(lambda: not of(running.metrics(), OTHER), 10, 0.1)
        assert running.value(LOADED) == 1


def test_changed_settings_of_blueking_are_used(tmp_path: Path, simulated: Simulated) -> None:
    """Another secret and another dialect take effect with the reload: from 401 to counting, from v4 to v3."""
    wrong = configuration(simulated.url, blueking={"auth": {"app_secret": "wrong-secret"}})
    with Daemon(tmp_path, wrong) as running:
        running.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", reason="auth")))
        running.write(configuration(simulated.url))
        sighup(running)
        running.wait_success()
        running.write(configuration(simulated.url, blueking={"job": {"api": "v3"}}))
        sighup(running)
        finish(simulated)
        assert total(running.wait_success(), FINISHED) == 1
        dialects = simulated.do(lambda platform: [call.dialect for call in platform.calls])
        assert dialects[0] == "v4"
        assert dialects[-1] == "v3"


def test_a_secret_file_is_followed_without_a_reload(tmp_path: Path, simulated: Simulated) -> None:
    """A rotated app secret is used by the next poll; one that is removed leaves the last good value."""
    secret = tmp_path / "secret"
    secret.write_text("outdated-secret\n")
    config = configuration(simulated.url)
    config["blueking"]["auth"] = {"app_code": "blueking-exporter", "app_secret_file": "secret"}
    with Daemon(tmp_path, config) as running:
        running.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", reason="auth")))
        secret.write_text("simulated\n")
        running.wait_success()
        secret.unlink()
        finish(simulated)
        assert total(running.wait_success(), FINISHED) == 1
        assert "event=reloaded" not in running.log


def test_a_platform_that_hangs_does_not_stop_a_reload(tmp_path: Path, simulated: Simulated) -> None:
    """A poll that waits for a black hole is cancelled when the client changes; readiness is not taken back."""
    simulated.fault("blackhole")
    config = configuration(simulated.url, blueking={"request_timeout": "1s"})
    with Daemon(tmp_path, config, "--web.enable-lifecycle") as running:
        running.wait_ready()
        simulated.clear()
        simulated.fault("blackhole")
        running.write(merged(config, {"blueking": {"request_timeout": "30s"}}))
        assert running.get("/-/reload", data=b"")[0] == 200
        time.sleep(0.3)
        begun = time.monotonic()
        running.write(merged(config, {"blueking": {"request_timeout": "2s"}}))
        assert running.get("/-/reload", data=b"")[0] == 200
        assert time.monotonic() - begun < 2
        assert running.get("/-/ready")[0] == 200
        simulated.clear()
        running.wait_success()


def test_unusable_tls_files_change_nothing(tmp_path: Path, simulated: Simulated) -> None:
    """What only shows when it is used is an error of the reload as well, and the old client continues."""
    good = configuration(simulated.url)
    (tmp_path / "ca.pem").write_text("no certificate")
    with Daemon(tmp_path, good, "--web.enable-lifecycle") as running:
        running.wait_success()
        running.write(merged(good, {"blueking": {"tls": {"ca_file": "ca.pem"}}}))
        status, body = running.get("/-/reload", data=b"")
        assert (status, b"blueking.tls" in body) == (500, True)
        finish(simulated)
        page = running.wait_success()
        assert (total(page, FINISHED), total(page, LOADED)) == (1, 0)


def test_a_state_that_fails_changes_nothing(tmp_path: Path, simulated: Simulated) -> None:
    """A reload that cannot load the state of a new scope leaves nothing of it behind, and the next one succeeds."""
    config = configuration(simulated.url)
    # A new client too: it must not be left half exchanged.
    wider = merged(configuration(simulated.url, [BIZ, OTHER]), {"blueking": {"max_concurrency": 3}})
    with Daemon(tmp_path, config, "--web.enable-lifecycle") as running:
        running.wait_success()
        with sqlite3.connect(tmp_path / "state.db") as db:
            db.execute("ALTER TABLE state RENAME TO gone")
        running.write(wider)
        status, body = running.get("/-/reload", data=b"")
        assert (status, b"no such table" in body) == (500, True)
        page = running.metrics()
        assert of(page, OTHER) == set()
        assert total(page, LOADED) == 0
        running.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", reason="state")))
        with db:
            db.execute("ALTER TABLE gone RENAME TO state")
        db.close()
        assert running.get("/-/reload", data=b"")[0] == 200
        finish(simulated)
        running.wait_success(OTHER)
        assert total(running.wait_success(), FINISHED) == 1
        assert running.stop() == 0
        assert "Unclosed" not in running.log


def test_a_shorter_interval_is_not_waited_for(tmp_path: Path, simulated: Simulated) -> None:
    """From an hour to a moment: the new interval holds from the reload on."""
    slow = configuration(simulated.url, collectors={"job": {"interval": "1h"}})
    with Daemon(tmp_path, slow) as running:
        running.wait_ready()
        running.write(configuration(simulated.url))
        sighup(running)
        running.wait_success()


def test_what_needs_a_restart_is_said(tmp_path: Path, simulated: Simulated) -> None:
    """A changed state, address or log is warned about and continues as it was."""
    config = configuration(simulated.url)
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        running.write(merged(config, {"state": {"url": "memory:"}, "server": {"telemetry_path": "/elsewhere"}}))
        sighup(running)
        assert "field=state.url" in running.log
        assert "field=server" in running.log
        assert running.get("/metrics")[0] == 200


def test_other_buckets_restart_the_histogram(tmp_path: Path, simulated: Simulated) -> None:
    """Changed duration_buckets: a new birth with the next observation, the counters continue."""
    config = configuration(simulated.url)
    count = "blueking_job_execution_duration_seconds_count"
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        finish(simulated)
        assert total(running.wait_success(), count) == 1
        running.write(merged(config, {"collectors": {"job": {"duration_buckets": [7, 70]}}}))
        sighup(running)
        finish(simulated)
        page = running.wait_success()
        bounds = {dict(labels)["le"] for labels in select(page, "blueking_job_execution_duration_seconds_bucket")}
        assert bounds == {"7.0", "70.0", "+Inf"}
        assert (total(page, count), total(page, FINISHED)) == (1, 2)


def test_a_broken_web_file_keeps_the_last_good_one_and_shows(tmp_path: Path, simulated: Simulated) -> None:
    """The answer and the metric report it; the headers of the good file stay, and a repaired file clears the metric."""
    web = tmp_path / "web.yml"
    good = "http_server_config: {headers: {X-Frame-Options: deny}}\n"
    web.write_text(good)
    arguments = (f"--web.config.file={web}", "--web.enable-lifecycle")
    with Daemon(tmp_path, configuration(simulated.url, [BIZ]), *arguments) as running:
        running.wait_success()
        assert running.value(LOADED) == 1
        web.write_text(good.replace("headers", "haeders"))
        status, body = http(f"{running.url}/-/reload", b"")
        assert status == 500
        assert f"{web}:1:" in body.decode()
        assert 'did you mean "headers"' in body.decode()
        assert running.value(LOADED) == 0
        assert headers(running.url)["X-Frame-Options"] == "deny"
        web.write_text(good)
        assert http(f"{running.url}/-/reload", b"")[0] == 200
        assert running.value(LOADED) == 1


def headers(url: str) -> Message:
    with urllib.request.urlopen(f"{url}/-/healthy", timeout=5) as answer:
        found: Message = answer.headers
    return found


def test_a_good_web_file_does_not_hide_a_broken_configuration(tmp_path: Path, simulated: Simulated) -> None:
    """The metric stays at 0 until everything that was read is good again."""
    web = tmp_path / "web.yml"
    web.write_text("http_server_config: {headers: {X-Frame-Options: deny}}\n")
    good = configuration(simulated.url, [BIZ])
    with Daemon(tmp_path, good, f"--web.config.file={web}") as running:
        running.wait_success()
        running.write(merged(good, {"stale_after": "x"}))
        sighup(running)
        assert running.value(LOADED) == 0
        web.write_text("http_server_config: {headers: {X-Frame-Options: sameorigin}}\n")
        eventually(lambda: headers(running.url)["X-Frame-Options"] == "sameorigin", 10, 0.05)
        assert running.value(LOADED) == 0
        running.write(good)
        sighup(running)
        assert running.value(LOADED) == 1


def test_a_secret_file_that_is_lost_shows(tmp_path: Path, simulated: Simulated) -> None:
    """The last secret stays in use, but the metric and the log tell before the next restart fails."""
    secret = tmp_path / "secret"
    secret.write_text("simulated\n")
    config = configuration(simulated.url, [BIZ])
    auth = config["blueking"]["auth"]
    del auth["app_secret"]
    auth["app_secret_file"] = str(secret)
    with Daemon(tmp_path, config) as running:
        running.wait_success()
        secret.unlink()
        eventually(lambda: running.value(LOADED) == 0, 15, 0.1)
        assert "secret_file_unreadable" in running.log
        assert running.wait_success(), "polls go on"
        secret.write_text("simulated\n")
        eventually(lambda: running.value(LOADED) == 1, 15, 0.1)
