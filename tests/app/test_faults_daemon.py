"""Faults of the platform against the whole daemon: the reason is counted, the committed page stays, the others
continue, and it recovers by itself.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.model import Scope
from exporter.simulator.faults import Fault
from exporter.simulator.world import StepScript, Target, target
from tests.support.components import free_port
from tests.support.process import (
    BIZ,
    FINISHED,
    OTHER,
    Daemon,
    Samples,
    Simulated,
    command,
    configuration,
    samples,
    select,
    total,
)

ERRORS = "blueking_exporter_collector_errors_total"
LAST = "blueking_exporter_collector_last_success_timestamp_seconds"
SUCCESS = "blueking_exporter_collector_success"
MEBIBYTE = 2**20


def finish(simulated: Simulated, scope: Scope = BIZ, **arguments: object) -> None:
    step = StepScript(duration=0.0, results={target(1): (104, 1)})
    simulated.start(scope, steps=[step], **arguments)


def owner(scope: Scope) -> dict[str, str]:
    return {"bk_scope_type": scope.bk_scope_type, "bk_scope_id": scope.bk_scope_id}


def of(page: Samples, scope: Scope) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The JOB series of one scope."""
    pairs = set(owner(scope).items())
    return {key: value for key, value in page.items() if key[0].startswith("blueking_job_") and pairs <= key[1]}


@pytest.fixture(scope="module")
def simulated() -> Iterator[Simulated]:
    with Simulated(BIZ, OTHER) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, simulated: Simulated) -> Iterator[Daemon]:
    """One life through all faults that a daemon must survive: it would not be one if it needed a restart."""
    config = configuration(
        simulated.url, [BIZ, OTHER],
        blueking={"request_timeout": "1s", "max_response_bytes": "4MiB"},
        stale_after=100,
    )  # fmt: skip
    with Daemon(tmp_path_factory.mktemp("daemon"), config) as running:
        running.wait_success()
        running.wait_success(OTHER)
        yield running


