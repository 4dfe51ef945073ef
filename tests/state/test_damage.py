"""Changes to the files of the state by others: noticed, reported, and repaired from memory (F40, F47, F65)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from exporter.clock import Clock
from exporter.collectors.job.collector import JobCollector
from exporter.config.schema import Auth, Collectors, JobPlatform, ScopeConfig
from exporter.config.secret import Secret
from exporter.errors import StateError, StateLocked
from exporter.exposed import page_families
from exporter.fleet import platforms
from exporter.metrics.page import Page
from exporter.model import Key, Scope
from exporter.poller import Poller, Services, Settings
from exporter.simulator.world import StepScript, target
from exporter.state.base import SCHEMA
from exporter.state.sqlite import SQLiteStore
from exporter.state.wal import ignored_commits
from exporter.telemetry import Telemetry
from tests.support import upstream
from tests.support.components import eventually
from tests.support.process import (
    BIZ,
    FINISHED,
    Daemon,
    Samples,
    Simulated,
    command,
    configuration,
    expected,
    samples,
    shown,
    total,
)

KEYS = [Key("job", Scope("biz", str(number))) for number in range(1, 25)]


def content(key: Key) -> bytes:
    return f"counts of {key} ".encode() * 60


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    """An open store with a payload for each of `KEYS`, all of them in the log."""
    store = SQLiteStore(tmp_path / "state.db")
    await store.open()
    for key in KEYS:
        await store.commit(key, content(key))
    yield store
    await store.close()


async def everything(store: SQLiteStore) -> dict[Key, bytes]:
    found = {key: await store.load(key) for key in KEYS}
    return {key: stored.payload for key, stored in found.items() if stored}


async def reopened(path: Path) -> SQLiteStore:
    """What the next process finds, and nothing that is only in memory."""
    store = SQLiteStore(path)
    await store.open()
    return store


async def closed(path: Path) -> None:
    """Open and close the state."""
    await (await reopened(path)).close()


def checkpointed(path: Path) -> None:
    """Empty the log into the database, as SQLite does by itself from time to time."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(RESTART)")
    db.close()


