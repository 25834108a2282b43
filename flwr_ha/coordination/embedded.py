"""The store for replicas that all run on one machine: a SQLite file and file locks, nothing to start.

It survives the death of every process and of the machine's power, not the loss of its disk. The
folder must be on a local file system.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from flwr_ha.coordination.protocol import Check, ConflictError, Create, Delete, Operation, Set, Versioned
from flwr_ha.coordination.sessions import SessionFile, is_alive, session_path
from flwr_ha.errors import CoordinationError

LOGGER = logging.getLogger(__name__)

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries"
    " (key TEXT PRIMARY KEY, parent TEXT NOT NULL, data BLOB NOT NULL, version INTEGER NOT NULL, session TEXT)"
    " WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS entries_by_parent ON entries (parent)",
    "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, boot TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS changes (serial INTEGER NOT NULL)",
    "INSERT INTO changes SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM changes)",
)
DATABASE = "coordinator.db"
POLL_S = 0.05
CALL_LIMIT = 1 / 3


def boot_id() -> str:
    """Return what names this start of the machine: times of ``time.monotonic()`` compare within it only."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class EmbeddedStore:
    """Implement `flwr_ha.coordination.protocol.Store` on a folder of this machine.

    A session lives while its process holds a lock on a file of its own, which the kernel frees at
    the moment of its death, and while the lease in that file has not run out, for the case that the
    process is frozen. A session ends in a transaction of whoever sees it dead, and a transaction
    of its own extends the lease before it ends. SQLite lets one transaction write at a time, and
    all processes of one start of the machine share ``CLOCK_MONOTONIC``: so whoever sees the session
    dead after a transaction sees the longer lease. Two thirds of the timeout are a safe lease,
    the last third is left for stopping.

    A process that is frozen just while it writes (a fraction of a millisecond for each transaction)
    holds up all others until it goes on or is killed: nobody leads then, and nothing is lost.

    Parameters
    ----------
    folder : Path
        The same for all replicas of the cluster; made where it is missing.
    session_timeout_s : float
        Seconds after which a frozen process loses its session.
    """

    def __init__(self, folder: Path, *, session_timeout_s: float) -> None:
        self._folder = folder
        self._session_timeout_s = session_timeout_s
        self._boot = boot_id()
        self._mutex = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._own: SessionFile | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._run_poller, name="embedded-coordinator", daemon=True)

    @property
    def session_timeout_s(self) -> float:
        """Seconds of silence after which the session ends."""
        return self._session_timeout_s

    @property
    def lease_s(self) -> float:
        """Two thirds of the session timeout, in seconds."""
        return self._session_timeout_s * 2 / 3

    def proven_until(self, started_s: float) -> float:
        """Return `started_s` and the lease: each transaction extends the session itself."""
        return started_s + self.lease_s

    def start(self, on_change: Callable[[], None], *, timeout_s: float) -> None:
        """Open the folder; see `Store.start`.

        Raises
        ------
        CoordinationError
            The folder cannot be used, or its database stayed locked for `timeout_s` seconds.
        """
        self._on_change = on_change
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self._folder / DATABASE, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )
            for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", *SCHEMA):
                self._database.execute(statement).close()
            self._database.execute(f"PRAGMA busy_timeout={int(self._session_timeout_s * CALL_LIMIT * 1000)}").close()
            with self._transaction():
                pass  # it begins the session
        except (sqlite3.Error, OSError, CoordinationError) as error:
            self.close()
            raise CoordinationError(f"the embedded coordinator in {self._folder} cannot be used: {error}") from error
        self._poller.start()

    def get(self, key: str) -> Versioned | None:
        """Return the newest value of `key`."""
        rows = self._select("SELECT data, version FROM entries WHERE key = ?", key)
        return Versioned(rows[0][0], rows[0][1]) if rows else None

    def children(self, key: str) -> tuple[str, ...]:
        """Return the names below `key`, sorted."""
        rows = self._select("SELECT key FROM entries WHERE parent = ? ORDER BY key", key)
        return tuple(row[0].rpartition("/")[2] for row in rows)

    def together(self) -> AbstractContextManager[None]:
        """Do nothing: each read is the newest."""
        return nullcontext()

    def transact(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or none."""
        with self._transaction() as database:
            for operation in operations:
                _apply(database, operation, self._session)
            database.execute("UPDATE changes SET serial = serial + 1")
        self._flush()

    def close(self) -> None:
        """End the session; may be called twice."""
        self._stop.set()
        if self._poller.is_alive():
            self._poller.join()
        if self._database is not None and self._own is not None:
            with suppress(CoordinationError), self._using() as database:
                database.execute("BEGIN IMMEDIATE")
                _drop_session(database, self._session)
                database.execute("COMMIT")
        with self._mutex:
            if self._own is not None:
                self._own.release()
            if self._database is not None:
                self._database.close()
            self._own = self._database = None

    @property
    def _session(self) -> str:
        return "" if self._own is None else self._own.session

    def _select(self, query: str, key: str) -> list[tuple[Any, ...]]:
        """Answer a read, after the entries of dead sessions are gone."""
        with self._using() as database:
            if not self._dead_sessions(database):
                return database.execute(query, (key,)).fetchall()
        with self._transaction() as database:
            return database.execute(query, (key,)).fetchall()

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """Lend the database to one thread at a time."""
        if not self._mutex.acquire(timeout=self._session_timeout_s * CALL_LIMIT):
            raise CoordinationError(f"the embedded coordinator in {self._folder} is busy")
        try:
            if self._database is None:
                raise CoordinationError(f"the embedded coordinator in {self._folder} is closed")
            yield self._database
        except (sqlite3.Error, OSError) as error:  # OSError: of the sessions' files
            raise CoordinationError(f"the embedded coordinator in {self._folder} did not answer: {error}") from error
        finally:
            self._mutex.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write under a live session: all of the body or none of it; the lease is extended either way."""
        with self._using() as database:
            try:
                database.execute("BEGIN IMMEDIATE")
                self._renew_session(database)
                database.execute("SAVEPOINT body")
                try:
                    yield database
                except ConflictError:
                    database.execute("ROLLBACK TO body")
                    database.execute("COMMIT")
                    raise
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    def _flush(self) -> None:
        """Wait until what was written is on the disk.

        SQLite would do it while it holds the lock for writing. Here nobody waits meanwhile; others
        may see what is not on the disk yet, but if power fails they are gone as well.
        """
        try:
            descriptor = os.open(self._folder / f"{DATABASE}-wal", os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CoordinationError(f"the embedded coordinator in {self._folder} cannot be written: {error}") from error

    def _renew_session(self, database: sqlite3.Connection) -> None:
        """Sweep the dead sessions, then extend our own, or begin a new one where it was among them."""
        for session in self._dead_sessions(database):
            _drop_session(database, session)
            session_path(self._folder, session).unlink(missing_ok=True)
        expires_s = time.monotonic() + self._session_timeout_s
        lost = self._own
        if lost is not None and self._is_known(database):
            lost.extend(expires_s)
            return
        self._own = SessionFile(self._folder, expires_s=expires_s)
        database.execute("INSERT INTO sessions VALUES (?, ?)", (self._session, self._boot))
        if lost is not None:
            database.execute("COMMIT")
            lost.release()
            raise CoordinationError(f"the session with the embedded coordinator in {self._folder} was lost")

    def _is_known(self, database: sqlite3.Connection) -> bool:
        """Return whether nobody has ended our session."""
        return database.execute("SELECT 1 FROM sessions WHERE id = ?", (self._session,)).fetchone() is not None

    def _dead_sessions(self, database: sqlite3.Connection) -> list[str]:
        """Return the sessions to be ended; our own is not among them, as we are alive."""
        now_s = time.monotonic()
        others = database.execute("SELECT id, boot FROM sessions WHERE id != ?", (self._session,)).fetchall()
        return [
            session
            for session, boot in others
            if boot != self._boot or not is_alive(self._folder, session, now_s=now_s)
        ]

    def _run_poller(self) -> None:
        """Extend the lease, and tell of changes."""
        seen = -1
        while not self._stop.wait(min(POLL_S, self._session_timeout_s / 10)):
            try:
                with self._using() as database:
                    is_lost = not self._is_known(database)
                    if self._own is not None and not is_lost:
                        self._own.extend(time.monotonic() + self._session_timeout_s)
                    dead = self._dead_sessions(database)
                    serial = database.execute("SELECT serial FROM changes").fetchone()[0]
                if dead or serial != seen:
                    seen = serial
                    self._on_change()
                if is_lost:
                    with self._transaction():
                        pass  # it begins a new session
            except CoordinationError as error:
                LOGGER.debug("%s", error)
                self._on_change()


def _apply(database: sqlite3.Connection, operation: Operation, session: str) -> None:
    key = operation.key
    if isinstance(operation, Create):
        parts = key.split("/")
        for count in range(1, len(parts)):
            parent = "/".join(parts[:count])
            row = (parent, parent.rpartition("/")[0], b"", None)
            database.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, 0, ?)", row)
        owner = session if operation.is_ephemeral else None
        entry = (key, key.rpartition("/")[0], operation.data, owner)
        if not database.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, 0, ?)", entry).rowcount:
            raise ConflictError(f"{key} exists")
        return
    found = database.execute("SELECT version FROM entries WHERE key = ?", (key,)).fetchone()
    if found is None or operation.version not in (None, found[0]):
        raise ConflictError(f"{key} is missing or changed")
    match operation:
        case Check():
            pass
        case Set(data=data):
            database.execute("UPDATE entries SET data = ?, version = version + 1 WHERE key = ?", (data, key))
        case Delete():
            if database.execute("SELECT 1 FROM entries WHERE parent = ?", (key,)).fetchone():
                raise ConflictError(f"{key} has children")
            database.execute("DELETE FROM entries WHERE key = ?", (key,))


def _drop_session(database: sqlite3.Connection, session: str) -> None:
    database.execute("DELETE FROM entries WHERE session = ?", (session,))
    database.execute("DELETE FROM sessions WHERE id = ?", (session,))
    database.execute("UPDATE changes SET serial = serial + 1")
