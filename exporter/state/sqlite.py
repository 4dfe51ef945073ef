"""The state in one SQLite file (WAL), written by one thread, locked against a second process.

`synchronous=FULL`: a commit that has returned survives a power cut too, so a counter that was seen on /metrics can
never come back smaller, which Prometheus would take for a restart and count a second time.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from exporter import log
from exporter.errors import StateError, StateLocked, StateNewer
from exporter.model import Key

SCHEMA = 1

T = TypeVar("T")


class SQLiteStore:
    """See `Store`. A damaged file is moved aside (`FILE.corrupt-TIME`) and an empty one takes its place; `resets`
    tells."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resets = 0
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._writing = False
        self._next: _Batch | None = None

    async def open(self) -> None:
        self._writing, self._next = False, None
        await self._run(self._open)

    async def load(self, key: Key) -> bytes | None:
        def load() -> bytes | None:
            row = self._connection.execute(
                "SELECT payload FROM state WHERE collector = ? AND bk_scope_type = ? AND bk_scope_id = ?", _columns(key)
            ).fetchone()
            return row[0] if row else None

        return await self._run(load)

    async def commit(self, key: Key, payload: bytes) -> None:
        batch = self._next = self._next or _Batch()
        batch.rows.append((*_columns(key), payload, time.time()))
        if not self._writing:
            self._write(batch)
        await self._outcome(batch.written)

    def _write(self, batch: _Batch) -> None:
        """Write `batch`, then what has gathered meanwhile: all pollers that wait for a slow disk wait for it once."""

        def write() -> None:
            with self._connection as db:
                # In place: to replace the row would write its index anew, and three times as many pages.
                db.executemany(
                    "INSERT INTO state VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET payload = excluded.payload, updated = excluded.updated",
                    batch.rows,
                )

        def written(job: asyncio.Future[None]) -> None:
            self._writing = False
            if error := job.exception():
                batch.written.set_exception(error)
            else:
                batch.written.set_result(None)
            if self._next:
                self._write(self._next)

        asyncio.get_running_loop().run_in_executor(self._thread, write).add_done_callback(written)
        self._next, self._writing = None, True

    async def purge(self, keep: Iterable[Key], older_than: float) -> int:
        kept = {_columns(key) for key in keep}

        def purge() -> int:
            with self._connection as db:
                old = db.execute(
                    "SELECT collector, bk_scope_type, bk_scope_id FROM state WHERE updated < ?", (older_than,)
                )
                gone = [row for row in old.fetchall() if row not in kept]
                db.executemany("DELETE FROM state WHERE collector = ? AND bk_scope_type = ? AND bk_scope_id = ?", gone)
            return len(gone)

        return await self._run(purge)

    async def size(self) -> int | None:
        def size() -> int:
            return sum(path.stat().st_size for path in self._files() if path.exists())

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
        try:
            # A commit that has begun is finished: cancelling a poll must not leave its outcome unknown.
            return await asyncio.shield(future)
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"state {self.path}: {error}") from error
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StateError(f"state {self.path} is not open")
        return self._db

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def _open(self) -> None:
        self._take_lock()
        try:
            try:
                self._db = self._connect()
            except sqlite3.DatabaseError as error:
                # OperationalError: no access, no space, a newer SQLite's format. That is not damage; never discard
                # counts for it.
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._move_aside(error)
                self._db = self._connect()
        except BaseException:
            self._close()
            raise

    def _take_lock(self) -> None:
        # flock goes with the process, also on kill -9; the file stays and names the holder.
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise StateLocked(f"state {self.path} is held by another process (pid {holder})") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, check_same_thread=False, timeout=5.0)
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA:
                raise StateNewer(
                    f"state {self.path} has schema {version}, this version knows {SCHEMA}: upgrade it,"
                    " or name another state.url"
                )
            if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise StateError(f"state {self.path} is a database of something else")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
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

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for path in self._files():
            if path.exists():
                path.rename(path.with_name(f"{path.name}.corrupt-{stamp}"))
        self.resets += 1
        log.get().error(
            "state_damaged",
            state=str(self.path),
            message=str(error),
            moved_to=f"{self.path.name}.corrupt-{stamp}",
            consequence="new baseline: nothing of the past is counted",
        )

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Batch:
    """Rows that one transaction will write."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, bytes, float]] = []
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _columns(key: Key) -> tuple[str, str, str]:
    return key.collector, key.scope.bk_scope_type, key.scope.bk_scope_id