def flipped(path: Path, offset: int) -> None:
    """Change one bit in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def frames(wal: Path) -> list[int]:
    """Where the pages of the log begin."""
    return list(range(32 + 24, wal.stat().st_size, 24 + 4096))


def removed(path: Path) -> None:
    path.unlink()


def all_removed(path: Path) -> None:
    for file in path.parent.glob("state.db*"):
        file.unlink()


def log_removed(path: Path) -> None:
    path.with_name("state.db-wal").unlink()


def emptied(path: Path) -> None:
    checkpointed(path)
    os.truncate(path, 0)


def halved(path: Path) -> None:
    checkpointed(path)
    os.truncate(path, path.stat().st_size // 8192 * 4096)


def overwritten(path: Path) -> None:
    checkpointed(path)
    with path.open("r+b") as file:
        file.write(b"no database " * 700)


def overwritten_below_the_log(path: Path) -> None:
    """The log has every page, so SQLite itself sees nothing."""
    path.write_bytes(b"no database " * 700)


def replaced_by_text(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("no database at all")
    other.replace(path)


def replaced_by_another_state(path: Path) -> None:
    other = path.with_name("other.db")
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE state (collector, bk_scope_type, bk_scope_id, payload, updated)")
        db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.close()
    other.replace(path)


def frame_damaged(path: Path) -> None:
    wal = path.with_name("state.db-wal")
    places = frames(wal)
    flipped(wal, places[len(places) * 3 // 4] + 2000)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    removed,
    all_removed,
    log_removed,
    emptied,
    halved,
    overwritten,
    overwritten_below_the_log,
    replaced_by_text,
    replaced_by_another_state,
    frame_damaged,
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("noticed_by", ["check", "commit", "close"])
async def test_F65_a_state_that_is_damaged_under_the_process_is_written_again(
    store: SQLiteStore, tmp_path: Path, damage: Callable[[Path], None], noticed_by: str
) -> None:
    """Whatever happened to the files: the next look says so, once, and what memory holds is on disk again."""
    damage(store.path)
    if noticed_by == "commit":
        await store.commit(KEYS[0], content(KEYS[0]))
    if noticed_by != "close":
        assert not await store.check(), "some states must be committed again"
        for key in KEYS:
            await store.commit(key, content(key))
        assert await store.check()
    await store.close()
    assert store.resets == 1
    after = await reopened(store.path)
    found = await everything(after)
    readable = damage not in (emptied, halved, overwritten, frame_damaged)
    if noticed_by != "close" or readable:
        assert found == {key: content(key) for key in KEYS}
    assert after.resets == 0
    await after.close()
    assert not list(tmp_path.glob("*.new*"))


async def test_F65_what_was_found_in_the_place_of_the_state_is_kept_aside(store: SQLiteStore, tmp_path: Path) -> None:
    """Files of others are renamed, never removed, also when it happens twice in a second."""
    for number in range(3):
        other = tmp_path / "other"
        other.write_text(f"somebody's {number}")
        other.replace(store.path)
        assert not await store.check()
    aside = {file.read_text() for file in tmp_path.glob("state.db.corrupt-*")}
    assert aside == {"somebody's 0", "somebody's 1", "somebody's 2"}


async def test_F65_a_state_that_cannot_be_written_again_is_an_error_until_it_can(
    store: SQLiteStore, tmp_path: Path
) -> None:
    """While the directory is gone every commit fails; once it is back the store repairs itself."""
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    for _ in range(2):
        with pytest.raises(StateError, match="No such file"):
            await store.commit(KEYS[0], b"1")
        with pytest.raises(StateError, match="No such file"):
            await store.check()
    tmp_path.mkdir()
    assert not await store.check()
    assert await everything(store) == {key: content(key) for key in KEYS}


async def test_F41_a_state_that_cannot_be_rebuilt_for_lack_of_space_leaves_nothing_behind(
    small_disk: Path,
) -> None:
    """The disk is full and the file is gone: commits fail, and succeed once there is space, with every state."""
    store = await reopened(small_disk / "state.db")
    for key in KEYS:
        await store.commit(key, content(key))
    all_removed(store.path)
    with (small_disk / "ballast").open("wb", 0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    for _ in range(3):
        with pytest.raises(StateError):
            await store.commit(KEYS[0], content(KEYS[0]))
        assert sorted(file.name for file in small_disk.iterdir() if ".new" in file.name) == []
    (small_disk / "ballast").unlink()
    assert not await store.check()
    assert await everything(store) == {key: content(key) for key in KEYS}
    await store.close()


async def test_F65_what_only_touches_the_files_is_no_damage(store: SQLiteStore, tmp_path: Path) -> None:
    """Readers, backups, another time stamp: nothing is moved aside."""
    with sqlite3.connect(store.path) as db, sqlite3.connect(tmp_path / "backup.db") as copy:
        assert db.execute("SELECT count(*) FROM state").fetchone() == (len(KEYS),)
        db.backup(copy)
    db.close()
    copy.close()
    assert await store.check()
    os.utime(store.path)
    os.utime(store.path.with_name("state.db-wal"))
    assert not await store.check(), "to be sure, states are committed again"
    checkpointed(store.path)
    await store.check()
    await store.commit(KEYS[0], b"1")
    assert store.resets == 0
    assert not list(tmp_path.glob("*.corrupt-*"))


@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
async def test_F65_a_log_that_was_damaged_while_nobody_looked_is_reported(
    store: SQLiteStore, tmp_path: Path, where: float
) -> None:
    """After kill -9 SQLite would silently ignore the commits behind a damaged frame: the older counts that are left
    are not to be shown at once, and the damaged log is kept."""
    later = tmp_path / "later"
    later.mkdir()
    for name in ("state.db", "state.db-wal"):
        (later / name).write_bytes((tmp_path / name).read_bytes())
    wal = later / "state.db-wal"
    places = frames(wal)
    flipped(wal, places[int(where * (len(places) - 1))] + 3000)
    damaged = wal.read_bytes()
    found = await reopened(later / "state.db")
    assert found.resets == 1
    left = await everything(found)
    assert len(left) < len(KEYS)
    assert left.items() <= {key: content(key) for key in KEYS}.items()
    for key in left:
        stored = await found.load(key)
        assert stored is not None
        assert not stored.current
    assert [file.read_bytes() for file in later.glob("state.db-wal.corrupt-*")] == [damaged]
    await found.close()


async def test_F65_an_undamaged_log_is_read_to_its_end(store: SQLiteStore, tmp_path: Path) -> None:
    """After kill -9 everything that was committed is there and current, whatever rounds the log has behind it."""
    wal = store.path.with_name("state.db-wal")
    for _ in range(3):
        assert ignored_commits(wal) == 0
        checkpointed(store.path)
        await store.commit(KEYS[0], content(KEYS[0]))
    later = tmp_path / "later"
    later.mkdir()
    for name in ("state.db", "state.db-wal"):
        (later / name).write_bytes((tmp_path / name).read_bytes())
    found = await reopened(later / "state.db")
    assert found.resets == 0
    assert await everything(found) == {key: content(key) for key in KEYS}
    stored = await found.load(KEYS[0])
    assert stored is not None
    assert stored.current
    await found.close()


@pytest.mark.parametrize("offset", [0, 9, 17, 25], ids=["magic", "page size", "salt", "checksum"])
async def test_F65_a_log_with_a_damaged_header_is_reported(store: SQLiteStore, offset: int) -> None:
    """All its commits would be ignored."""
    wal = store.path.with_name("state.db-wal")
    flipped(wal, offset)
    assert ignored_commits(wal) > 10


async def test_F65_a_log_without_its_database_is_a_reset(store: SQLiteStore, tmp_path: Path) -> None:
    """state.db was removed while the daemon was down: SQLite would silently drop the log."""
    later = tmp_path / "later"
    later.mkdir()
    (later / "state.db-wal").write_bytes((tmp_path / "state.db-wal").read_bytes())
    found = await reopened(later / "state.db")
    assert found.resets == 1
    assert await everything(found) == {}
    assert len(list(later.glob("state.db-wal.corrupt-*"))) == 1
    await found.close()


# One process


def symlink(path: Path) -> Path:
    other = path.with_name("link.db")
    other.symlink_to(path)
    return other


def hard_link(path: Path) -> Path:
    other = path.with_name("hard.db")
    other.hardlink_to(path)
    return other


def lock_removed(path: Path) -> Path:
    path.with_name("state.db.lock").unlink()
    return path


def hard_link_without_lock(path: Path) -> Path:
    return hard_link(lock_removed(path))


@pytest.mark.parametrize("way", [symlink, hard_link, lock_removed, hard_link_without_lock])
async def test_F47_a_second_store_is_refused_whatever_its_name(store: SQLiteStore, way: Callable[[Path], Path]) -> None:
    """Links and a removed lock file let nobody in."""
    second = SQLiteStore(way(store.path))
    with pytest.raises(StateLocked, match="held by another process"):
        await second.open()
    await store.check()
    await store.commit(KEYS[0], b"goes on")
    assert (store.resets, second.resets) == (0, 0)
    with pytest.raises(StateLocked):
        await second.open()


def test_F40_another_program_that_locks_the_file_is_named(tmp_path: Path) -> None:
    """As an open `sqlite3 state.db` with a transaction does."""
    holding = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('BEGIN EXCLUSIVE');"
        "print('locked', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "state.db"
    command = [sys.executable, "-c", holding, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StateLocked, match=rf"held by another process \(pid {other.pid}\)"):
            asyncio.run(reopened(path))
        other.communicate(timeout=10)
    asyncio.run(closed(path))


async def test_F47_a_store_that_lost_its_files_leaves_those_of_another_alone(
    store: SQLiteStore, tmp_path: Path
) -> None:
    """Everything was removed and another process began anew there: the first fails and touches nothing."""
    all_removed(store.path)
    second = await reopened(store.path)
    await second.commit(KEYS[0], b"second")
    with pytest.raises(StateLocked):
        await store.check()
    with pytest.raises(StateLocked):
        await store.commit(KEYS[0], b"first")
    with pytest.raises(StateLocked):
        await store.close()
    assert await second.check()
    await second.commit(KEYS[1], b"second")
    await second.close()
    third = await reopened(tmp_path / "state.db")
    assert await everything(third) == {KEYS[0]: b"second", KEYS[1]: b"second"}
    await third.close()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "content", "pipe", "directory"])
async def test_F65_a_planted_lock_changes_nothing(tmp_path: Path, kind: str) -> None:
    """The lock file is never followed, emptied or written when it is not this program's; the message names it."""
    victim, lock = tmp_path / "victim", tmp_path / "state.db.lock"
    victim.write_text("precious")
    if kind in ("symlink", "dangling"):
        lock.symlink_to(victim if kind == "symlink" else tmp_path / "created")
    elif kind == "hard link":
        lock.hardlink_to(victim)
    elif kind == "content":
        lock.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(StateError, match=r"state\.db\.lock"):
        await SQLiteStore(tmp_path / "state.db").open()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "created").exists()
    if kind == "content":
        assert lock.read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
