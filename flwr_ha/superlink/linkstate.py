"""Carry Flower's control plane (nodes, runs, apps, unfinished work) from one SuperLink's database into another's.

The agent's side: plain sqlite3 beside the running SuperLink, no flwr import. Messages and objects are not carried:
a round in the making is done again by the next leader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from flwr_ha.errors import ConfigError
from flwr_ha.superlink import rows, schema
from flwr_ha.superlink.database import opened
from flwr_ha.superlink.tasks import add_log_lines, fail_task, requeue_task, stop_run
from flwr_ha.superlink.watch import RunRow, Summary, TaskState, Watch, signed, summary, unsigned

__all__ = [
    "ControlPlane",
    "RunRow",
    "Summary",
    "TaskState",
    "Watch",
    "check_flower",
    "export",
    "fail_task",
    "log_mark",
    "references",
    "requeue_task",
    "restore",
    "signed",
    "stop_run",
    "summary",
    "unsigned",
]

check_flower = schema.check_flower

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """Hold one consistent picture of a SuperLink's control plane.

    Attributes
    ----------
    snapshot : bytes
        Canonical JSON: equal control planes give equal bytes.
    blobs : tuple of str
        Digests (``sha256:…``) of the blobs that the snapshot refers to, sorted, each once.
    """

    snapshot: bytes
    blobs: tuple[str, ...]


def export(
    database: Path,
    put_blob: Callable[[bytes], str],
    *,
    logs_until: int = 0,
    known_fabs: MutableMapping[str, str] | None = None,
) -> ControlPlane:
    """Take a picture of the control plane in one read transaction.

    Parameters
    ----------
    database : Path
        Database file of a running SuperLink.
    put_blob : callable
        Stores bytes and returns their digest, ``sha256:…``.
    logs_until : int
        Log lines up to this row number are in the picture, see `log_mark`; 0 for none. Logs grow all the time, so
        the caller moves this mark at its own pace (a commit, half a minute) instead of every line being a change.
    known_fabs : mutable mapping, optional
        ``fab_hash`` to digest of the apps already put; filled here, so that an app is read and hashed once only.

    Returns
    -------
    ControlPlane
        The picture.

    Raises
    ------
    ConfigError
        The database has an unknown schema: install a known flwr.
    sqlite3.Error
        The database cannot be read: the SuperLink is not usable, start it again.

    Notes
    -----
    What changes all the time and means nothing to the next leader is left neutral: ``node.online_until``, the claim
    of an unfinished task, the traffic counters of a run that is not finished.
    """
    blobs: set[str] = set()

    def put(content: bytes) -> str:
        digest = put_blob(content)
        blobs.add(digest)
        return digest

    with opened(database, "BEGIN", is_read_only=True) as connection:
        revision, columns = schema.check_schema(connection)
        fabs = known_fabs if known_fabs is not None else {}
        unfinished = {row[0] for row in connection.execute("SELECT task_id FROM task WHERE finished_at IS NULL")}
        tables = {
            table: rows.encoded(rows.neutral(table, rows.read_rows(connection, table, fabs, put), unfinished), put)
            for table in schema.CONTROL_TABLES
        }
        logs = rows.log_chunks(connection, logs_until, put)
    blobs.update(row["content"]["blob"] for row in tables["fab"])
    value = {
        "format": _FORMAT,
        "schema": {"revision": revision, "columns": columns},
        "tables": tables,
        "logs": logs,
    }
    return ControlPlane(snapshot=rows.canonical(value), blobs=tuple(sorted(blobs)))


def restore(
    database: Path,
    snapshot: bytes,
    get_blob: Callable[[str], bytes],
    *,
    now_s: float,
    note: Callable[[str], str] | None = None,
) -> None:
    """Put a control plane into the database of a running SuperLink, replacing the one that is there.

    Unfinished tasks are pending afterwards, so that SuperExec starts them; nodes that were online count as online
    for a minute.

    Parameters
    ----------
    database : Path
        Database file of the SuperLink.
    snapshot : bytes
        What `export` returned.
    get_blob : callable
        Returns the verified bytes of a digest.
    now_s : float
        Wall-clock time, seconds since 1970: Flower compares ``online_until`` with its own wall clock.
    note : callable, optional
        Returns the line that the log of an unfinished run gets, by its run id: ``flwr log`` then tells of the takeover.

    Raises
    ------
    ConfigError
        The replicas run versions of Flower with different tables: install the same one everywhere.
    sqlite3.Error
        The database cannot be written: give the leadership up, nothing was changed.
    """
    value = json.loads(snapshot)
    # Blobs are fetched before the transaction: a slow peer must not block the SuperLink.
    tables = {table: [rows.decoded(row, get_blob) for row in value["tables"][table]] for table in schema.CONTROL_TABLES}
    lines = [line for chunk in value["logs"] for line in json.loads(get_blob(chunk["blob"]))]
    with opened(database, "BEGIN IMMEDIATE", is_read_only=False) as connection:
        revision, columns = schema.check_schema(connection)
        if value["format"] != _FORMAT or value["schema"]["columns"] != columns:
            raise ConfigError(
                f"the control plane was written by a replica with the database schema {value['schema']['revision']}, "
                f"this one has {revision}; install the same versions of flwr and flwr-ha on all replicas."
            )
        # One transaction: SuperExec sees the tasks together with their runs and apps, or nothing of it.
        connection.execute(f"DELETE FROM {schema.LOG_TABLE}")  # noqa: S608 - a constant
        for table in reversed(schema.CONTROL_TABLES):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - a constant
        for table, found in tables.items():
            rows.insert_rows(connection, table, [rows.revived(table, row, now_s) for row in found])
        connection.executemany(
            f"INSERT INTO {schema.LOG_TABLE} (rowid, timestamp, task_id, log) VALUES (?, ?, ?, ?)",  # noqa: S608
            lines,
        )
        if note is not None:
            started = _unfinished_serverapps(tables)
            add_log_lines(connection, [(task_id, note(unsigned(run_id))) for task_id, run_id in started], now_s=now_s)


def _unfinished_serverapps(tables: Mapping[str, list[rows.Row]]) -> list[tuple[int, int]]:
    unfinished = {task["task_id"] for task in tables["task"] if task["finished_at"] is None}
    found = [(run["primary_task_id"], run["run_id"]) for run in tables["run"]]
    return [(task_id, run_id) for task_id, run_id in found if task_id in unfinished]


def references(snapshot: bytes) -> tuple[str, ...]:
    """Return the digests of the blobs that a snapshot refers to, sorted, each once."""
    value = json.loads(snapshot)
    found = {chunk["blob"] for chunk in value["logs"]}
    for table in value["tables"].values():
        found.update(
            cell["blob"] for row in table for cell in row.values() if isinstance(cell, dict) and "blob" in cell
        )
    return tuple(sorted(found))


def log_mark(database: Path) -> int:
    """Return the number of the newest log line, counts from 1; 0 when there is none."""
    with opened(database, "BEGIN", is_read_only=True) as connection:
        row = connection.execute(f"SELECT MAX(rowid) FROM {schema.LOG_TABLE}").fetchone()  # noqa: S608
    return int(row[0] or 0)
