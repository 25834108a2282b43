"""Read, cheaply and again and again, what a SuperLink's nodes and runs do."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from flwr_ha.superlink.database import connect, data_version

_WRAP = 1 << 64
_SIGN = 1 << 63


def unsigned(number: int) -> str:
    """Return an id as Flower shows it: its database keeps unsigned 64-bit numbers as signed ones."""
    return str(number % _WRAP)


def signed(number: str) -> int:
    """Return an id as Flower's database keeps it."""
    value = int(number)
    return value - _WRAP if value >= _SIGN else value


class TaskState(StrEnum):
    """Say how far Flower is with a run's ServerApp."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_final(self) -> bool:
        """Whether Flower will not start the ServerApp again."""
        return self in (TaskState.FINISHED, TaskState.FAILED, TaskState.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """Describe a run as Flower's database has it.

    Attributes
    ----------
    run_id, task_id : str
        Flower's ids of the run and of its ServerApp's task, unsigned decimal.
    app : str
        ``publisher/name`` of the app.
    fab_hash : str
        SHA-256 of the app's bundle, 64 hexadecimal digits.
    state : TaskState
        How far its ServerApp is.
    details : str
        Flower's explanation of a failure; may be empty.
    submitted_at : str
        UTC time of the submission, ISO 8601.
    """

    run_id: str
    task_id: str
    app: str
    fab_hash: str
    state: TaskState
    details: str
    submitted_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Count the SuperNodes and list the runs.

    Attributes
    ----------
    nodes_online : int
        SuperNodes whose heartbeat is not overdue.
    nodes_total : int
        SuperNodes that are registered.
    runs : tuple of RunRow
        Oldest first.
    """

    nodes_online: int
    nodes_total: int
    runs: tuple[RunRow, ...]


class Watch:
    """Watch one SuperLink's database; costs a few microseconds while nobody writes to it.

    To be used by one thread, closed at the end, and made anew when the SuperLink is started anew.

    Parameters
    ----------
    database : Path
        Database file of a running SuperLink.
    """

    def __init__(self, database: Path) -> None:
        self._connection = connect(database)
        self._version = -1
        self._online_until: list[float] = []
        self._nodes_total = 0
        self._runs: tuple[RunRow, ...] = ()

    def __enter__(self) -> Self:
        """Return the watch."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the watch."""
        self.close()

    def version(self) -> int:
        """Return a number that is another one whenever somebody else has written to the database."""
        return data_version(self._connection)

    def summary(self) -> Summary:
        """Return the nodes and runs as they are now.

        Returns
        -------
        Summary
            Nodes and runs.

        Raises
        ------
        sqlite3.Error
            The database cannot be read: the SuperLink is not usable.
        """
        version = self.version()  # before the rows: what is written in between is read again next time
        if version != self._version:
            self._read()
            self._version = version
        # Flower notices late that a node is gone, so the deadline counts, not the status.
        online = len(self._online_until) - bisect_right(self._online_until, time.time())
        return Summary(nodes_online=online, nodes_total=self._nodes_total, runs=self._runs)

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _read(self) -> None:
        query = self._connection.execute
        nodes = query("SELECT status, online_until FROM node WHERE status <> 'unregistered'").fetchall()
        self._online_until = sorted(until for status, until in nodes if status == "online" and until is not None)
        self._nodes_total = len(nodes)
        rows = query(
            "SELECT run.run_id, task.task_id, run.fab_id, run.fab_hash, task.starting_at, task.running_at,"
            " task.finished_at, task.sub_status, task.details, task.pending_at"
            " FROM run JOIN task ON task.task_id = run.primary_task_id ORDER BY task.pending_at, run.run_id"
        )
        self._runs = tuple(
            RunRow(
                run_id=unsigned(run_id),
                task_id=unsigned(task_id),
                app=app or "",
                fab_hash=fab_hash or "",
                state=_state(starting_at, running_at, finished_at, sub_status),
                details=details,
                submitted_at=pending_at,
            )
            for (
                run_id,
                task_id,
                app,
                fab_hash,
                starting_at,
                running_at,
                finished_at,
                sub_status,
                details,
                pending_at,
            ) in rows
        )


def summary(database: Path) -> Summary:
    """Return the nodes and runs of a SuperLink once; `Watch` is cheaper for asking again."""
    with Watch(database) as watch:
        return watch.summary()


def _state(starting_at: str | None, running_at: str | None, finished_at: str | None, sub_status: str) -> TaskState:
    if finished_at is not None:
        return {"completed": TaskState.FINISHED, "stopped": TaskState.STOPPED}.get(sub_status, TaskState.FAILED)
    if running_at is not None:
        return TaskState.RUNNING
    return TaskState.PENDING if starting_at is None else TaskState.STARTING
