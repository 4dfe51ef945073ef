"""`blueking-exporter state`: what is counted, shown, carried to another store and forgotten."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from exporter.discovery import DiscoveryState, FoundScope
from exporter.metrics.negotiate import Format
from exporter.model import Scope
from exporter.simulator.world import StepScript, target
from tests.support.process import Daemon, Simulated, command, configuration, samples, total

FIXTURES = Path(__file__).parent
KEYS = {("job", "2"), ("nodeman_job", "2"), ("nodeman_subscription", "2"), ("nodeman_task", "2")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration and the state of an older build: see tests/support/history.py."""
    (tmp_path / "config.yaml").write_text(json.dumps(configuration("http://127.0.0.1:1")))
    shutil.copy(FIXTURES / "782d593.db", tmp_path / "state.db")
    return tmp_path


def state(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return command("state", arguments[0], f"--config.file={folder}/config.yaml", *arguments[1:], **options)


def said(folder: Path, *arguments: str, **options: Any) -> list[str]:
    """The lines of a command that succeeds."""
    done = state(folder, *arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def rows(path: Path) -> dict[tuple[str, str], bytes]:
    """What a state file holds."""
    db = sqlite3.connect(path)
    found = {
        (name, id): bytes(payload)
        for name, id, payload in db.execute("SELECT collector, bk_scope_id, payload FROM state")
    }
    db.close()
    return found


def test_list_has_a_line_per_key(folder: Path) -> None:
    """Last success, watermark, and how much is counted and followed."""
    head, *lines = said(folder, "list")
    assert re.split(r"  +", head) == [
        "collector", "scope", "last success", "watermark", "series", "tracked", "failing hosts", "bytes",
    ]  # fmt: skip
    found = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert found.keys() == {name for name, _ in KEYS}
    scope, success, watermark, series, tracked, failing, size = found["job"][1:]
    assert (scope, tracked, failing) == ("biz/2", "12", "3")
    assert re.fullmatch(r"2026-11-\d\dT\d\d:\d\d:\d\dZ", success)
    assert success >= watermark > "2026-11"
    assert int(series) > 30
    assert int(size) == len(rows(folder / "state.db")["job", "2"])
    assert found["nodeman_job"][5:7] == ["4", "2"]


@pytest.mark.parametrize("collector", ["job", "nodeman_job", "nodeman_subscription", "nodeman_task"])
def test_show_tells_every_count_as_the_page_did(folder: Path, collector: str) -> None:
    """Counters by their labels, sums and numbers of histograms, what is tracked, and which hosts fail."""
    lines = said(folder, "show", f"--collector={collector}", "--scope=biz/2")
    assert lines[0] == f"{collector} biz/2"
    page = samples(
        (FIXTURES / f"782d593-{'job' if collector == 'job' else 'nodeman'}.txt").read_text(), Format.OPENMETRICS
    )
    shown = {}
    for line in lines:
        if found := re.fullmatch(r"  (blueking_\w+)(?:\{(.*)\})? (\S+)", line):
            labels = frozenset(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            shown[found[1], labels] = float(found[3])
    assert len(shown) >= 1
    for (name, labels), value in shown.items():
        scoped = labels | {("bk_scope_type", "biz"), ("bk_scope_id", "2")}
        if name.startswith("blueking_exporter_"):
            scoped |= {("collector", collector)}
        assert page[name, frozenset(scoped)] == value, name
    if collector == "job":
        assert shown["blueking_job_host_results_total", frozenset()] == 12
        assert any(line.startswith("  execution 2") and "name=restart-app" in line for line in lines)
        assert any(line.startswith("  failing host bk_cloud_id=0 ") and "2 in a row" in line for line in lines)
    assert len(said(folder, "show")) > len(lines)


def test_what_is_exported_is_imported_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    """From one store to another, whole or in part; what was there is replaced."""
    lines = said(folder, "export")
    assert {(json.loads(line)["collector"], json.loads(line)["bk_scope_id"]) for line in lines} == KEYS
    other = f"--state.url=sqlite:{tmp_path}/other.db"
    text = "\n".join(lines) + "\n"
    assert said(folder, "import", other, "--collector=job", input=text) == [
        "imported 1 states, 0 of them in the place of one that was there"
    ]
    assert rows(tmp_path / "other.db").keys() == {("job", "2")}
    assert said(folder, "import", other, input=text) == [
        "imported 4 states, 1 of them in the place of one that was there"
    ]
    assert rows(tmp_path / "other.db") == rows(folder / "state.db")
    again = [json.loads(line) for line in said(folder, "export", other)]
    assert [line["payload"] for line in again] == [json.loads(line)["payload"] for line in lines]
    assert said(folder, "export", "--scope=biz/2", "--collector=job") == [lines[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Input data was truncated"),
        ('{"collector": "job"}', "line 2: Object missing required field `bk_scope_type`"),
        ("FIRST", "line 2: job biz/2 is also in line 1"),
        ("FIRST+", "line 2: Object contains unknown field `more`"),
        ("BROKEN", "line 2: job biz/2: cannot be read: "),
        ("\xff", "line 2: "),
    ],
)
def test_an_import_that_cannot_be_read_changes_nothing(folder: Path, line: str, message: str) -> None:
    """Each mistake is reported with its line, and no line is imported."""
    first = said(folder, "export")[0]
    text = {
        "FIRST": first,
        "FIRST+": first.replace("{", '{"more": 1, ', 1),
        "BROKEN": json.dumps(json.loads(first) | {"bk_scope_id": "2", "payload": "wcE="}),
    }.get(line, line)
    if line == "BROKEN":
        first = first.replace('"job"', '"nodeman_task"') and said(folder, "export", "--collector=nodeman_task")[0]
    before = rows(folder / "state.db")
    done = state(folder, "import", input=f"{first}\n{text}\n")
    assert done.returncode == 1
    assert done.stderr.startswith(f"blueking-exporter: {message}")
    assert done.stderr.rstrip().endswith("; nothing was imported")
    assert rows(folder / "state.db") == before


def test_reset_forgets_one_key(folder: Path) -> None:
    """Exactly the one that is named, and only with both names."""
    before = rows(folder / "state.db")
    for arguments in ((), ("--collector=job",), ("--scope=biz/2",)):
        done = state(folder, "reset", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "needs --collector and --scope" in done.stderr
    done = state(folder, "reset", "--collector=job", "--scope=biz/3")
    assert (done.returncode, done.stderr) == (1, "blueking-exporter: no state of job biz/3\n")
    assert rows(folder / "state.db") == before
    assert said(folder, "reset", "--collector=job", "--scope=biz/2") == [
        "forgot job biz/2: its next poll begins with a new baseline"
    ]
    del before["job", "2"]
    assert rows(folder / "state.db") == before


def test_what_cannot_be_done_is_said(folder: Path) -> None:
    """Bad arguments and configurations are exit 2, stores that are not there exit 1; no file is created."""
    for arguments, code, message in (
        (["list", "--scope=biz"], 2, "want TYPE/ID like biz/2"),
        (["lst"], 2, "invalid choice"),
        (["list", "--state.url=memory:"], 1, "keeps that state to itself"),
        (["list", f"--state.url=sqlite:{folder}/none.db"], 1, "unable to open database file"),
        (["show", "--scope=biz_set/9"], 1, "no state of biz_set/9"),
    ):
        done = state(folder, *arguments)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (folder / "none.db").exists()
    with sqlite3.connect(folder / "state.db") as db:
        db.execute("UPDATE state SET payload = X'C1' WHERE collector = 'job'")
        db.execute("UPDATE state SET collector = 'later' WHERE collector = 'nodeman_task'")
    db.close()
    lines = said(folder, "list")
    assert any(line.startswith("job ") and "cannot be read" in line for line in lines)
    assert any(line.startswith("later ") and "does not know" in line for line in lines)
    assert len(said(folder, "export")) == 4


def test_beside_a_running_daemon_states_are_only_read(tmp_path: Path, simulated: Simulated) -> None:
    """list, show and export read what is committed; import and reset are refused, naming the holder."""
    with Daemon(tmp_path, configuration(simulated.url)) as running:
        running.wait_success()
        simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})])
        running.wait_success()
        assert running.process is not None
        assert len(said(tmp_path, "list")) == 2
        finished = 'blueking_job_executions_finished_total{task_type="script",launch_mode="api",status="success"} 1'
        assert f"  {finished}" in said(tmp_path, "show", "--scope=biz/2")
        (line,) = said(tmp_path, "export")
        for arguments in (("import",), ("reset", "--collector=job", "--scope=biz/2")):
            done = state(tmp_path, *arguments, input=f"{line}\n")
            assert (done.returncode, done.stdout) == (1, "")
            assert f"is held by another process (pid {running.process.pid})" in done.stderr
        page = running.wait_success()
        assert total(page, "blueking_job_executions_finished_total") == 1
        assert total(page, "blueking_exporter_state_resets_total") == 0
        running.stop()
        said(tmp_path, "reset", "--collector=job", "--scope=biz/2")
        running.start()
        assert total(running.wait_success(), "blueking_job_executions_finished_total") == 0
        running.stop()
        said(tmp_path, "import", input=f"{line}\n")
        running.start()
        assert total(running.wait_success(), "blueking_job_executions_finished_total") == 1


def test_the_scopes_that_discovery_found_are_shown_and_moved(folder: Path, tmp_path: Path) -> None:
    """Their state has no counters, and is exported and imported like the others."""
    state = DiscoveryState((FoundScope(Scope("biz", "3"), "Shop"), FoundScope(Scope("biz_set", "9"), "All", 2)), 1.8e9)
    with sqlite3.connect(folder / "state.db") as db:
        db.execute("INSERT INTO state VALUES ('discovery', 'biz', '0', ?, 1.8e9)", (msgspec.msgpack.encode(state),))
    db.close()
    (line,) = [line for line in said(folder, "list") if line.startswith("discovery ")]
    assert line.split()[:4] == ["discovery", "biz/0", "2027-01-15T08:00:00Z", "2"]
    assert said(folder, "show", "--collector=discovery")[2:] == [
        "  last success  2027-01-15T08:00:00Z",
        "  found biz/3 Shop, missing in 0 lists in a row",
        "  found biz_set/9 All, missing in 2 lists in a row",
    ]
    lines = said(folder, "export")
    said(folder, "import", f"--state.url=sqlite:{tmp_path}/other.db", input="\n".join(lines))
    assert rows(tmp_path / "other.db") == rows(folder / "state.db")
