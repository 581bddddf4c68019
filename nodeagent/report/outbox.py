"""The outbox: reports that wait for the API server, on disk, so that neither its absence nor a restart loses them.

A report has a `key` (what happened to whom) and a body. The same key again within `SERIES_S` does not make a second
report but raises the `count` of the first, as Kubernetes does with Events: the sender creates it once and updates it
later. A row stays for `SERIES_S` after it was sent, for that. At most `MAX_ROWS` rows are kept; a new one pushes out
sent ones first, then the oldest waiting one, which is counted in `dropped_total{queue="outbox"}`.

SQLite in WAL mode with a thread of its own. Where the disk refuses (full, read-only, corrupt) the outbox goes on in
memory and `state.problem` says so.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from nodeagent.documents import OutboxState
from nodeagent.metrics import Metrics

log = logging.getLogger(__name__)

NAME = "outbox.db"
MAX_ROWS = 1000
MAX_BODY_BYTES = 8192
SERIES_S = 600.0
"""Kubernetes' own recorder ends a series after 6 minutes without a repetition (KEP-383) and groups within 10."""
MAX_POSTPONED_S = 3600.0
"""A report put off for longer was put off by a clock that has been set back since; it is due."""
VERSION = 1

_TABLE = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    body BLOB NOT NULL,
    first_s REAL NOT NULL,
    last_s REAL NOT NULL,
    count INTEGER NOT NULL,
    sent_count INTEGER NOT NULL DEFAULT 0,
    not_before_s REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS by_key ON reports (key, last_s);
"""
_COLUMNS = "id, key, body, first_s, last_s, count, sent_count"
T = TypeVar("T")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A report that waits: `count` times so far, of which the receiver knows `sent_count` (0: it knows nothing yet)."""

    id: int
    key: str
    body: bytes
    first_s: float
    last_s: float
    count: int
    sent_count: int