async def test_F65_a_state_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    """Anything else is refused at once, and nothing waits for it."""
    path = tmp_path / "state.db"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(StateError, match=r"is no regular file|Is a directory"):
        await SQLiteStore(path).open()


async def test_F65_the_state_is_for_its_owner_alone(tmp_path: Path) -> None:
    """All files are 0600, also those that an older version left open to others."""

    def modes() -> dict[str, int]:
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}

    mask = os.umask(0)
    try:
        for name in ("state.db", "state.db.lock"):
            (tmp_path / name).touch(mode=0o666)
        store = await reopened(tmp_path / "state.db")
        await store.commit(KEYS[0], b"1")
        assert modes() == dict.fromkeys(("state.db", "state.db-wal", "state.db-shm", "state.db.lock"), 0o600)
        store.path.unlink()
        await store.check()
        assert set(modes().values()) == {0o600}
        await store.close()
    finally:
        os.umask(mask)


REFUSING = """
import asyncio, errno, fcntl, os, sys
from pathlib import Path
from exporter.state.sqlite import SQLiteStore

def refuse(event, arguments):
    if event == sys.argv[2] and arguments[1] not in (fcntl.F_GETFD, fcntl.F_SETFD):
        raise OSError(int(sys.argv[3]), os.strerror(int(sys.argv[3])))

sys.addaudithook(refuse)
try:
    asyncio.run(SQLiteStore(Path(sys.argv[1])).open())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("call", ["fcntl.flock", "fcntl.fcntl"])
@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP"])
def test_F65_a_file_system_without_locks_is_refused_with_a_hint(tmp_path: Path, call: str, number: str) -> None:
    """As NFS without its lock daemon answers: the message says what to do."""
    import errno

    code = str(getattr(errno, number))
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, str(tmp_path / "state.db"), call, code],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith(f"StateError state {tmp_path}/state.db cannot be locked: ")
    assert "keep the state on a local disk, or use redis" in done.stdout


# Reading beside the process that has the state


async def test_a_reader_beside_the_process_sees_what_is_committed_and_changes_nothing(store: SQLiteStore) -> None:
    """Reading needs no lock; committing is refused."""
    reader = SQLiteStore(store.path)
    await reader.open(read_only=True)
    assert await everything(reader) == {key: content(key) for key in KEYS}
    assert set(await reader.keys()) == set(KEYS)
    for work in (reader.commit(KEYS[0], b"x"), reader.forget(KEYS)):
        with pytest.raises(StateError, match="not open for writing"):
            await work
    await reader.close()
    assert await store.check()
    assert await everything(store) == {key: content(key) for key in KEYS}


async def test_forgotten_keys_are_gone(store: SQLiteStore) -> None:
    """`forget` removes exactly the keys that it is given."""
    await store.forget(KEYS[:2])
    assert set(await store.keys()) == set(KEYS[2:])


# The daemon


RESETS = "blueking_exporter_state_resets_total"
WRITE_ERRORS = "blueking_exporter_state_write_errors_total"


def finish(simulated: Simulated, count: int) -> None:
    """Let executions have ended by now."""
    for _ in range(count):
        simulated.start(steps=[StepScript(duration=0.0, results={target(1): 9})])


def resets_are(number: int) -> Callable[[Samples], bool]:
    return lambda page: total(page, RESETS) == number


def test_F65_the_daemon_continues_with_its_counts_whatever_happens_to_the_file(
    tmp_path: Path, simulated: Simulated
) -> None:
    """Each time the log and a metric say so, and a process that starts after kill -9 has every count."""
    running = Daemon(tmp_path, configuration(simulated.url))
    with running:
        running.wait_success()
        begun = time.time()
        for number, damage in enumerate((removed, all_removed, emptied, replaced_by_another_state, frame_damaged), 1):
            finish(simulated, 3)
            running.wait_success()
            damage(tmp_path / "state.db")
            assert total(running.wait_success(), FINISHED) == 3 * number
        running.wait(resets_are(5), 60)
        assert "event=state_damaged" in running.log
        running.kill()
        simulated.fault("http_500")
        running.start()
        page = running.metrics()
        assert (total(page, FINISHED), total(page, RESETS)) == (15, 0)
        simulated.clear()
        assert shown(running.wait_success()) == expected(simulated.truth(since_ms=int(begun * 1000) - 1))


def test_F65_damage_is_noticed_between_two_polls(tmp_path: Path, simulated: Simulated) -> None:
    """Nothing is polled for an hour: within a minute the file is there again, with what memory holds."""
    running = Daemon(tmp_path, configuration(simulated.url))
    with running:
        running.wait_success()
        finish(simulated, 7)
        running.wait_success()
        running.stop()
        running.write(configuration(simulated.url, collectors={"job": {"interval": "1h"}}))
        running.start()
        running.wait_ready()
        calls = simulated.calls()
        emptied(tmp_path / "state.db")
        running.wait(resets_are(1), 60)
        assert "event=state_damaged" in running.log
        eventually(lambda: states(tmp_path / "state.db") == 1, 60, 0.1)
        assert simulated.calls() == calls
        running.kill()
        running.start()
        assert running.value(FINISHED) == 7


def states(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM state").fetchone()[0])


def test_F65_counts_that_may_be_older_than_shown_wait_for_the_first_poll(tmp_path: Path, simulated: Simulated) -> None:
    """kill -9, and a frame of the log is damaged: the counts that are left are lower than those that were shown.
    They are not shown before the rest is counted again, so that no counter falls."""
    with Daemon(tmp_path, configuration(simulated.url)) as running:
        running.wait_success()
        begun = time.time()
        for _ in range(4):
            finish(simulated, 5)
            running.wait_success()
        running.kill()
        frame_damaged(tmp_path / "state.db")
        simulated.fault("http_500")
        running.start()
        page = running.metrics()
        assert not [name for name, _ in page if name.startswith("blueking_job_executions")]
        assert total(page, RESETS) == 1
        assert "event=state_damaged" in running.log
        simulated.clear()
        assert shown(running.wait_success()) == expected(simulated.truth(since_ms=int(begun * 1000) - 1))


@pytest.mark.parametrize("way", [symlink, hard_link, lock_removed])
def test_F47_a_second_daemon_is_refused_whatever_its_name(
    tmp_path: Path, simulated: Simulated, way: Callable[[Path], Path]
) -> None:
    """Exit 1, the holder is named, and the first daemon continues."""
    with Daemon(tmp_path, configuration(simulated.url)) as running:
        running.wait_success()
        assert running.process is not None
        name = way(tmp_path / "state.db")
        done = command("run", f"--config.file={running.file}", f"--state.url=sqlite:{name}")
        assert done.returncode == 1
        assert f"is held by another process (pid {running.process.pid})" in done.stderr
        running.wait_success()
        assert running.value(RESETS) == 0


async def test_F65_a_state_that_cannot_be_loaded_is_no_write_error(tmp_path: Path) -> None:
    """Only commits count as such; the poll fails with reason `state` either way."""
    telemetry = Telemetry()
    services = Services(SQLiteStore(tmp_path / "never opened"), Page(page_families()), telemetry, Clock())
    one = ScopeConfig(BIZ, "", Collectors())
    job, auth = JobPlatform("http://127.0.0.1:1"), Auth("a", Secret("s"))
    async with upstream.client(job=job, auth=auth) as client:
        collector = JobCollector.build(one, platforms(client, one), services.clock)
        assert collector is not None
        poller = Poller(collector, Settings(hold=0.0, stale_after=5, request_timeout=2.0), services)
        await poller.poll()
        poller.close()
    assert poller.reason == "state"
    page = samples(telemetry.render(False).decode())
    assert total(page, WRITE_ERRORS) == 0
