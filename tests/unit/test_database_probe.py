"""What the reader of a database cannot read is damage too."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nodeagent.devices.database import Schema, open_database

SCHEMA = Schema(application_id=7, version=1, statements=("CREATE TABLE words (word TEXT NOT NULL) STRICT",))


def read(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT word FROM words")]


def test_a_flipped_bit_in_a_text(tmp_path: Path) -> None:
    path = tmp_path / "words.db"
    first = open_database(path, SCHEMA)
    first.connection.execute("INSERT INTO words VALUES ('penguin')")
    first.connection.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"penguin", b"peng\xf5in"))
    whole = open_database(path, SCHEMA)
    whole.connection.close()
    assert whole.aside is None, "SQLite itself sees nothing"
    found = open_database(path, SCHEMA, probe=read)
    assert found.aside is not None
    assert read(found.connection) == []
    found.connection.close()


def test_a_flipped_bit_in_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "words.db"
    open_database(path, SCHEMA).connection.close()
    path.write_bytes(path.read_bytes().replace(b"word TEXT", b"wor\xe4 TEXT"))
    found = open_database(path, SCHEMA)
    assert found.aside is not None
    found.connection.close()
