"""Open a SuperLink's database beside the SuperLink that uses it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

_BUSY_TIMEOUT_S = 5.0


def connect(database: Path, *, is_read_only: bool = True) -> sqlite3.Connection:
    """Return a connection that begins no transaction by itself; the caller closes it."""
    uri = f"{database.absolute().as_uri()}?mode={'ro' if is_read_only else 'rw'}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S)


def data_version(connection: sqlite3.Connection) -> int:
    """Return a number that is another one whenever another connection has written to the database."""
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


@contextmanager
def opened(database: Path, begin: str, *, is_read_only: bool) -> Iterator[sqlite3.Connection]:
    """Yield a connection inside one transaction; commit it unless an error is raised."""
    with closing(connect(database, is_read_only=is_read_only)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute(begin)
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
