"""Measure a replica at one moment, for its metrics."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from typing import Any

from flwr_ha.model import ReplicaState, RunState
from flwr_ha.replica.agent import Agent
from flwr_ha.replica.clusterview import cluster_json
from flwr_ha.replica.metrics import Gauges
from flwr_ha.replica.pulse import Pulse
from flwr_ha.replica.runs import RunBoard
from flwr_ha.settings import Settings


def measure(settings: Settings, agent: Agent, pulse: Pulse, board: RunBoard, *, is_ready: bool) -> Gauges:
    """Return what is true now; reads memory, and asks the file system how full it is.

    `is_ready` is what ``/readiness`` says: one answer for load balancers and for alerts.
    """
    sight = pulse.sight
    cluster = cluster_json(settings, sight.view, {})
    states = Counter(replica["state"] for replica in cluster["replicas"])
    runs = tuple(run for run in cluster["runs"] if not RunState(run["state"]).is_final)
    is_leader = agent.is_leader
    disk = shutil.disk_usage(settings.replica_dir(agent.settings.id))
    return Gauges(
        cluster=settings.cluster,
        is_leader=is_leader,
        has_leader=is_leader or cluster["leader"] is not None,
        is_paused=cluster["paused"],
        is_ready=is_ready,
        term=max(agent.state.term, sight.view.term),
        replicas={state.value: states[state.value] for state in ReplicaState},
        lease_age_s=time.monotonic() - pulse.renewed_s if is_leader else None,
        coordinator_age_s=min(time.monotonic() - sight.read_s, time.monotonic()),
        lag_rounds=agent.tools.holdings.lag_rounds,
        copies_missing=_copies_missing(settings, runs) if is_leader else None,
        nodes_online=board.nodes_online if is_leader else None,
        runs=runs if is_leader else (),
        disk_free_bytes=disk.free,
        disk_bytes=disk.total,
    )


def _copies_missing(settings: Settings, runs: tuple[dict[str, Any], ...]) -> int:
    """Count over the unfinished runs; an object store keeps its own copies."""
    if settings.storage != "replicas":
        return 0
    checkpoints = [run["checkpoint"] for run in runs if run["checkpoint"] is not None]
    return sum(len(settings.replicas) - len(checkpoint["copies"]) for checkpoint in checkpoints)
