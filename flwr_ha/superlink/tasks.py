"""Start the ServerApp of a run again, or end the run, and say so in its log."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from flwr_ha.superlink import rows, schema
from flwr_ha.superlink.database import opened
from flwr_ha.superlink.watch import signed


def add_log_lines(connection: sqlite3.Connection, lines: Iterable[tuple[int, str]], *, now_s: float) -> None:
    """Append lines to the logs of tasks, where ``flwr log`` finds them.

    Parameters
    ----------
    connection : sqlite3.Connection
        Inside a transaction.
    lines : iterable of tuple
        Task id, as the database keeps it, and the text.
    now_s : float
        Wall-clock time, seconds since 1970.
    """
    connection.executemany(
        f"INSERT INTO {schema.LOG_TABLE} (timestamp, task_id, log) VALUES (?, ?, ?)",  # noqa: S608 - a constant
        [(now_s, task_id, f"INFO :      {text}\n") for task_id, text in lines],
    )


def requeue_task(database: Path, task_id: str, *, note: str = "") -> bool:
    """Set an unfinished task back to pending, so that SuperExec starts its ServerApp again under the same run id.

    Parameters
    ----------
    database : Path
        Database file of the running SuperLink.
    task_id : str
        Flower's task id, unsigned decimal.
    note : str
        Line for the log of the run.

    Returns
    -------
    bool
        False when the task is unknown or finished: there is nothing to start again.
    """
    changes = ", ".join(f"{column} = NULL" for column in rows.PENDING)
    with opened(database, "BEGIN IMMEDIATE", is_read_only=False) as connection:
        cursor = connection.execute(
            f"UPDATE task SET {changes} WHERE task_id = ? AND finished_at IS NULL",  # noqa: S608 - constants
            (signed(task_id),),
        )
        is_requeued = cursor.rowcount == 1
        if is_requeued and note:
            add_log_lines(connection, [(signed(task_id), note)], now_s=time.time())
    return is_requeued


def fail_task(database: Path, task_id: str, *, reason: str) -> bool:
    """End a run as failed, as Flower does when a ServerApp reports an exception.

    Parameters
    ----------
    database : Path
        Database file of the running SuperLink.
    task_id : str
        Flower's id of the ServerApp's task, unsigned decimal.
    reason : str
        Shown by ``flwr ls`` and in the log of the run.

    Returns
    -------
    bool
        False when the task is unknown or finished: nothing was changed.
    """
    with opened(database, "BEGIN IMMEDIATE", is_read_only=False) as connection:
        is_failed = _finish(connection, "failed", reason, "task_id = ?", signed(task_id)) == 1
        if is_failed:
            add_log_lines(connection, [(signed(task_id), reason)], now_s=time.time())
            rest = "run_id = (SELECT run_id FROM task WHERE task_id = ?)"  # what else it had to do, as Flower does it
            _finish(connection, "failed", "Task failed because the run finished", rest, signed(task_id))
    return is_failed


WITHDRAWN = "its submission could not be made safe on a majority of replicas: submit it again"


def stop_run(database: Path, run_id: str, *, reason: str) -> bool:
    """End a run as stopped, as ``flwr stop`` does.

    Parameters
    ----------
    database : Path
        Database file of the running SuperLink.
    run_id : str
        Flower's run id, unsigned decimal.
    reason : str
        Shown by ``flwr ls``.

    Returns
    -------
    bool
        False when the run is unknown or finished: nothing was changed.
    """
    with opened(database, "BEGIN IMMEDIATE", is_read_only=False) as connection:
        return _finish(connection, "stopped", reason, "run_id = ?", signed(run_id)) > 0


def _finish(connection: sqlite3.Connection, sub_status: str, details: str, which: str, value: int) -> int:
    """Return how many unfinished tasks were finished."""
    finished_at = str(datetime.now(UTC))  # the text that Flower's own column type writes
    cursor = connection.execute(
        "UPDATE task SET finished_at = ?, sub_status = ?, details = ?, token = NULL, active_until = NULL"  # noqa: S608
        f" WHERE finished_at IS NULL AND {which}",
        (finished_at, sub_status, details, value),
    )
    return cursor.rowcount
