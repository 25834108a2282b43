"""Gather what a cluster leaves behind, for the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr_ha.errors import HaError
from flwr_ha.model import Head
from flwr_ha.storage.checkpoint import load
from tests.chaos.evidence import Cluster, Evidence, NodeKill, events_of, reader, trainings_in
from tests.chaos.faults import store_of


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun:
    """Say what a run must come to.

    Attributes
    ----------
    run_id : str
        Flower's run id.
    expected : callable
        Returns the digest of its model after so many rounds.
    min_nodes : int
        Threshold of the run; 0 where no real client trains.
    """

    run_id: str
    expected: Callable[[int], str]
    min_nodes: int = 0


def gather(cluster: Cluster, runs: Sequence[JudgedRun], *, calls: Path, kills: Sequence[NodeKill]) -> Evidence:
    """Return the evidence of all runs of a cluster; `calls` is where the clients noted what they trained.

    Runs may go on meanwhile. So each kind of evidence is read before what must confirm it: what was told before
    what is kept, and that before what was trained for it.
    """
    events = events_of(cluster)
    with reader(cluster) as facts:
        history = facts.history()
        commits = {run_id: facts.commit_log(run_id) for run_id in facts.heads()}
    last = {run_id: log[-1] for run_id, log in commits.items() if log}
    judged = [run for run in runs if run.run_id in last]
    return Evidence(
        events=events,
        history=history,
        commits=commits,
        unreadable=_unreadable(cluster, last.values()),
        trainings=trainings_in(calls),
        kills=tuple(kills),
        min_nodes={run.run_id: run.min_nodes for run in judged if run.min_nodes},
        final_models={run_id: head.model_digest for run_id, head in last.items()},
        expected_models={run.run_id: run.expected(last[run.run_id].position.server_round) for run in judged},
    )


def _unreadable(cluster: Cluster, heads: Sequence[Head]) -> dict[str, str]:
    """Read the checkpoints that must be kept, each from any replica that has a good copy."""
    stores = [store_of(cluster, replica_id) for replica_id in cluster.replicas]
    found: dict[str, str] = {}
    for head in heads:
        problems = []
        for store in stores:
            try:
                load(head.position.digest, store)
                break
            except HaError as error:
                problems.append(str(error))
        else:
            found[head.position.digest] = "; ".join(problems)
    return found
