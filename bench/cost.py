"""What high availability costs where nothing fails: the steps of a round that Flower does not have."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.result import Figure, Scale
from bench.rounds import train
from flwr_ha.local.cluster import LocalCluster, Plan

# In the order in which a round comes to them; the copies and the transaction are measured by the replica.
STEPS = {
    "undo": "strategy's state copied, to undo an attempt",
    "check": "replies checked",
    "hash": "replies hashed and sorted",
    "note": "status and events shown",
    "capture": "strategy's state and history packed",
    "save": "checkpoint hashed and on the leader's disk",
    "copy": "copies on a majority",
    "transaction": "transaction in ZooKeeper",
    "rest": "asking the replica, and its answer",
}


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Train with the clock on each step; medians over rounds, the first one left out."""
    nodes, rounds = 5, scale.pick(3, 5)
    with LocalCluster(folder, Plan(supernodes=nodes, session_timeout_s=4.0)) as cluster:
        cluster.start()
        notes = folder / "notes"
        seconds = train(cluster, notes, rounds, nodes, is_timed=True)
        lines = notes.with_suffix(".costs").read_text(encoding="utf-8").splitlines()  # of rounds that are committed
        commits = {event["server_round"]: event for event in _commits(cluster)}
    costs = [_cost(json.loads(line), commits) for line in lines][1:]
    medians = {step: statistics.median(cost[step] for cost in costs) for step in STEPS}
    total_s, round_s = sum(medians.values()), statistics.median(seconds)
    figures = [Figure(name=f"cost of a round, 4.8 MB: {STEPS[step]}", value=medians[step], unit="s") for step in STEPS]
    total = Figure(
        name="cost of a round, 4.8 MB: all", value=total_s, unit="s", against=round_s, ratio=total_s / round_s
    )
    return [*figures, total]


def _commits(cluster: LocalCluster) -> list[dict[str, Any]]:
    events = cluster.get("/events?after=0", replica_id=cluster.wait_leader(timeout_s=60.0))
    return [event for event in events if event["kind"] == "commit"]


def _cost(noted: dict[str, Any], commits: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each step of a round: what the ServerApp noted, and what the replica did of its call."""
    commit = commits[noted.pop("server_round")]
    copy_s, all_s = commit["copy_seconds"], commit["seconds"]
    call_s = noted.pop("commit") - noted["save"]
    return {
        **dict.fromkeys(STEPS, 0.0),
        **noted,
        "copy": copy_s,
        "transaction": all_s - copy_s,
        "rest": max(call_s - all_s, 0.0),
    }
