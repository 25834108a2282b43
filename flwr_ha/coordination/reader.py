"""Reading what the cluster agreed on."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from flwr_ha.coordination.protocol import Store
from flwr_ha.coordination.values import (
    CONTROL,
    HISTORY,
    LEADER,
    PAUSED,
    REPLICAS,
    RUNS,
    SWITCHOVER,
    TERM,
    LeaderRecord,
    Record,
    Switchover,
    View,
    head_key,
    load,
    replica_key,
    round_key,
    rounds_key,
)
from flwr_ha.model import ControlHead, Head, LeadershipChange


class ClusterReader:
    """Read the facts of one cluster; safe from any thread.

    Every method raises `CoordinationError` when the store does not answer: try again later.

    Parameters
    ----------
    store : Store
        A started store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache_lock = threading.Lock()
        self._history_cache: dict[str, LeadershipChange] = {}
        self._last_heads: dict[str, Head] = {}  # of runs that have all their rounds: replaced as a whole

    def view(self) -> View:
        """Return all that a replica decides on."""
        with self._store.together():
            leader = self.leader()  # before the term, so that the term is never older than the leader's
            term = self._store.get(TERM)
            return View(
                term=0 if term is None else int(term.data),
                leader=leader,
                replicas=self.replicas(),
                heads=self.heads(),
                control=self.control_head(),
                is_paused=self._store.get(PAUSED) is not None,
                switchover=self.switchover(),
            )

    def leader(self) -> LeaderRecord | None:
        """Return who leads, None where nobody does."""
        found = self._store.get(LEADER)
        return None if found is None else LeaderRecord.from_json(load(found.data))

    def replicas(self) -> dict[int, Record]:
        """Return what the running replicas published, by id."""
        records: dict[int, Record] = {}
        for replica_id in sorted(map(int, self._store.children(REPLICAS))):
            found = self._store.get(replica_key(replica_id))
            if found is not None:
                records[replica_id] = load(found.data)
        return records

    def head(self, run_id: str) -> Head | None:
        """Return the newest commit of the run, None before its first."""
        found = self._store.get(head_key(run_id))
        return None if found is None else Head.from_json(load(found.data))

    def heads(self) -> dict[str, Head]:
        """Return the newest commit of each run, by run id; the last one of a run is read once.

        A replica asks for it at every heartbeat: what it costs must not grow with the runs of the past.
        """
        run_ids = self._store.children(RUNS)
        heads = {run_id: self._last_heads.get(run_id) or self.head(run_id) for run_id in run_ids}
        found = {run_id: head for run_id, head in heads.items() if head is not None}
        self._last_heads = {run_id: h for run_id, h in found.items() if h.position.server_round >= h.num_rounds}
        return found

    def commit_log(self, run_id: str) -> tuple[Head, ...]:
        """Return the commits of the run, one per round from 1 on: a request for each."""
        rounds = self.committed_rounds(run_id, map(int, self._store.children(rounds_key(run_id))))
        return tuple(rounds.values())

    def committed_rounds(self, run_id: str, server_rounds: Iterable[int]) -> dict[int, Head]:
        """Return the commits of these rounds, without those that are not committed; round 0 has no entry."""
        entries = {}
        with self._store.together():  # it may be thousands
            for server_round in server_rounds:
                found = self._store.get(round_key(run_id, server_round))
                if found is not None:
                    entries[server_round] = Head.from_json(load(found.data))
        return entries

    def committed_round(self, run_id: str, server_round: int) -> Head | None:
        """Return the commit of one round, None where it is not committed."""
        return self.committed_rounds(run_id, (server_round,)).get(server_round)

    def control_head(self) -> ControlHead | None:
        """Return the committed snapshot of the control plane, None before the first."""
        found = self._store.get(CONTROL)
        return None if found is None else ControlHead.from_json(load(found.data))

    def switchover(self) -> Switchover | None:
        """Return the request to hand over, None where there is none."""
        found = self._store.get(SWITCHOVER)
        return None if found is None else Switchover.from_json(load(found.data))

    def history(self) -> tuple[LeadershipChange, ...]:
        """Return the leadership changes, newest last."""
        changes: list[LeadershipChange] = []
        for name in self._store.children(HISTORY):
            with self._cache_lock:
                change = self._history_cache.get(name)
            found = self._store.get(f"{HISTORY}/{name}") if change is None else None
            if found is not None:
                change = LeadershipChange.from_json(load(found.data))
                with self._cache_lock:
                    self._history_cache[name] = change
            if change is not None:
                changes.append(change)
        return tuple(changes)
