"""What the leader knows of its runs right now: Flower's own state and the ServerApps' reports."""

from __future__ import annotations

import threading
from dataclasses import replace

from flwr_ha.model import RunState, RunStatus
from flwr_ha.superlink.watch import RunRow, Summary, TaskState

MAX_RUNS = 50


class RunBoard:
    """Merge the two sources; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[str, RunStatus] = {}
        self._summary: Summary | None = None

    def clear(self) -> None:
        """Forget all: another leadership begins."""
        with self._lock:
            self._reports.clear()
            self._summary = None

    def report(self, status: RunStatus) -> RunStatus | None:
        """Take what a ServerApp says of its run; return what it said before."""
        with self._lock:
            before = self._reports.get(status.run_id)
            self._reports[status.run_id] = status
        return before

    @property
    def is_complete(self) -> bool:
        """Whether Flower's database has been read: what is not listed has ended."""
        with self._lock:
            return self._summary is not None

    @property
    def nodes_online(self) -> int:
        """SuperNodes that are online, as last read."""
        with self._lock:
            return 0 if self._summary is None else self._summary.nodes_online

    def observe(self, summary: Summary) -> tuple[str, ...]:
        """Take what Flower's database says; return the runs that have ended since the last time."""
        with self._lock:
            before = {} if self._summary is None else {row.run_id: row.state for row in self._summary.runs}
            self._summary = summary
        return tuple(row.run_id for row in summary.runs if row.state.is_final and before.get(row.run_id) != row.state)

    def in_training(self) -> frozenset[str]:
        """Return the runs in the middle of a round."""
        busy = (RunState.TRAINING, RunState.EVALUATING)
        return frozenset(status.run_id for status in self.statuses() if status.state in busy)

    def statuses(self) -> tuple[RunStatus, ...]:
        """Return the status of each run, oldest first; of those that have ended the newest `MAX_RUNS`."""
        with self._lock:
            reports, summary = dict(self._reports), self._summary
        if summary is None:
            return tuple(reports.values())
        merged = [_merge(row, summary.nodes_online, reports.get(row.run_id)) for row in summary.runs]
        surplus = frozenset([status.run_id for status in merged if status.state.is_final][:-MAX_RUNS])
        return tuple(status for status in merged if status.run_id not in surplus)


def _merge(row: RunRow, nodes_online: int, report: RunStatus | None) -> RunStatus:
    base = report or RunStatus(run_id=row.run_id, app=row.app, state=RunState.WAITING)
    base = replace(base, app=row.app, nodes_online=nodes_online)
    if row.state.is_final:
        return replace(base, state=RunState(row.state.value), reason=row.details)
    if report is not None:
        return base
    if row.state is TaskState.RUNNING:  # a ServerApp without HighlyAvailable says nothing of its rounds
        return replace(base, state=RunState.TRAINING)
    return replace(base, reason="the ServerApp starts")
