"""Opening the state database: durable, and never a reason not to start.

SQLite in WAL mode survives `kill -9` at any point by itself. What it cannot survive is a file that something else damaged;
such a file is moved aside, kept for an investigation, and a fresh one takes its place. A file written by a newer version of
the agent is left alone: an older one must not guess what is in it.

Blocking; call it in the thread that will own the connection.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.host import sync_directory

log = logging.getLogger(__name__)

BUSY_S = 1.0
"""How long a statement waits for another process, say a person with the sqlite3 shell."""
KEPT_ASIDE = 5
"""Damaged files that are kept; the oldest goes first."""
DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
PARTS = ("", "-wal", "-shm")
"""A database is three files as long as it is open, or after its process was killed."""


class Schema(msgspec.Struct, frozen=True):
    """`application_id` and `version` go into the file's header (PRAGMA application_id, user_version)."""

    application_id: int
    version: int
    statements: tuple[str, ...]
    upgrades: dict[int, tuple[str, ...]] = {}
    """What makes a file of this version one of the next; every earlier version has its line."""


class Opened(msgspec.Struct, frozen=True):
    connection: sqlite3.Connection
    aside: Path | None
    """Where a damaged predecessor is now."""


class _Damaged(Exception):
    """The file is there but is not a database of ours that can be read."""


def open_database(
    path: Path,
    schema: Schema,
    *,
    synchronous: str = "FULL",
    probe: Callable[[sqlite3.Connection], object] = lambda _: None,
) -> Opened:
    """Open or create the database at `path`; raises AgentError(STATE_INVALID) when it is newer than this version or when
    the disk refuses.

    `probe` reads what the caller will read: a flipped bit in a text leaves the file whole for SQLite and is found only then.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                return Opened(_open(path, schema, synchronous, probe), None)
            except _Damaged as damage:
                aside = _move_aside(path)
                log.error("%s is damaged (%s); it is kept as %s and a fresh one is made", path, str(damage), aside)
        _create(path, schema)
        return Opened(_open(path, schema, synchronous, probe), aside)
    except (OSError, sqlite3.Error, _Damaged) as error:
        raise unusable(path, error) from error


def unusable(path: Path, error: Exception) -> AgentError:
    """The disk or SQLite refused; what a person can do is look at the disk."""
    return AgentError(
        Reason.STATE_INVALID,
        f"the state database {path} cannot be used: {error}",
        hint="is there space on the disk of state_dir, and may root write to it?",
    )


def _open(
    path: Path, schema: Schema, synchronous: str, probe: Callable[[sqlite3.Connection], object]
) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise _Damaged(
            "it is empty"
        )  # ours are complete before they get their name; SQLite would call this a new database
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=32)
    try:
        _check(connection, path, schema)
        probe(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
    except BaseException as error:
        connection.close()
        if _is_damage(error):
            raise _Damaged(" ".join(str(error).split())) from None
        raise
    return connection


def _is_damage(error: BaseException) -> bool:
    """SQLite says so, or a text is none: Python's module finds that by itself, with an error that has no code of SQLite."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return isinstance(error, sqlite3.OperationalError) if code is None else code & 0xFF in DAMAGE
    return isinstance(error, UnicodeDecodeError)


def _check(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != schema.application_id:
        raise _Damaged("it is not a database of nodeagent")
    if version > schema.version:
        raise AgentError(
            Reason.STATE_INVALID,
            f"the state database {path} has format {version}, this version of nodeagent knows {schema.version}",
            hint=f"run the newer version, or move {path} away to start without its leases",
        )
    # quick_check does not compare indexes with their tables: a file that lacks its last byte passes it and fails when it is read.
    found = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
    if found != ["ok"]:
        raise _Damaged(" ".join(str(found[0]).split()))
    if version < schema.version:
        _upgrade(connection, version, schema)
    tables = sorted(row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"))
    if tables != sorted(schema.statements):
        raise _Damaged("its tables are not those of its format")


def _upgrade(connection: sqlite3.Connection, version: int, schema: Schema) -> None:
    """All steps or none: a crash in between leaves the file as it was."""
    connection.execute("BEGIN IMMEDIATE")
    for step in range(version, schema.version):
        if step not in schema.upgrades:
            connection.execute("ROLLBACK")
            raise _Damaged(f"its format {version} is none that was ever written")
        for statement in schema.upgrades[step]:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {schema.version}")
    connection.execute("COMMIT")
    log.info("the state database has format %d now, from %d", schema.version, version)


def _create(path: Path, schema: Schema) -> None:
    """A complete, synced database appears under its name or nothing does."""
    unfinished = path.with_name(f".{path.name}.new")
    for part in PARTS:
        Path(f"{unfinished}{part}").unlink(missing_ok=True)
        Path(f"{path}{part}").unlink(missing_ok=True)  # a log without its database would be replayed into the new one
    connection = sqlite3.connect(unfinished, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id = {schema.application_id}")
        connection.execute(f"PRAGMA user_version = {schema.version}")
        for statement in schema.statements:
            connection.execute(statement)
        connection.execute("COMMIT")
    finally:
        connection.close()
    unfinished.chmod(0o600)
    unfinished.replace(path)
    sync_directory(path.parent)


def _move_aside(path: Path) -> Path:
    """`state.db` becomes `state.db.damaged-<UTC time>`, its log beside it."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    for part in PARTS:
        source = Path(f"{path}{part}")
        if source.exists():
            source.replace(f"{aside}{part}")
    kept = [p for p in path.parent.glob(f"{path.name}.damaged-*") if not p.name.endswith(PARTS[1:])]
    for old in sorted(kept, key=lambda p: (p.stat().st_mtime, p.name))[:-KEPT_ASIDE]:
        for part in PARTS:
            Path(f"{old}{part}").unlink(missing_ok=True)
    return aside
