"""Build what ``GET /cluster`` answers: a pure function of what the coordinator holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr_ha.coordination.coordinator import View
from flwr_ha.model import Head, ReplicaState, Role, RunState, RunStatus
from flwr_ha.settings import Settings

CommitLogs = Mapping[str, Sequence[Head]]
FULL_RUNS = 50


def cluster_json(settings: Settings, view: View, logs: CommitLogs) -> dict[str, Any]:
    """Return the state of the cluster, the same on every replica.

    Parameters
    ----------
    settings : Settings
        Which replicas there should be.
    view : View
        What the coordinator holds.
    logs : mapping
        Newest commits of each run, oldest first.

    Returns
    -------
    dict
        The JSON object of the contract. The newest `FULL_RUNS` runs have the metrics of all these commits, older
        ones those of the last.
    """
    leader = view.leader.replica_id if view.leader is not None else None
    listed = statuses(view, leader)
    runs = {run_id: listed.get(run_id) or _unlisted(run_id, view, leader) for run_id in _run_ids(view, listed)}
    full = frozenset(list(runs)[-FULL_RUNS:])  # what is asked for each second must not grow with the past
    return {
        "cluster": settings.cluster,
        "term": view.term,
        "leader": leader,
        "paused": view.is_paused,
        "replicas": [_replica(replica.id, settings, view, leader) for replica in settings.replicas],
        "runs": [
            _run(status, view, logs.get(run_id, ())[0 if run_id in full else -1 :]) for run_id, status in runs.items()
        ],
    }


def _replica(replica_id: int, settings: Settings, view: View, leader: int | None) -> dict[str, Any]:
    own = settings.replica(replica_id)
    record = view.replicas.get(replica_id)
    return {
        "id": replica_id,
        "role": (Role.LEADER if replica_id == leader else Role.STANDBY).value,
        "state": ReplicaState.UNREACHABLE.value if record is None else record["state"],
        "address": str(own.address),
        "api": str(own.api),
        "lag_rounds": None if record is None else record["lag_rounds"],
    }


def running_replicas(view: View) -> frozenset[int]:
    """Return the ids of the replicas that lead or could: their record is there and says that they run."""
    is_up = ReplicaState.RUNNING.value
    return frozenset(replica_id for replica_id, record in view.replicas.items() if record["state"] == is_up)


def statuses(view: View, leader: int | None) -> dict[str, RunStatus]:
    """Return what the leader says of its runs; empty where nobody leads."""
    record = view.replicas.get(leader) if leader is not None else None
    entries = [RunStatus.from_json(entry) for entry in (record or {}).get("runs", ())]
    return {status.run_id: status for status in entries}


def _run_ids(view: View, listed: Mapping[str, RunStatus]) -> list[str]:
    """Return the runs, oldest first: the ones that the leader has dropped from its list, then that list.

    Flower's run ids are random; the leader lists its runs as they were submitted.
    """
    others = sorted((head.committed_at, run_id) for run_id, head in view.heads.items() if run_id not in listed)
    return [*(run_id for _, run_id in others), *listed]


def _run(status: RunStatus, view: View, commits: Sequence[Head]) -> dict[str, Any]:
    head = view.heads.get(status.run_id)
    return {
        "run_id": status.run_id,
        "app": status.app or (head.app if head else ""),
        "state": status.state.value,
        "reason": status.reason,
        "server_round": head.position.server_round if head else 0,
        "num_rounds": status.num_rounds or (head.num_rounds if head else 0),
        "nodes_online": status.nodes_online,
        "min_nodes": status.min_nodes,
        "checkpoint": None if head is None else _checkpoint(head, view),
        "metrics": {str(entry.position.server_round): dict(entry.metrics) for entry in commits},
    }


def _unlisted(run_id: str, view: View, leader: int | None) -> RunStatus:
    """Return what the commits say of a run: nobody leads, or the leader has dropped it from its list."""
    head, record = view.heads[run_id], view.replicas.get(leader) if leader is not None else None
    if head.position.server_round >= head.num_rounds > 0:
        state, reason = RunState.FINISHED, ""
    elif record is not None and record.get("knows_runs"):
        state, reason = RunState.STOPPED, "it ended before its last round, some time ago"
    else:
        state, reason = RunState.WAITING, "no leader"
    return RunStatus(run_id=run_id, app=head.app, state=state, reason=reason)


def _checkpoint(head: Head, view: View) -> dict[str, Any]:
    """Show the head with the copies that exist now: live replicas speak for themselves."""
    position = head.position
    copies = set(head.copies)
    for replica_id, record in view.replicas.items():
        if record.get("holds", {}).get(head.run_id) == position.digest:
            copies.add(replica_id)
        elif record.get("checked", {}).get(head.run_id) == position.digest:
            copies.discard(replica_id)
    return {
        "server_round": position.server_round,
        "term": position.term,
        "digest": position.digest,
        "model_digest": head.model_digest,
        "bytes": head.size_bytes,
        "copies": sorted(copies),
        "committed_at": head.committed_at,
    }