class Outbox:
    """`async with Outbox(path, metrics) as outbox`. Times are Unix seconds from `now`."""

    def __init__(
        self,
        path: Path,
        metrics: Metrics,
        *,
        max_rows: int = MAX_ROWS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._metrics = metrics
        self._max_rows = max_rows
        self._now = now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._db: sqlite3.Connection | None = None
        self._length = 0
        self._oldest_s = 0.0
        self._dropped = 0
        self._problem = ""

    async def __aenter__(self) -> Self:
        await self._on_thread(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._on_thread(self._close)
        finally:
            self._thread.shutdown()

    @property
    def state(self) -> OutboxState:
        """How it is now; needs no disk."""
        oldest = max(0.0, self._now() - self._oldest_s) if self._length else 0.0
        return OutboxState(length=self._length, oldest_s=oldest, dropped=self._dropped, problem=self._problem)

    async def put(self, key: str, body: bytes, at_s: float | None = None) -> None:
        """Keep a report. Raises ValueError when the body is over MAX_BODY_BYTES."""
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"a report of {len(body)} bytes is over {MAX_BODY_BYTES}")
        await self._on_thread(lambda: self._survive(lambda db: self._put(db, key, body, at_s or self._now())))

    async def due(self) -> Report | None:
        """The oldest report that has something to send now."""
        return await self._on_thread(lambda: self._survive(lambda db: self._due(db, self._now())))

    async def next_due_s(self) -> float | None:
        """When the next report may be sent, in Unix seconds; None when there is none."""

        def read(db: sqlite3.Connection) -> float | None:
            row = db.execute("SELECT min(not_before_s) FROM reports WHERE count > sent_count").fetchone()
            return None if row[0] is None else float(row[0])

        return await self._on_thread(lambda: self._survive(read))

    async def sent(self, report: Report, *, not_before_s: float) -> None:
        """The receiver knows `report.count`; a repetition is not sent before `not_before_s`."""
        await self._write(
            "UPDATE reports SET sent_count = ?, not_before_s = ? WHERE id = ?", report.count, not_before_s, report.id
        )

    async def forgotten(self, report: Report) -> None:
        """The receiver has lost what it was told; the report is to be created again."""
        await self._write("UPDATE reports SET sent_count = 0 WHERE id = ?", report.id)

    async def postpone(self, report: Report, not_before_s: float) -> None:
        """This one cannot be sent for now, others may."""
        await self._write("UPDATE reports SET not_before_s = ? WHERE id = ?", not_before_s, report.id)

    async def drop(self, report: Report) -> None:
        """This one can never be sent."""
        await self._write("DELETE FROM reports WHERE id = ?", report.id)

    # ---- on the thread

    async def _on_thread(self, call: Callable[[], T]) -> T:
        # Shielded: what has been handed over is done even when the one who waits for it is cancelled.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    async def _write(self, statement: str, *values: object) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute(statement, values)

        await self._on_thread(lambda: self._survive(write))

    def _open(self) -> None:
        try:
            self._db = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                self._to_memory(error)
                return
            # Not a database, or one of another make: reports are worth less than a daemon that starts.
            broken = self._path.with_suffix(".broken")
            log.error("%s is damaged (%s); it is kept as %s and a new one begins", self._path, error, broken.name)
            try:
                self._path.replace(broken)
                for beside in (
                    "-wal",
                    "-shm",
                ):  # they belong to the damaged file, and SQLite would read them into the new one
                    self._path.with_name(self._path.name + beside).unlink(missing_ok=True)
                self._db = self._connect()
            except (OSError, sqlite3.Error) as second:
                self._to_memory(second)
                return
        self._survive(self._count)

    def _connect(self) -> sqlite3.Connection:
        # A missing directory is an OperationalError of SQLite's.
        db = sqlite3.connect(self._path, isolation_level=None, timeout=2)
        try:
            self._path.chmod(0o600)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last reports, never the file
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"made by another version of the agent ({version})")
            db.executescript(_TABLE)
            db.execute(f"PRAGMA user_version={VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def _to_memory(self, error: Exception) -> None:
        """Go on without the disk; what lies there is read again at the next start."""
        self._problem = f"{self._path} cannot be used ({error}); reports that wait are lost when the daemon ends"
        log.error("outbox: %s", self._problem)
        if self._db is not None:
            self._db.close()
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.executescript(_TABLE)
        self._count(self._db)

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _survive(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """Run `call`; where the disk refuses, once more in memory."""
        assert self._db is not None, "the outbox is not open"
        try:
            result = call(self._db)
        except sqlite3.Error as error:
            if self._problem:
                raise
            self._to_memory(error)
            result = call(self._db)
        self._count(self._db)
        return result

    def _count(self, db: sqlite3.Connection) -> None:
        row = db.execute("SELECT count(*), min(first_s) FROM reports WHERE count > sent_count").fetchone()
        self._length, self._oldest_s = int(row[0]), float(row[1] or 0)

    def _put(self, db: sqlite3.Connection, key: str, body: bytes, at_s: float) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            found = db.execute(
                "SELECT id FROM reports WHERE key = ? AND last_s > ? ORDER BY id DESC LIMIT 1", (key, at_s - SERIES_S)
            ).fetchone()
            if found:
                db.execute(
                    "UPDATE reports SET count = count + 1, last_s = max(last_s, ?) WHERE id = ?", (at_s, found[0])
                )
            else:
                self._make_room(db, at_s)
                db.execute(
                    "INSERT INTO reports (key, body, first_s, last_s, count) VALUES (?, ?, ?, ?, 1)",
                    (key, body, at_s, at_s),
                )
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def _make_room(self, db: sqlite3.Connection, now_s: float) -> None:
        db.execute("DELETE FROM reports WHERE count <= sent_count AND last_s <= ?", (now_s - SERIES_S,))
        excess = db.execute("SELECT count(*) FROM reports").fetchone()[0] - self._max_rows + 1
        if excess <= 0:
            return
        excess -= db.execute(
            "DELETE FROM reports WHERE id IN (SELECT id FROM reports WHERE count <= sent_count ORDER BY last_s LIMIT ?)",
            (excess,),
        ).rowcount
        if excess > 0:
            db.execute("DELETE FROM reports WHERE id IN (SELECT id FROM reports ORDER BY id LIMIT ?)", (excess,))
            self._lost(excess)

    def _due(self, db: sqlite3.Connection, now_s: float) -> Report | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM reports WHERE count > sent_count"  # noqa: S608
            " AND (not_before_s <= ? OR not_before_s > ?) ORDER BY id LIMIT 1",
            (now_s, now_s + MAX_POSTPONED_S),
        ).fetchone()
        return None if row is None else msgspec.convert(dict(zip(_COLUMNS.split(", "), row, strict=True)), Report)

    def _lost(self, count: int) -> None:
        self._dropped += count
        self._metrics.dropped.labels("outbox").inc(count)
