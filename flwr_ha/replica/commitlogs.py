"""The newest commits of each run, in memory: what a heartbeat adds to them does not grow with the past."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from flwr_ha.coordination.reader import ClusterReader
from flwr_ha.model import Head

KEPT = 1000
"""Commits of each run that are held, the newest."""
READ_AT_ONCE = 100
Log = tuple[Head, ...]


class CommitLogs:
    """Follow the commit logs of all runs; safe from any thread.

    What is new at a heartbeat is read at once. After the start of a replica that may be thousands of
    rounds: they are read by `read_rest`, in a thread of its own, so that no lease and no election waits.

    Parameters
    ----------
    reader : ClusterReader
        What the coordinator holds; its errors pass through.
    """

    def __init__(self, reader: ClusterReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._logs: Mapping[str, Log] = {}  # replaced as a whole
        self._unread: dict[str, Head] = {}

    def follow(self, heads: Mapping[str, Head]) -> Mapping[str, Log]:
        """Return the newest commits of each run, oldest first; of a run that is still to be read only the head.

        Parameters
        ----------
        heads : mapping of str to Head
            Newest commit of each run.
        """
        with self._lock:
            logs: dict[str, Log] = {}
            unread: dict[str, Head] = {}
            budget = READ_AT_ONCE
            for run_id, head in heads.items():
                known = self._logs.get(run_id)
                if run_id in self._unread or (missing := _missing_rounds(known, head)) > budget:
                    logs[run_id], unread[run_id] = _log_end(head), head
                elif known is not None and _ends_with(known, head):
                    logs[run_id] = known
                else:
                    budget -= missing
                    logs[run_id] = self.newest(head, KEPT)
            self._logs, self._unread = logs, unread
        return logs

    def read_rest(self) -> bool:
        """Read the log of one run that `follow` has left, the newest first; return whether there was one."""
        with self._lock:
            head = max(self._unread.values(), key=lambda head: head.committed_at, default=None)
        if head is None:
            return False
        log = self.newest(head, KEPT)
        with self._lock:
            if self._unread.pop(head.run_id, None) is not None:
                self._logs = {**self._logs, head.run_id: log}  # `follow` adds what came meanwhile
        return True

    def is_read(self, run_id: str) -> bool:
        """Whether the newest `KEPT` commits of the run are here."""
        return run_id in self._logs and run_id not in self._unread

    def newest(self, head: Head, count: int) -> Log:
        """Return the `count` newest commits of a run up to `head`, oldest first; what is not here is read."""
        last = head.position.server_round
        known = {entry.position.server_round: entry for entry in self._logs.get(head.run_id, ())}
        if known.get(last, head) != head:  # the coordinator has lost its data, and the run begins anew
            known = {}
        if last > 0:
            known[last] = head  # the log's last entry is the head itself
        rounds = range(max(last - count + 1, 1), last + 1)
        missing = [server_round for server_round in rounds if server_round not in known]
        if missing:
            known.update(self._reader.committed_rounds(head.run_id, missing))
        return tuple(known[server_round] for server_round in rounds if server_round in known)


def _log_end(head: Head) -> Log:
    """Return the end of a log: round 0, the initial model, has no entry."""
    return (head,) if head.position.server_round > 0 else ()


def _ends_with(log: Log, head: Head) -> bool:
    return [entry.position for entry in log[-1:]] == [entry.position for entry in _log_end(head)]


def _missing_rounds(known: Log | None, head: Head) -> int:
    """Return how many commits up to `head` would have to be read."""
    last = head.position.server_round
    first = max(last - KEPT + 1, 1)
    if known and first <= known[-1].position.server_round <= last:
        first = known[-1].position.server_round + 1
    return max(last - first, 0)
