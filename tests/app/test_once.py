"""`once`: a complete poll as a text file, for cron and node_exporter."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from exporter.model import Scope
from exporter.once import write_atomically
from exporter.simulator.world import StepScript, target
from tests.support.process import (
    BIZ,
    FINISHED,
    OTHER,
    Daemon,
    Samples,
    Simulated,
    command,
    configuration,
    expected,
    samples,
    select,
    shown,
    total,
)


class Once:
    """A folder in which `once` is run again and again."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.file = folder / "config.yaml"
        self.output = folder / "blueking.prom"
        self.file.write_text(json.dumps(config))

    def __call__(self, *arguments: str) -> tuple[int, Samples, str]:
        done = command("once", f"--config.file={self.file}", f"--output={self.output}", *arguments)
        page = samples(self.output.read_text()) if self.output.exists() else {}
        return done.returncode, page, done.stderr


def finish(simulated: Simulated, count: int, scope: Scope = BIZ) -> None:
    for number in range(count):
        simulated.start(scope, steps=[StepScript(duration=0.0, results={target(number): (104, 2)})])


def test_counts_continue_from_run_to_run(tmp_path: Path, simulated: Simulated) -> None:
    """The first run is the baseline; each later one adds what has happened since, once, and ignores the hold."""
    once = Once(tmp_path, configuration(simulated.url, counter_birth_hold="1h"))
    finish(simulated, 2)
    since = simulated.do(lambda platform: platform.job.time)
    code, page, err = once()
    assert (code, err, total(page, FINISHED)) == (0, "", 0)
    finish(simulated, 3)
    assert once()[0] == 0
    finish(simulated, 1)
    code, page, _ = once()
    assert code == 0
    assert shown(page) == expected(simulated.truth(since_ms=since))
    assert total(page, "blueking_job_host_failures_total") == 4, "the hold is for those who scrape"
    code, again, _ = once()
    assert shown(again) == shown(page)


def test_the_page_is_for_node_exporter(tmp_path: Path, simulated: Simulated) -> None:
    """No time stamps, no process metrics that would be duplicates there; readable for all, nothing left beside it."""
    once = Once(tmp_path, configuration(simulated.url))
    code, page, _ = once()
    assert code == 0
    assert not [name for name, _ in page if name.startswith(("process_", "python_"))]
    assert {name for name, _ in page} >= {"blueking_scope_info", "blueking_exporter_collector_success"}
    assert all(
        len(line.rsplit("}", 1)[-1].split()) == 1 for line in once.output.read_text().splitlines() if "}" in line
    )
    assert stat.S_IMODE(once.output.stat().st_mode) == 0o644
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".blueking.prom")]


def test_several_files_in_one_folder_repeat_nothing(tmp_path: Path, simulated: Simulated) -> None:
    """With --no-constants the files of two exporters share no series, which node_exporter would refuse; one of them has
    the table of status codes."""
    pages = []
    for scope, flags in ((BIZ, ()), (OTHER, ("--no-constants",))):
        folder = tmp_path / scope.bk_scope_id
        folder.mkdir()
        code, page, _ = Once(folder, configuration(simulated.url, [scope]))(*flags)
        assert code == 0
        pages.append(page)
    whole, rest = pages
    assert not whole.keys() & rest.keys()
    assert {name for name, _ in whole} - {name for name, _ in rest} == {"blueking_job_status_code_info"}


def test_without_output_it_writes_to_standard_output(tmp_path: Path, simulated: Simulated) -> None:
    """The same text on standard output, the log on standard error."""
    once = Once(tmp_path, configuration(simulated.url))
    done = command("once", f"--config.file={once.file}", "--log.level=debug")
    assert done.returncode == 0
    assert total(samples(done.stdout), "blueking_exporter_collector_success") == 1


def test_one_failing_scope_ends_with_1_and_shows_the_others(tmp_path: Path, simulated: Simulated) -> None:
    """Exit 1 when a collector fails; the file is written all the same, with what is known of each."""
    once = Once(tmp_path, configuration(simulated.url, [BIZ, OTHER]))
    assert once()[0] == 0
    finish(simulated, 1)
    finish(simulated, 1, OTHER)
    simulated.fault("http_502", bk_scope_type="biz", bk_scope_id="3")
    code, page, err = once()
    assert code == 1
    assert "reason=http_5xx" in err
    assert total(page, "blueking_exporter_collector_success", bk_scope_id="2") == 1
    assert total(page, "blueking_exporter_collector_success", bk_scope_id="3") == 0
    assert total(page, FINISHED, bk_scope_id="2") == 1
    assert total(page, FINISHED, bk_scope_id="3") == 0
    assert not select(page, "blueking_job_last_finished_timestamp_seconds", bk_scope_id="3"), "gauges are withheld"
    simulated.clear()
    code, page, _ = once()
    assert (code, total(page, FINISHED, bk_scope_id="3")) == (0, 1)


def test_long_history_is_read_to_its_end(tmp_path: Path, simulated: Simulated) -> None:
    """A run after a long pause reads slice after slice, not one of them."""
    once = Once(tmp_path, configuration(simulated.url, collectors={"job": {"lookback": "1s"}}))
    assert once()[0] == 0
    since = simulated.do(lambda platform: platform.job.time)
    step = StepScript(duration=0.0, results={target(1): 9})

    def history(platform: Any) -> None:
        for number in range(4500):
            platform.job.start(
                BIZ, steps=[step], create_time=since + 1 + number // 2, visible_from=since + 1 + number // 2
            )

    simulated.do(history)
    time.sleep(2.5)
    code, page, _ = once()
    assert code == 0
    assert total(page, FINISHED) == 4500


def test_a_daemon_and_once_do_not_share_a_state(tmp_path: Path, simulated: Simulated) -> None:
    """While a daemon holds the state, `once` ends with 1 and names it; the file of before stays."""
    config = configuration(simulated.url)
    once = Once(tmp_path, config)
    assert once()[0] == 0
    before = once.output.read_bytes()
    with Daemon(tmp_path, config) as daemon:
        daemon.wait_success()
        assert daemon.process is not None
        code, _, err = once()
        assert code == 1
        assert f"pid {daemon.process.pid}" in err
    assert once.output.read_bytes() == before


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path, simulated: Simulated) -> None:
    """Exit 1 with one line; nothing is lost, since the state continues."""
    once = Once(tmp_path, configuration(simulated.url))
    once.output = tmp_path / "missing" / "blueking.prom"
    code, _, err = once()
    assert code == 1
    assert "cannot write" in err
    assert "Traceback" not in err


def test_a_reader_sees_the_old_page_or_the_new_one(tmp_path: Path) -> None:
    """The file is replaced in one step; when writing fails, the old one stays and no temporary file does."""
    file = tmp_path / "page.prom"
    write_atomically(file, b"one\n")
    with file.open("rb") as reader:
        write_atomically(file, b"two\n")
        assert (reader.read(), file.read_bytes()) == (b"one\n", b"two\n")
    folder = tmp_path / "folder.prom"
    folder.mkdir()
    with pytest.raises(OSError, match=r"directory"):
        write_atomically(folder, b"x")
    assert sorted(os.listdir(tmp_path)) == ["folder.prom", "page.prom"]
