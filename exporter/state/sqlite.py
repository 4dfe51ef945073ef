"""The state in one SQLite file with a write-ahead log, written by one thread, locked against a second process.

`synchronous=FULL`: a commit that has returned survives a power failure too, so a counter that was seen on /metrics can
never come back smaller, which Prometheus would take for a restart and count a second time.

SQLite does not notice when others remove, replace or change its files, and does not verify a log that it has read
before. So each write first looks whether the files are still as this store left them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import quote

from exporter import log
from exporter.errors import StateError, StateNewer
from exporter.model import Key, Scope, ScopeType
from exporter.shard import Shard
from exporter.state.base import SCHEMA, Stored
from exporter.state.lock import NO_LOCKS, StateLock
from exporter.state.wal import ignored_commits

PATIENCE = 30.0
"""Seconds that a call waits for the thread: a disk that hangs may block the thread for ever."""

T = TypeVar("T")
Row = tuple[str, str, str, bytes, float]

_MAGIC = b"SQLite format 3\0"
_WHERE = "WHERE collector = ? AND bk_scope_type = ? AND bk_scope_id = ?"
_LOCK_ERRORS = (
    "SQLITE_PROTOCOL",
    "SQLITE_IOERR_LOCK",
    "SQLITE_IOERR_RDLOCK",
    "SQLITE_IOERR_UNLOCK",
    "SQLITE_IOERR_SHM",
)


class SQLiteStore:
    """See `Store`. Damaged files are moved aside (`FILE.corrupt-TIME`) and counted in `resets`.

    At the start an empty file takes their place, or what is left of the log is used. Later a new file is made of what
    can still be read, and `check` asks for the rest.

    `shard`: whose state it must be. One of another shard is refused, unless `accept_reshard`; then what moved to other
    shards is forgotten, so that it is not continued when it comes back.
    """

    def __init__(
        self, path: Path, shard: Shard | None = None, *, accept_reshard: bool = False, patience: float = PATIENCE
    ) -> None:
        # A link to the state leads to the same log and lock files.
        self.path = Path(os.path.realpath(path))
        self._database, self._wal, _ = map(str, _files(self.path))
        self.resets = 0
        self._shard = shard
        self._accept_reshard = accept_reshard
        self._db: sqlite3.Connection | None = None
        self._lock = StateLock(self.path)
        self._read_only = False
        self._opened = False
        self._current = True
        self._complete = True
        self._suspect = False
        self._seen = self._look()
        self._patience = patience
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._writing = False
        self._next: _Batch | None = None

    async def open(self, *, read_only: bool = False) -> None:
        self._writing, self._next, self._read_only = False, None, read_only
        await self._run(self._open)

    async def load(self, key: Key) -> Stored | None:
        return (await self.load_many([key])).get(key)

    async def load_many(self, keys: Sequence[Key]) -> Mapping[Key, Stored]:
        """All of them with one wait for the thread."""

        def load() -> dict[Key, Stored]:
            execute, query = self._connection.execute, f"SELECT payload FROM state {_WHERE}"
            rows = ((key, execute(query, _columns(key)).fetchone()) for key in keys)
            return {key: Stored(row[0], self._current) for key, row in rows if row}

        return await self._run(load)

    def ensure(self, key: Key) -> None:
        """It belongs to this process."""

    async def commit(self, key: Key, payload: bytes) -> None:
        await self._commit({key: payload})

    async def commit_many(self, payloads: Mapping[Key, bytes]) -> Mapping[Key, StateError]:
        try:
            await self._commit(payloads)
        except StateError as error:
            return dict.fromkeys(payloads, error)
        return {}

    async def _commit(self, payloads: Mapping[Key, bytes]) -> None:
        batch = self._next = self._next or _Batch()
        now = time.time()
        for key, payload in payloads.items():
            batch.rows[key] = (*_columns(key), payload, now)
        if not self._writing:
            self._write(batch)
        await self._outcome(batch.written)

    def _write(self, batch: _Batch) -> None:
        """Write `batch`, then write all commits that came during the write as one batch, so a slow disk costs one
        wait."""

        def write() -> None:
            with self._transaction() as db:
                # In place: to replace the row would write its index anew, and three times as many pages.
                db.executemany(
                    "INSERT INTO state VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET payload = excluded.payload, updated = excluded.updated",
                    batch.rows.values(),
                )

        def written(job: asyncio.Future[None]) -> None:
            self._writing = False
            if error := job.exception():
                batch.written.set_exception(error)
            else:
                batch.written.set_result(None)
            if self._next:
                self._write(self._next)

        # A loop in virtual time waits for what it runs in an executor, and only for that.
        asyncio.get_running_loop().run_in_executor(self._thread, write).add_done_callback(written)
        self._next, self._writing = None, True

    async def keys(self) -> dict[Key, float]:
        def keys() -> dict[Key, float]:
            rows = self._connection.execute("SELECT collector, bk_scope_type, bk_scope_id, updated FROM state")
            return {Key(name, Scope(cast(ScopeType, kind), id)): updated for name, kind, id, updated in rows}

        return await self._run(keys)

    async def forget(self, keys: Iterable[Key]) -> None:
        gone = [_columns(key) for key in keys]

        def forget() -> None:
            with self._transaction() as db:
                db.executemany(f"DELETE FROM state {_WHERE}", gone)

        await self._run(forget)

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        kept_keys = [*keep]

        def purge() -> int:
            kept = {_columns(key) for key in kept_keys}
            with self._transaction() as db:
                old = db.execute(
                    "SELECT collector, bk_scope_type, bk_scope_id FROM state WHERE updated < ?", (older_than,)
                )
                gone = [row for row in old.fetchall() if row not in kept]
                db.executemany(f"DELETE FROM state {_WHERE}", gone)
            return len(gone)

        return await self._run(purge)

    async def check(self) -> bool:
        def check() -> bool:
            self._ensure_unchanged()
            complete, self._complete = self._complete, True
            return complete

        return await self._run(check)

    async def size(self) -> int | None:
        def size() -> int:
            return sum(path.stat().st_size for path in _files(self.path) if path.exists())

        return await self._run(size)

    async def close(self) -> None:
        if self._next:
            await asyncio.wait([self._next.written])
        await self._run(self._close)
        self._thread.shutdown(wait=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")

    async def _run(self, work: Callable[[], T]) -> T:
        return await self._outcome(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def _outcome(self, future: asyncio.Future[T]) -> T:
        future.add_done_callback(_retrieve)
        begun = time.monotonic()
        try:
            while not (await asyncio.wait([future], timeout=min(1.0, self._patience)))[0]:
                # What is still written then is part of the same history: the next commit of the key comes after it.
                if time.monotonic() - begun >= self._patience:
                    raise StateError(f"state {self.path}: no answer within {self._patience:.3g} s; does the disk hang?")
            return future.result()
        except (sqlite3.Error, OSError) as error:
            hint = f"; {NO_LOCKS}" if getattr(error, "sqlite_errorname", "").startswith(_LOCK_ERRORS) else ""
            raise StateError(f"state {self.path}: {error}{hint}") from error
        except asyncio.CancelledError:
            # A commit that has begun is finished: cancelling a poll must not leave its outcome unknown.
            await asyncio.wait([future], timeout=self._patience)
            raise

    # What runs in the thread

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StateError(f"state {self.path} is not open")
        return self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._ensure_unchanged()
        try:
            with self._connection as db:
                yield db
        except sqlite3.DatabaseError as error:
            self._suspect = _is_damage(error)
            raise
        finally:
            self._seen = self._look()

    def _look(self) -> tuple[tuple[int, ...], ...]:
        return _version(self._database), _version(self._wal)

    def _open(self) -> None:
        try:
            if self._read_only:
                self._db = _connect(self.path, read_only=True)
                return
            self._lock.take()
            self._check_log()
            try:
                self._db = _connect(self.path)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorname", "") == "SQLITE_BUSY":
                    raise self._lock.busy() from None
                if not _is_damage(error):
                    raise
                self._begin_anew(str(error))
                self._db = _connect(self.path)
            self._take_shard(self._db)
            self._opened, self._seen = True, self._look()
        except BaseException:
            self._close()
            raise

    def _take_shard(self, db: sqlite3.Connection) -> None:
        """Make sure that the state is that of this shard. One that names no shard is that of the only one."""
        mine = self._shard
        if mine is None:
            return
        named = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'shard'").fetchone()
        written = Shard(*db.execute("SELECT ordinal, total FROM shard").fetchone()) if named else Shard()
        empty = not db.execute("SELECT 1 FROM state").fetchone()
        if written == mine:
            return
        if not empty and not self._accept_reshard:
            raise StateError(
                f"state {self.path} was written by {written}, this is {mine}: give the shard its own state, or take it"
                " over with state.accept_reshard: true; scopes that have moved are counted anew then"
            )
        with db:
            keys = db.execute("SELECT collector, bk_scope_type, bk_scope_id FROM state").fetchall()
            gone = [key for key in keys if not mine.owns(Scope(cast(ScopeType, key[1]), key[2]))]
            db.executemany(f"DELETE FROM state {_WHERE}", gone)
            self._write_shard(db)
        if not empty:
            log.get().warning(
                "state_resharded", state=str(self.path), before=str(written), now=str(mine), forgotten=len(gone)
            )

    def _write_shard(self, db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE IF EXISTS shard")
        if self._shard is not None and self._shard != Shard():
            db.execute("CREATE TABLE shard (ordinal INTEGER NOT NULL, total INTEGER NOT NULL)")
            db.execute("INSERT INTO shard VALUES (?, ?)", (self._shard.ordinal, self._shard.total))

    def _check_log(self) -> None:
        """Report commits that SQLite would ignore silently, before it reads the log."""
        database, wal, _ = _files(self.path)
        if not wal.exists() or not wal.stat().st_size:
            return
        if not database.stat().st_size:
            self._begin_anew("the file is gone, its log is left")
        elif ignored := ignored_commits(wal):
            copy = _aside(wal)
            shutil.copyfile(wal, copy)
            copy.chmod(0o600)
            self._current = False
            self._report(
                f"its log is damaged: {ignored} commits cannot be read",
                "older counts are continued, and shown when polls have caught up",
                copy.name,
            )

    def _begin_anew(self, damage: str) -> None:
        moved = self._move_aside()
        self._lock.take()
        self._report(damage, "new baseline: nothing of the past is counted", moved)

    def _ensure_unchanged(self) -> None:
        """Repair what others did to the files since the last write, before anything is written."""
        if self._db is None and self._opened:
            self._open()
            self._complete = False
        if self._db is None or self._read_only:
            raise StateError(f"state {self.path} is not open for writing")
        if self._look() == self._seen and not self._suspect:
            return
        if damage := self._damage():
            self._rebuild(damage)
        self._complete = self._suspect = False
        self._seen = self._look()

    def _damage(self) -> str:
        """What is wrong with the files, "" if nothing is."""
        database, wal, _ = _files(self.path)
        if not self._lock.holds_file():
            return "the file was replaced" if database.exists() else "the file was removed"
        if _version(wal)[:2] != self._seen[1][:2]:
            return "its log was removed or replaced"
        if ignored := ignored_commits(wal):
            return f"its log is damaged: {ignored} commits could not be read again"
        if self._lock.first_bytes(len(_MAGIC)) not in (_MAGIC, b""):
            return "the file was overwritten"  # SQLite does not look while its log has the page
        try:
            # A connection of its own: the other one still has good pages in its cache.
            with contextlib.closing(sqlite3.connect(self.path, timeout=5.0)) as db:
                _quick_check(db)
                if db.execute("PRAGMA user_version").fetchone() != (SCHEMA,):
                    return "its tables are gone"
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            return str(error)
        return ""

    def _rebuild(self, damage: str) -> None:
        """Put a new file in the place of what is there, with every row that can still be read."""
        new = self.path.with_name(f"{self.path.name}.new")
        _remove(new)
        try:
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            with contextlib.closing(_connect(new)) as db, db:
                self._write_shard(db)
                # A damaged table may give a row twice.
                insert = "INSERT OR IGNORE INTO state VALUES (?, ?, ?, ?, ?)"
                states = db.executemany(insert, self._readable()).rowcount
        except BaseException:
            _remove(new)
            raise
        self._lock.take()  # of the file that has replaced ours, if there is one
        moved = self._move_aside()
        os.replace(new, self.path)
        # SQLite sees that its own file has moved, and leaves the new one alone.
        self._connection.close()
        self._db = None
        self._lock.take()
        self._db = _connect(self.path)
        self._report(damage, "written again from memory", moved, states=states)

    def _readable(self) -> Iterator[Row]:
        with contextlib.suppress(sqlite3.DatabaseError):
            yield from self._connection.execute("SELECT * FROM state")

    def _move_aside(self) -> str:
        """Rename what there is of the files. Returns the new name of the first."""
        names = []
        for path in _files(self.path):
            with contextlib.suppress(FileNotFoundError):
                names.append(path.rename(_aside(path)).name)
        return names[0] if names else ""

    def _report(self, damage: str, consequence: str, moved_to: str, **more: object) -> None:
        self.resets += 1
        log.get().error(
            "state_damaged", state=str(self.path), message=damage, moved_to=moved_to, consequence=consequence, **more
        )

    def _close(self) -> None:
        try:
            if self._opened and self._db is not None:
                self._ensure_unchanged()
        finally:
            self._opened = False
            if self._db is not None:
                self._db.close()
                self._db = None
            self._lock.release()


class _Batch:
    """Rows that one transaction will write."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _retrieve(future: asyncio.Future[T]) -> None:
    """Retrieve the error of a future that nobody may await any more, so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()


def _columns(key: Key) -> tuple[str, str, str]:
    return key.collector, key.scope.bk_scope_type, key.scope.bk_scope_id


def _files(path: Path) -> list[Path]:
    """The database, its log and the index of the log."""
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]


def _remove(path: Path) -> None:
    for one in _files(path):
        one.unlink(missing_ok=True)


def _version(path: str | Path) -> tuple[int, ...]:
    """Which file it is, and which version of its content. Not its ctime: SQLite as root gives the log to its owner
    whenever it opens it, for a reader too."""
    try:
        found = os.stat(path)  # takes a third of the time of `Path.stat`
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _aside(path: Path) -> Path:
    """A name for a damaged file that does not exist yet."""
    name = f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (path.with_name(f"{name}.{number}" if number else name) for number in itertools.count())
    return next(one for one in names if not one.exists())


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database, whatever its version was, with its table."""
    target = f"file:{quote(str(path))}?mode={'ro' if read_only else 'rwc'}"
    db = sqlite3.connect(target, uri=True, check_same_thread=False, timeout=5.0)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise StateNewer(
                f"state {path} has schema {version}, this version knows {SCHEMA}: upgrade it, or name another state.url"
            )
        if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise StateError(f"state {path} is a database of something else")
        if read_only:
            return db
        if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StateError(f"state {path} cannot have a write-ahead log: {NO_LOCKS}")
        db.execute("PRAGMA synchronous = FULL")
        _quick_check(db)
        with db:
            db.execute("BEGIN")
            db.execute(
                "CREATE TABLE IF NOT EXISTS state (collector TEXT, bk_scope_type TEXT, bk_scope_id TEXT,"
                " payload BLOB NOT NULL, updated REAL NOT NULL,"
                " PRIMARY KEY (collector, bk_scope_type, bk_scope_id))"
            )
            db.execute(f"PRAGMA user_version = {SCHEMA}")
    except BaseException:
        db.close()
        raise
    return db


def _quick_check(db: sqlite3.Connection) -> None:
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # OperationalError: no access, no space, a newer SQLite's format. Never discard counts for it.
    return not isinstance(error, sqlite3.OperationalError)
