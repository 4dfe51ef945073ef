"""Secret files, certificates and name servers that change or hang while the daemon runs."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.components import eventually
from tests.support.process import BIZ, PROGRAM, Daemon, Simulated, configuration, select
from tests.support.process import command as run_command
from tests.support.upstream import EMPTY_PAGE

LOADED = "blueking_exporter_config_last_reload_successful"
SUCCESS = "blueking_exporter_collector_success"
CIRCUIT_OPEN = "blueking_exporter_api_circuit_open"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(EMPTY_PAGE) + EMPTY_PAGE
LONG = 60.0
"""Seconds to wait on a busy machine for what is due within ten seconds."""


class Https:
    """A JOB without executions behind TLS; remembers the names in the client certificates."""

    def __init__(self, ca: Authority) -> None:
        self.names: list[str] = []
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca.file))
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_cert_chain(*ca.issue("server"))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listening.getsockname()[1]}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield
        finally:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, self._context.wrap_socket(connection, server_side=True) as wrapped:
            subject: Any = (wrapped.getpeercert() or {})["subject"]
            while wrapped.recv(65536):
                self.names.append(dict(pair for (pair,) in subject)["commonName"])
                wrapped.sendall(ANSWER)


def _install(pair: tuple[Path, Path], folder: Path) -> None:
    for source, name in zip(pair, ("tls.crt", "tls.key"), strict=True):
        temporary = folder / f"{name}.new"
        temporary.write_bytes(source.read_bytes())
        temporary.replace(folder / name)


def test_F55_a_rotated_client_certificate_is_used_and_a_broken_one_shows(tmp_path: Path) -> None:
    """Without a reload. A pair that does not fit keeps the old one in use, the metric at 0, and fails a reload."""
    ca = Authority(tmp_path)
    platform = Https(ca)
    _install(ca.issue("first"), tmp_path)
    tls = {"ca_file": "ca.pem", "cert_file": "tls.crt", "key_file": "tls.key"}
    config = configuration(platform.url, blueking={"tls": tls})
    with platform.serving(), Daemon(tmp_path, config, "--web.enable-lifecycle") as daemon:
        daemon.wait_success()
        _install(ca.issue("second"), tmp_path)
        eventually(lambda: platform.names[-1] == "second", LONG, 0.1)
        assert daemon.value(LOADED) == 1

        (tmp_path / "tls.key").write_bytes((tmp_path / "first.key").read_bytes())
        eventually(lambda: daemon.value(LOADED) == 0, LONG, 0.1)
        status, body = daemon.get("/-/reload", data=b"")
        assert (status, b"blueking.tls.cert_file: cannot be used: key values mismatch" in body) == (500, True)
        asked = len(platform.names)
        daemon.wait_success()
        assert platform.names[asked:]
        assert set(platform.names[asked:]) == {"second"}

        _install(ca.issue("third"), tmp_path)
        eventually(lambda: platform.names[-1] == "third", LONG, 0.1)
        assert daemon.get("/-/reload", data=b"")[0] == 200
        assert daemon.value(LOADED) == 1
        assert "event=tls_files_unusable" in daemon.log


def test_F20_a_changed_secret_is_tried_at_once(tmp_path: Path) -> None:
    """Also if polls have become rare because of the old secret."""
    secret = tmp_path / "secret"
    secret.write_text("outdated-secret\n")
    with Simulated() as simulated:
        config = configuration(simulated.url, collectors={"job": {"interval": "1s"}})
        config["blueking"]["auth"] = {"app_code": "blueking-exporter", "app_secret_file": "secret"}
        with Daemon(tmp_path, config) as daemon:

            def next_poll() -> float:
                (status,) = json.loads(daemon.get("/api/v1/status")[1])["watches"]
                return float(status["next_poll"] or 0.0)

            eventually(lambda: next_poll() > 12, LONG, 0.1)
            assert daemon.value(CIRCUIT_OPEN) == 1
            calls = simulated.calls()
            secret.write_text("simulated\n")
            eventually(lambda: simulated.calls() > calls, LONG, 0.05)
            assert next_poll() < 2, "the rhythm is the usual one again"
            page = daemon.wait_success()
            assert set(select(page, CIRCUIT_OPEN).values()) == {0.0}


SILENT = (
    "import socket, time; real = socket.getaddrinfo; "
    "socket.getaddrinfo = lambda host, *a, **k: time.sleep(100) if host == 'silent.test' else real(host, *a, **k); "
)
"""A name server that does not answer."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_F64_a_silent_resolver_does_not_delay_the_end(tmp_path: Path, number: signal.Signals) -> None:
    """The process exits normally while the look-up still runs."""
    config = configuration("http://silent.test", blueking={"request_timeout": "300ms"})
    with Daemon(tmp_path, config, program=(*PROGRAM[:-1], SILENT + PROGRAM[-1])) as daemon:
        daemon.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", reason="timeout")))
        daemon.signal(number)
        assert daemon.exit_code(30) == 0
        assert "event=stopped_by_force" not in daemon.log


@pytest.mark.parametrize("name", ["once", "probe"])
def test_F64_commands_end_in_spite_of_a_silent_resolver(tmp_path: Path, name: str) -> None:
    """With their error, when the deadline of the request has passed."""
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(configuration("http://silent.test", [BIZ], blueking={"request_timeout": "300ms"})))
    done = run_command(name, f"--config.file={file}", program=(*PROGRAM[:-1], SILENT + PROGRAM[-1]))
    assert done.returncode == 1
    assert "no complete answer within 0.3 s" in done.stdout + done.stderr