FAULTS = [
    pytest.param("reset_before", "connect", id="F01-before"),
    pytest.param("reset_headers", "connect", id="F01-inside-headers"),
    pytest.param("reset_body", "connect", id="F01-after-headers"),
    pytest.param("blackhole", "timeout", id="F02-black-hole"),
    pytest.param("drip", "timeout", id="F02-drip"),
    pytest.param("truncated", "connect", id="F03-truncated"),
    pytest.param("wrong_length", "connect", id="F03-wrong-length"),
    pytest.param("broken_chunk", "decode", id="F03-broken-chunk"),
    pytest.param("garbage", "decode", id="F04-random-bytes"),
    pytest.param("html_200", "decode", id="F04-captive-portal"),
    pytest.param("gzip_bomb", "too_large", id="F05-bomb"),
    pytest.param("gzip_nested", "decode", id="F05-nested"),
    pytest.param("endless", "too_large", id="F06-endless"),
    pytest.param("redirect", "redirect", id="F07-elsewhere"),
    pytest.param("redirect_loop", "redirect", id="F07-loop"),
    pytest.param("login_redirect", "auth", id="F07-login"),
    pytest.param("deep_json", "decode", id="F08-deep"),
    pytest.param("huge_int", "decode", id="F08-huge-integer"),
    pytest.param("nan", "decode", id="F08-nan"),
    pytest.param("infinity", "decode", id="F08-infinity"),
    pytest.param("rate_limited", "rate_limited", id="F19-429"),
    pytest.param("http_503", "http_5xx", id="F19-503"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_F01_to_F19_one_scope_fails_with_its_reason(
    daemon: Daemon, simulated: Simulated, fault: str, reason: str
) -> None:
    """The typed reason is counted for the scope that is hit, its page does not change to the last digit, the other
    scope continues; afterwards everything is counted once."""
    before = daemon.wait_success()
    counted = {scope: total(before, FINISHED, **owner(scope)) for scope in (BIZ, OTHER)}
    errors = sum(select(before, ERRORS, reason=reason, **owner(BIZ)).values())
    others = select(before, ERRORS, **owner(OTHER))
    # Twenty times what is accepted; packing more would keep the simulator from answering anybody.
    simulated.fault(fault, **owner(BIZ), **({"value": 80} if fault == "gzip_bomb" else {}))
    try:
        for scope in (BIZ, OTHER):
            finish(simulated, scope)
        failing = daemon.wait(lambda page: sum(select(page, ERRORS, reason=reason, **owner(BIZ)).values()) > errors)
        assert total(failing, SUCCESS, **owner(BIZ)) == 0
        assert total(failing, LAST, **owner(BIZ)) >= total(before, LAST, **owner(BIZ))
        other = daemon.wait_success(OTHER)
        assert total(other, FINISHED, **owner(OTHER)) == counted[OTHER] + 1
        assert total(other, SUCCESS, **owner(OTHER)) == 1
        assert of(other, BIZ) == of(before, BIZ)
        assert total(other, FINISHED, **owner(BIZ)) == counted[BIZ], "nothing half counted"
        assert total(other, LAST, **owner(BIZ)) == total(failing, LAST, **owner(BIZ)), "last_success stands still"
        assert select(other, ERRORS, **owner(OTHER)) == others, "trouble stays in its scope"
    finally:
        simulated.clear()
    page = daemon.wait_success()
    assert total(page, FINISHED, **owner(BIZ)) == counted[BIZ] + 1
    assert total(page, SUCCESS, **owner(BIZ)) == 1


@pytest.mark.parametrize("fault", ["deflate_raw", "duplicate_keys", "null_data", "invalid_utf8", "lone_surrogate"])
def test_F05_F08_F09_unusual_answers_end_in_an_error_or_in_the_truth(
    daemon: Daemon, simulated: Simulated, fault: str
) -> None:
    """Answers that may be read or refused: no crash, no partial count, and the process continues."""
    before = total(daemon.wait_success(), FINISHED, **owner(BIZ))
    simulated.fault(fault, **owner(BIZ))
    try:
        finish(simulated, name="雪 name")
        time.sleep(0.6)
        daemon.wait_success(OTHER)
        assert total(daemon.metrics(), FINISHED, **owner(BIZ)) in (before, before + 1)
    finally:
        simulated.clear()
    assert total(daemon.wait_success(), FINISHED, **owner(BIZ)) == before + 1


def test_F05_memory_is_bounded(daemon: Daemon, simulated: Simulated) -> None:
    """A gzip bomb of 200 MiB and an endless body: the process stays below twice the limit and what it has anyway."""
    before = total(daemon.wait_success(), "process_resident_memory_bytes")
    highest = 0.0
    for fault in ("gzip_bomb", "endless"):
        simulated.fault(fault)
        try:
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                highest = max(
                    highest, total(daemon.metrics("process_resident_memory_bytes"), *["process_resident_memory_bytes"])
                )
                time.sleep(0.05)
        finally:
            simulated.clear()
    assert highest - before < 2 * 2 * 4 * MEBIBYTE, "two scopes"
    daemon.wait_success()


def test_F02_one_deadline_for_the_whole_request(daemon: Daemon, simulated: Simulated) -> None:
    """A byte now and then keeps every read alive; the request ends all the same, and is not tried for ever."""
    simulated.fault("drip", value=0.3, **owner(BIZ))
    try:
        name = "blueking_exporter_collector_duration_seconds"
        page = daemon.wait(lambda page: total(page, SUCCESS, **owner(BIZ)) == 0)
        # max(interval, 2 x request_timeout), and what had been waited for a slot.
        assert 1.0 <= total(page, name, **owner(BIZ)) < 3.5
    finally:
        simulated.clear()
    daemon.wait_success()


def test_F01_refused_connections(tmp_path: Path) -> None:
    """No server listens: connect, counted poll by poll, and ready all the same."""
    with Daemon(tmp_path, configuration(f"http://127.0.0.1:{free_port()}")) as daemon:
        daemon.wait_ready()
        page = daemon.wait(lambda page: sum(select(page, ERRORS, reason="connect").values()) >= 2, 20)
        assert not [name for name, _ in page if name.startswith("blueking_job_executions")], "no zero for unknown"
        assert not select(page, LAST)
        assert sum(select(page, "blueking_exporter_api_requests_total", code="none").values()) >= 2


def test_F07_the_secret_goes_nowhere_else(tmp_path: Path, simulated: Simulated) -> None:
    """A redirect to a second server: it is never asked."""
    with socket.create_server(("127.0.0.1", 0)) as second:
        second.settimeout(0.1)
        simulated.fault("redirect", value=f"http://127.0.0.1:{second.getsockname()[1]}/")
        try:
            with Daemon(tmp_path, configuration(simulated.url)) as daemon:
                daemon.wait(lambda page: sum(select(page, ERRORS, reason="redirect").values()) >= 2)
                with pytest.raises(TimeoutError):
                    second.accept()
        finally:
            simulated.clear()


def test_F19_retry_after_slows_everybody(tmp_path: Path) -> None:
    """429 with a wait of 2 s to one scope: for as long the whole application asks nothing, then all continue."""
    with Simulated(BIZ, OTHER) as simulated, Daemon(tmp_path, configuration(simulated.url, [BIZ, OTHER])) as daemon:
        daemon.wait_success()
        daemon.wait_success(OTHER)
        simulated.fault("rate_limited", value=2, times=1, **owner(BIZ))
        struck = daemon.wait(
            lambda page: sum(select(page, "blueking_exporter_api_requests_total", code="429").values()) > 0
        )
        assert struck
        time.sleep(0.2)
        calls = simulated.calls()
        time.sleep(1.2)
        assert simulated.calls() == calls
        daemon.wait_success()
        page = daemon.wait_success(OTHER)
        assert total(page, "blueking_exporter_api_throttle_seconds_total") > 1


def test_F59_a_503_that_asks_to_wait_pauses_its_scope_only(daemon: Daemon, simulated: Simulated) -> None:
    """While the other scope makes ten polls, it is asked once."""
    simulated.clear()
    daemon.wait_success(OTHER)
    simulated.add(Fault("http_503", scope=OTHER, headers={"Retry-After": "120"}))
    daemon.wait(lambda page: total(page, SUCCESS, **owner(OTHER)) == 0)
    asked = simulated.do(lambda platform: sum(call.scope == str(OTHER) for call in platform.calls))
    for _ in range(10):
        daemon.wait_success()
    assert simulated.do(lambda platform: sum(call.scope == str(OTHER) for call in platform.calls)) == asked
    simulated.clear()
    # A new client knows of no pause: those who cannot wait change a setting and reload.
    changed = json.loads(daemon.file.read_text())
    changed["blueking"]["max_concurrency"] = 7
    daemon.write(changed)
    daemon.signal(signal.SIGHUP)
    daemon.wait_success(OTHER)


def test_4_4_the_request_id_is_in_the_log_and_in_the_status(daemon: Daemon, simulated: Simulated) -> None:
    """Of the gateway, for the newest failed poll."""
    simulated.clear()
    simulated.add(Fault("bad_credentials", scope=BIZ))
    daemon.wait(lambda page: total(page, SUCCESS, **owner(BIZ)) == 0)
    watches = json.loads(daemon.get("/api/v1/status")[1])["watches"]
    by_scope = {watch["bk_scope_id"]: watch for watch in watches}
    request_id = by_scope["2"]["request_id"]
    assert re.fullmatch("[0-9a-f]{32}", request_id)
    assert by_scope["3"]["request_id"] == ""
    assert re.search(r"event=poll_failed .*request_id=[0-9a-f]{32}", daemon.log)
    simulated.clear()
    daemon.signal(signal.SIGHUP)  # asks at once
    daemon.wait_success()


CANARY = "canary-0123456789-secret"


class Echo:
    """A platform whose error message repeats the whole request, including credentials; or `message`."""

    def __init__(self, message: str = "") -> None:
        self._message = message
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.heard = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        forms = 0
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client:
                client.settimeout(1)
                try:
                    request = client.recv(65536)
                except OSError:
                    continue
                self.heard += request
                forms += 1
                text = self._message or request.decode("latin-1").replace("\r\n", " ")
                wrong = json.dumps({"result": False, "code": 1234, "message": text, "data": None})
                odd = json.dumps({"result": True, "code": 0, "data": {"data": [{text: text, "id": text}]}})
                body = (wrong, odd, f"<html>{text}</html>")[forms % 3]
                status = (200, 200, 500)[forms % 3]
                head = f"HTTP/1.1 {status} {CANARY}\r\nX-Secret: {CANARY}\r\nContent-Length: {len(body.encode())}\r\n"
                client.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())

    def close(self) -> None:
        self._server.close()


@pytest.mark.parametrize(("api", "form"), [("v4", "logfmt"), ("v3", "json"), ("esb", "console")])
def test_F27_the_secret_is_nowhere(tmp_path: Path, api: str, form: str) -> None:
    """A platform that echoes the credentials: the canary is in no log line at debug level, on no page, in no file,
    after a broken configuration and at the end neither."""
    echo = Echo()
    secret = tmp_path / "secret"
    secret.write_text(CANARY + "\n")
    url = echo.url if api == "esb" else f"{echo.url}/api/bk-job/prod"
    config = configuration(echo.url, blueking={"job": {"url": url, "api": api}})
    config["blueking"]["auth"] = {"app_code": "exporter", "app_secret_file": str(secret), "username": "admin"}
    flags = [f"--log.format={form}", "--log.level=debug", "--web.enable-lifecycle"]
    seen = b""
    try:
        with Daemon(tmp_path, config, *flags) as daemon:
            daemon.wait(lambda page: len(select(page, ERRORS)) >= 2)
            for path in ("/metrics", "/", "/api/v1/status", "/api/v1/failures", "/-/ready", "/nothing"):
                seen += daemon.get(path)[1]
            daemon.write(
                {**config, "blueking": {**config["blueking"], "auth": {"app_secret": CANARY, "usernam": CANARY}}}
            )
            seen += daemon.get("/-/reload", data=b"")[1]
            daemon.stop()
            daemon.write(config)
        seen += daemon.log_file.read_bytes()
        for name in ("probe", "once"):
            done = command(name, f"--config.file={daemon.file}", environ={"PYTHONASYNCIODEBUG": "1"})
            seen += (done.stdout + done.stderr).encode()
        for file in tmp_path.iterdir():
            if file not in (secret, daemon.file):
                seen += file.read_bytes()
    finally:
        echo.close()
    assert CANARY.encode() in echo.heard, "the platform was told the secret"
    assert b"poll_failed" in seen
    assert CANARY.encode() not in seen


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


@pytest.mark.parametrize("secret", [CANARY, "000000", 'quote"back\\slash'])
def test_F72_a_secret_that_the_platform_repeats_as_data_is_redacted(tmp_path: Path, secret: str) -> None:
    """As ip, cloud id and name: in labels and in JSON, which stays valid where the secret could be part of a number."""
    with Simulated(BIZ) as simulated:
        simulated.do(lambda platform: setattr(platform, "app_secret", secret))
        config = configuration(simulated.url, blueking={"auth": {"app_secret": secret}})
        config["collectors"]["job"]["watch"] = [{"name": "nightly*"}]
        with Daemon(tmp_path, config) as daemon:
            daemon.wait_success()
            hosts = {
                Target(bk_host_id=7_000_000, ip=f"x{secret}", bk_cloud_id=0): (104, 1),
                Target(bk_host_id=8, ip="10.0.0.8", bk_cloud_id=secret): (104, 1),  # type: ignore[arg-type]
            }
            name = "nightly " + "n" * 240 + secret  # cut in the middle of the secret
            simulated.start(name=name, steps=[StepScript(duration=0.0, results=hosts)])
            page = daemon.wait(lambda page: len(select(page, "blueking_job_host_failing_since_timestamp_seconds")) == 2)
            labels = [value for _, pairs in page for _, value in pairs]
            assert {"x***", "***"} <= set(labels)
            assert "7000000" in labels, "an id is a number, whatever the secret is"
            assert not [value for value in labels if secret in value and value != "7000000"]
            for path in ("/api/v1/failures", "/api/v1/status"):
                document = json.loads(daemon.get(path)[1])
                assert not [text for text in _texts(document) if secret[:5] in text and text != "7000000"]
            failures = json.loads(daemon.get("/api/v1/failures")[1])
            assert failures["executions"][0]["name"].endswith("n***")
            assert {host["bk_host_id"] for host in failures["hosts"]} == {"7000000", "8"}


@pytest.mark.parametrize("form", ["logfmt", "json", "console"])
def test_F28_one_event_is_one_line(tmp_path: Path, simulated: Simulated, form: str) -> None:
    """Names and messages with line feeds, ANSI and U+2028 do not make a line of their own, in no format."""
    evil = "evil\nlevel=error event=forged \x1b[31mred\x1b[0m \u2028 \u202e end"

    finish(simulated, name=evil)
    with Daemon(tmp_path, configuration(simulated.url), f"--log.format={form}") as daemon:
        daemon.wait_success()
        finish(simulated, name=evil, task_type=98)
        daemon.wait(lambda page: bool(select(page, "blueking_exporter_unknown_values_total")))
        status, body = daemon.get("/api/v1/failures")
        assert status == 200
        assert json.loads(body)["executions"][0]["name"]
        echo = Echo(evil)
        daemon.write(configuration(echo.url))
        daemon.signal(signal.SIGHUP)
        daemon.wait(lambda page: bool(select(page, ERRORS, reason="api_error")))
        daemon.stop()
        echo.close()
        text = daemon.log
    assert "forged" in text, "the platform's words are in the log"
    assert not [line for line in text.splitlines() if line.startswith("level=error")]
    assert not re.search("[\u2028\u202e]", text)
    assert "\x1b[31m" not in text
    if form == "json":
        assert all(json.loads(line)["event"] for line in text.splitlines())


def test_the_page_of_a_failing_start_claims_nothing(tmp_path: Path, simulated: Simulated) -> None:
    """From a first poll that fails there are errors and no counts; the first that succeeds is the baseline."""
    finish(simulated, OTHER)
    simulated.fault("http_502", **owner(OTHER))
    try:
        with Daemon(tmp_path, configuration(simulated.url, [OTHER])) as daemon:
            page = daemon.wait(lambda page: bool(select(page, ERRORS)))
            assert of(page, OTHER) == {}
            simulated.clear()
            page = daemon.wait_success(OTHER)
            assert total(page, FINISHED) == 0
            assert samples(daemon.get("/metrics")[1].decode())
    finally:
        simulated.clear()
