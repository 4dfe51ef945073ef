"""`demo` and `simulate`: data within seconds, and the addresses to open."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.components import eventually, free_port, http
from tests.support.process import PROGRAM, Daemon, environment, samples, select, total


@contextmanager
def running(
    folder: Path, *arguments: str, environ: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command that continues until it is stopped, and the file of what it prints."""
    output = folder / "output"
    with output.open("wb") as file, output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([*PROGRAM, *arguments], stdout=file, stderr=log, env=environment() | (environ or {}))
    try:
        yield process, output
    finally:
        process.kill()
        process.wait(10)


def test_demo_shows_something_soon(tmp_path: Path) -> None:
    """It prints its addresses; all of them answer, with finished executions and failing hosts; SIGTERM ends it with 0
    and leaves nothing behind. `make fresh` measures how soon /metrics answers."""
    address = f"127.0.0.1:{free_port()}"
    with running(tmp_path, "demo", f"--web.listen-address={address}") as (process, output):
        urls = eventually(lambda: re.findall(r"http://\S+", output.read_text()), 60)
        simulator, page, metrics, failures = urls[:4]
        assert (page, metrics) == (f"http://{address}/", f"http://{address}/metrics")

        def worth_looking_at() -> bool:
            found = samples(http(metrics)[1].decode())
            finished = total(found, "blueking_job_executions_finished_total")
            return finished > 0 and total(found, "blueking_job_hosts_failing") > 0

        eventually(worth_looking_at, 60)
        eventually(lambda: http(f"http://{address}/-/ready")[0] == 200, 60)
        assert http(page)[0] == http(failures)[0] == 200
        assert http(f"{simulator}/-/requests")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "Traceback" not in output.with_suffix(".log").read_text()


def test_demo_ends_with_its_terminal(tmp_path: Path) -> None:
    """SIGHUP, which a terminal sends when it is closed: exit 0, and the temporary directory is gone."""
    address = f"127.0.0.1:{free_port()}"
    with running(tmp_path, "demo", f"--web.listen-address={address}", environ={"TMPDIR": str(tmp_path)}) as (
        process,
        _,
    ):
        eventually(lambda: http(f"http://{address}/-/healthy")[0] == 200, 30)
        assert list(tmp_path.glob("blueking-exporter-demo-*"))
        process.send_signal(signal.SIGHUP)
        assert process.wait(15) == 0
        assert not list(tmp_path.glob("blueking-exporter-demo-*"))


def test_the_printed_configuration_of_simulate_works(tmp_path: Path) -> None:
    """What `simulate` prints is a configuration with which `run` watches it: scopes, port and seed as asked for."""
    port = free_port()
    arguments = ["simulate", f"--listen-address=127.0.0.1:{port}", "--scopes=2", "--seed=7", "--speed=20"]
    with running(tmp_path, *arguments) as (process, output):
        text = eventually(lambda: output.read_text() if "biz_set" in output.read_text() else "", 20)
        eventually(lambda: http(f"http://127.0.0.1:{port}/-/requests")[0] == 200)
        watcher = Daemon(tmp_path, {}, "--web.listen-address=127.0.0.1:0")
        watcher.file.write_text(text)
        with watcher:
            page = watcher.wait(
                lambda page: len(select(page, "blueking_exporter_collector_success", collector="job")) == 3
            )
            assert total(page, "blueking_exporter_collector_success", collector="job") == 3
            assert watcher.stop() == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_simulate_applies_the_given_faults(tmp_path: Path) -> None:
    """--faults: every list call is answered with 502."""
    port = free_port()
    faults = "--faults=http_502@get_job_instance_list"
    with running(tmp_path, "simulate", f"--listen-address=127.0.0.1:{port}", faults, "--scopes=1"):
        url = f"http://127.0.0.1:{port}/api/bk-job/prod/api/v4/system/get_job_instance_list/"
        eventually(lambda: http(url)[0] == 502, 20)
