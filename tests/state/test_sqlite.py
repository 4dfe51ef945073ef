"""The state: what survives, what is refused, what is moved aside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.config.schema import State
from exporter.errors import StateError, StateLocked, StateNewer
from exporter.model import Key, Scope
from exporter.simulator.world import StepScript, target
from exporter.state.base import SCHEMA, Store, open_store
from exporter.state.memory import MemoryStore
from exporter.state.sqlite import SQLiteStore
from tests.support.components import eventually
from tests.support.process import BIZ, FINISHED, Daemon, Simulated, command, configuration, expected, shown, total

KEY = Key("job", BIZ)
OTHER = Key("job", Scope("biz", "3"))
RESETS = "blueking_exporter_state_resets_total"
KINDS = ("memory:", "sqlite:")


def finish(simulated: Simulated, count: int = 1, **arguments: Any) -> None:
    """Let executions have ended by now."""
    for _ in range(count):
        simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})], **arguments)


async def committed(store: Store, key: Key) -> bytes | None:
    """What a store holds of a key, by itself."""
    stored = await store.load(key)
    return stored.payload if stored else None


# The store by itself


async def test_F54_a_disk_that_hangs_fails_calls_and_loses_nothing(tmp_path: Path) -> None:
    """While the thread is blocked every call ends with an error after a while, and what waits does not pile up; once
    the disk continues, the newest payload of each key is the one that stays."""
    store = SQLiteStore(tmp_path / "state.db", patience=0.2)
    await store.open()
    await store.commit(KEY, b"before")
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        other.execute("BEGIN IMMEDIATE")  # SQLite waits five seconds for it, in the thread
        for number in range(3):
            for key in (KEY, OTHER):
                with pytest.raises(StateError, match="does the disk hang"):
                    await store.commit(key, b"during %d" % number)
        for call in (store.load(KEY), store.size(), store.check()):
            with pytest.raises(StateError, match="does the disk hang"):
                await call
    for _ in range(100):
        if await committed_in_time(store, OTHER) == b"during 2":
            break
        await asyncio.sleep(0.1)
    assert await committed(store, KEY) == b"during 2"
    await store.commit(KEY, b"after")
    assert await committed(store, KEY) == b"after"
    await store.close()


async def committed_in_time(store: Store, key: Key) -> bytes | None:
    """`committed`, None also while the store does not answer."""
    with contextlib.suppress(StateError):
        return await committed(store, key)
    return None


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_committed_is_loaded_and_keys_are_apart(tmp_path: Path, kind: str) -> None:
    """Each key has the payload committed last, None before the first."""
    store: Store = open_store(State(url=f"{kind}{tmp_path / 'state.db'}"))
    await store.open()
    assert await committed(store, KEY) is None
    for payload in (b"one", b"two"):
        await store.commit(KEY, payload)
    await store.commit(OTHER, b"")
    assert (await committed(store, KEY), await committed(store, OTHER)) == (b"two", b"")
    assert (await store.size() is None) == (kind == "memory:")
    await store.close()
    await store.close()


async def test_a_second_life_finds_everything(tmp_path: Path) -> None:
    """What was committed is there after close and open, and no reset is reported."""
    path = tmp_path / "state.db"
    for expected_payload in (None, b"1", b"2"):
        store = SQLiteStore(path)
        await store.open()
        assert await committed(store, KEY) == expected_payload
        await store.commit(KEY, b"1" if expected_payload is None else b"2")
        assert store.resets == 0
        await store.close()


async def test_commits_that_come_together_are_written_together(tmp_path: Path) -> None:
    """A slow disk is waited for once by all: a thousand at a time take a hundredth of the log of one after another."""
    keys = [Key("job", Scope("biz", str(number))) for number in range(1000)]
    written = {}
    for kind in ("together", "apart"):
        store = SQLiteStore(tmp_path / f"{kind}.db")
        await store.open()
        for payload in (b"1", b"2"):
            if kind == "together":
                await asyncio.gather(*(store.commit(key, payload) for key in keys))
            else:
                for key in keys:
                    await store.commit(key, payload)
        assert {await committed(store, key) for key in keys} == {b"2"}
        written[kind] = (tmp_path / f"{kind}.db-wal").stat().st_size
        await store.close()
    assert written["together"] < written["apart"] / 10


async def test_all_that_are_written_together_fail_together(tmp_path: Path) -> None:
    """Each commit of a failed transaction fails, and the next commit is a new attempt."""
    store = SQLiteStore(tmp_path / "state.db")
    outcomes = await asyncio.gather(*(store.commit(key, b"lost") for key in (KEY, OTHER, KEY)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StateError] * 3
    await store.open()
    assert (await committed(store, KEY), await committed(store, OTHER)) == (None, None)
    await store.commit(KEY, b"after")
    assert await committed(store, KEY) == b"after"
    await store.close()


async def test_a_close_writes_what_has_gathered(tmp_path: Path) -> None:
    """Commits that wait for the one that is being written are not lost to a close."""
    store = SQLiteStore(tmp_path / "state.db")
    await store.open()
    commits = [asyncio.create_task(store.commit(Key("job", Scope("biz", str(n))), b"1")) for n in range(1, 50)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*commits)
    await store.open()
    assert [await committed(store, Key("job", Scope("biz", str(n)))) for n in range(1, 50)] == [b"1"] * 49
    await store.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_is_gone_for_long_is_purged(tmp_path: Path, kind: str) -> None:
    """Only keys that are neither kept nor newer than the limit are forgotten; memory keeps all."""
    store = open_store(State(url=f"{kind}{tmp_path / 'state.db'}"))
    await store.open()
    await store.commit(KEY, b"kept")
    await store.commit(OTHER, b"gone")
    assert await store.purge([KEY], time.time() - 60) == 0, "too young"
    removed = 0 if kind == "memory:" else 1
    assert await store.purge([KEY], time.time() + 60) == removed
    assert await committed(store, KEY) == b"kept"
    assert (await committed(store, OTHER) is None) == bool(removed)
    await store.close()


async def test_a_store_that_is_closed_says_so(tmp_path: Path) -> None:
    """Work after close is a StateError, not a crash."""
    store = SQLiteStore(tmp_path / "state.db")
    await store.open()
    await store.close()
    with pytest.raises(StateError, match="not open"):
        await committed(store, KEY)


async def test_F40_a_second_holder_is_named(tmp_path: Path) -> None:
    """Two stores on one file: the error of the second names the process id of the first. It opens when the first is
    closed."""
    first, second = SQLiteStore(tmp_path / "state.db"), SQLiteStore(tmp_path / "state.db")
    await first.open()
    with pytest.raises(StateLocked, match=rf"pid {os.getpid()}\)"):
        await second.open()
    await first.close()
    await second.open()
    await second.close()


async def test_F40_a_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    """A file of a newer version stays byte for byte as it is."""
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE future (x)")
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateNewer, match=f"schema {SCHEMA + 1}, this version knows {SCHEMA}"):
        await SQLiteStore(path).open()
    assert path.read_bytes() == before


async def test_the_database_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    """A mistyped path must not write into another program's data."""
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE state (mine)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match="something else"):
        await SQLiteStore(path).open()
    assert path.read_bytes() == before


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "text": lambda data: b"this is no database" * 1000,
    "header": lambda data: b"\0" * 100 + data[100:],
    "half a page": lambda data: data[:4096] + os.urandom(2048) + data[6144:],
    "cut": lambda data: data[:5000],
    "pages of zeros": lambda data: data[:4096] + b"\0" * (len(data) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_F40_a_damaged_file_is_moved_aside(tmp_path: Path, damage: str) -> None:
    """Whatever is damaged, an empty state takes its place, the reset is reported and nothing is thrown away."""
    path = tmp_path / "state.db"
    store = SQLiteStore(path)
    await store.open()
    for number in range(50):
        await store.commit(Key("job", Scope("biz", str(number))), os.urandom(1000))
    await store.close()
    damaged = DAMAGES[damage](path.read_bytes())
    path.write_bytes(damaged)
    store = SQLiteStore(path)
    await store.open()
    assert store.resets == 1
    assert await committed(store, Key("job", Scope("biz", "1"))) is None
    await store.commit(KEY, b"new")
    await store.close()
    aside = [file for file in tmp_path.iterdir() if ".corrupt-" in file.name and "-wal" not in file.name]
    assert [file.read_bytes() for file in aside] == [damaged]


@given(st.binary(max_size=300))
@settings(max_examples=30)
async def test_F40_any_bytes_as_a_file_end_in_an_open_store_or_a_state_error(data: bytes) -> None:
    """No content of the file raises anything but StateError."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        path.write_bytes(data)
        store = SQLiteStore(path)
        try:
            await store.open()
        except StateError:
            return
        await store.commit(KEY, b"x")
        assert await committed(store, KEY) == b"x"
        await store.close()


async def test_memory_continues_within_the_process() -> None:
    """A removed scope that returns before the end of the process is continued in memory too."""
    store = MemoryStore()
    await store.commit(KEY, b"1")
    assert await committed(store, KEY) == b"1"


# The daemon and its state


def test_F40_a_corrupt_state_means_a_new_baseline(tmp_path: Path, simulated: Simulated) -> None:
    """The daemon starts on a corrupt file, counts nothing of the past, says so in log and metric, and counts on."""
    finish(simulated, 3)
    (tmp_path / "state.db").write_bytes(b"no database at all" * 500)
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        page = daemon.wait_success()
        assert total(page, RESETS) == 1
        assert total(page, FINISHED) == 0
        assert "event=state_damaged" in daemon.log
        assert len([file for file in tmp_path.iterdir() if ".corrupt-" in file.name]) == 1
        finish(simulated)
        assert total(daemon.wait_success(), FINISHED) == 1


def test_F40_a_second_daemon_is_refused_with_the_holder(tmp_path: Path, simulated: Simulated) -> None:
    """On a locked state the command ends with 1 and names the process that holds it; the first daemon continues."""
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        daemon.wait_success()
        assert daemon.process is not None
        done = command("run", f"--config.file={daemon.file}")
        assert done.returncode == 1
        assert f"held by another process (pid {daemon.process.pid})" in done.stderr
        assert "Traceback" not in done.stderr
        daemon.wait_success()


def test_F40_a_newer_state_is_refused(tmp_path: Path, simulated: Simulated) -> None:
    """On the state of a newer version the command ends with 1 and the file stays as it is."""
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 7}")
    db.close()
    before = path.read_bytes()
    file = tmp_path / "config.yaml"
    file.write_text(msgspec.json.encode(configuration(simulated.url)).decode())
    done = command("run", f"--config.file={file}")
    assert (done.returncode, path.read_bytes()) == (1, before)
    assert f"has schema {SCHEMA + 7}" in done.stderr


def test_F40_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path, simulated: Simulated) -> None:
    """A state below a missing or read-only directory: exit 1, one line, no traceback."""
    cases = ["sqlite:missing/state.db", "sqlite:/proc/state.db"]
    for url in cases:
        file = tmp_path / "config.yaml"
        file.write_text(msgspec.json.encode(configuration(simulated.url, state={"url": url})).decode())
        done = command("run", f"--config.file={file}")
        assert done.returncode == 1
        assert url.partition(":")[2] in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_an_unreadable_payload_resets_its_key_only(tmp_path: Path, simulated: Simulated) -> None:
    """A payload that this version cannot read is a new baseline of that scope; the other scope counts on."""
    other = OTHER.scope
    config = configuration(simulated.url, [BIZ, other])
    with Daemon(tmp_path, config) as daemon:
        daemon.wait_success()
        daemon.wait_success(other)
        finish(simulated)
        finish(simulated, scope=other)
        daemon.wait_success()
        daemon.wait_success(other)
        daemon.stop()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE state SET payload = X'C1C1' WHERE bk_scope_id = '2'")
    db.close()
    with Daemon(tmp_path, config) as daemon:
        daemon.wait_success()
        page = daemon.wait_success(other)
        assert total(page, RESETS) == 1
        assert total(page, FINISHED, bk_scope_id="2") == 0
        assert total(page, FINISHED, bk_scope_id="3") == 1
        assert "event=state_unreadable" in daemon.log


def test_counts_continue_after_a_restart_and_downtime(tmp_path: Path, simulated: Simulated) -> None:
    """What ended while nobody looked is counted by the next run; the loaded counters are served at once."""
    daemon = Daemon(tmp_path, configuration(simulated.url))
    daemon.start()
    daemon.wait_success()
    begun = time.time()
    finish(simulated, 2)
    daemon.wait_success()
    assert daemon.stop() == 0
    finish(simulated, 3)
    # The platform is away: all there is is what was saved.
    simulated.fault("http_500")
    with daemon:
        page = daemon.metrics()
        assert total(page, FINISHED) == 2
        assert not [name for name, _ in page if name == "blueking_job_last_finished_timestamp_seconds"], "stale gauges"
        assert total(page, "blueking_exporter_collector_last_success_timestamp_seconds") > begun
        simulated.clear()
        page = daemon.wait_success()
        assert shown(page) == expected(simulated.truth(since_ms=int(begun * 1000) - 1))


def test_a_scope_that_is_gone_for_a_week_is_forgotten(tmp_path: Path, simulated: Simulated) -> None:
    """State older than 7 days of a scope that is not configured goes; that of a configured one stays however old."""
    with Daemon(tmp_path, configuration(simulated.url, [BIZ, OTHER.scope])) as daemon:
        daemon.wait_success()
        daemon.wait_success(OTHER.scope)
        finish(simulated)
        daemon.wait_success()
        daemon.stop()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE state SET updated = updated - 7 * 86400 - 60")
        db.execute("INSERT INTO state SELECT collector, 'biz_set', '7', payload, updated + 120 FROM state LIMIT 1")
    db.close()
    simulated.fault("http_502")
    with Daemon(tmp_path, configuration(simulated.url)) as daemon:
        eventually(lambda: "event=state_purged" in daemon.log, 10, 0.05)
        assert "states=1" in daemon.log
        assert total(daemon.metrics(), FINISHED) == 1
        daemon.stop()
    with sqlite3.connect(tmp_path / "state.db") as db:
        left = db.execute("SELECT bk_scope_type, bk_scope_id FROM state ORDER BY 1, 2").fetchall()
    db.close()
    assert left == [("biz", "2"), ("biz_set", "7")]


def test_F41_a_full_disk_fails_polls_until_there_is_space(
    tmp_path: Path, small_disk: Path, simulated: Simulated
) -> None:
    """On a full disk polls fail with reason `state` and the page does not change; with space they continue by
    themselves."""
    with Daemon(tmp_path, configuration(simulated.url, state={"url": f"sqlite:{small_disk}/state.db"})) as daemon:
        begun = time.time()
        daemon.wait_success()
        ballast = small_disk / "ballast"
        with ballast.open("wb", 0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                pass
        # The write-ahead log has pages to spare; a growing state uses them up.
        errors = "blueking_exporter_state_write_errors_total"

        def full() -> bool:
            finish(simulated, 20, name="x" * 60)
            return daemon.value(errors) >= 1

        eventually(full, 15, 0.1)
        page = daemon.metrics()
        assert total(page, "blueking_exporter_collector_errors_total", reason="state") >= 1
        assert total(page, "blueking_exporter_collector_success") == 0
        frozen = total(page, FINISHED)
        assert frozen < sum(simulated.truth(since_ms=int(begun * 1000)).finished.values())
        eventually(lambda: daemon.value(errors) > total(page, errors), 10, 0.05)
        assert daemon.value(FINISHED) == frozen, "what is not committed is not shown"
        ballast.unlink()
        page = daemon.wait_success()
        truth = simulated.truth(since_ms=int(begun * 1000))
        assert total(page, FINISHED) == sum(truth.finished.values())
        assert total(page, "blueking_exporter_collector_success") == 1
