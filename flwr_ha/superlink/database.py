"""Open a SuperLink's database beside the SuperLink that uses it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

_BUSY_TIMEOUT_S = 5.0


@contextmanager
def opened(database: Path, begin: str, *, is_read_only: bool) -> Iterator[sqlite3.Connection]:
    """Yield a connection inside one transaction; commit it unless an error is raised."""
    uri = f"{database.absolute().as_uri()}?mode={'ro' if is_read_only else 'rw'}"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute(begin)
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
