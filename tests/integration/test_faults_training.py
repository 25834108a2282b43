"""Training on real SuperNodes: faults change no bit of the model, and no client trains a round twice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from tests.chaos.evidence import events_of, reader, trainings_in
from tests.chaos.reference import expected_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi")
ROUNDS = 3
NODES = 2
FAILOVERS = 2
LONG_S = 400.0  # a machine that does much else is slow


@dataclass(frozen=True, slots=True)
class Site:
    """Hold a cluster and where its clients note what they train."""

    cluster: LocalCluster
    calls: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run three replicas and two SuperNodes."""
    folder = tmp_path_factory.mktemp("training")
    calls = folder / "calls"
    plan = Plan(
        supernodes=NODES, is_embedded=True, session_timeout_s=3.0, environment={"FLWR_HA_TEST_CALLS": str(calls)}
    )
    with LocalCluster(folder, plan) as cluster:
        cluster.start()
        yield Site(cluster, calls)


@pytest.mark.parametrize("seed", [7])
def test_final_models_are_bit_equal_with_and_without_failovers(site: Site, seed: int) -> None:
    """Four strategies, leaders killed at random moments: the models are those of an undisturbed training in memory."""
    rng = random.Random(seed)
    runs = _submit_all(site.cluster)
    for _ in range(FAILOVERS):
        _wait_commits(site.cluster, runs, more=rng.randrange(1, len(STRATEGIES)))
        _kill_leader(site.cluster)
    _wait_finished(site.cluster, runs)

    found = {name: _models(site.cluster, run_id)[-1] for name, run_id in runs.items()}
    assert found == {name: expected_model(name, rounds=ROUNDS, nodes=NODES) for name in STRATEGIES}
    partitions = [f"partition-{index}" for index in range(NODES)]
    rounds = range(1, ROUNDS + 1)
    once = {(run, partition, each): 1 for run in runs.values() for partition in partitions for each in rounds}
    assert {training: len(attempts) for training, attempts in trainings_in(site.calls).items()} == once


def test_reply_with_nan_is_refused_with_node_and_reason_until_the_run_fails(site: Site) -> None:
    """It counts as missing; after the allowed attempts the run fails with a sentence that says why."""
    run_id = site.cluster.submit(APP, num_server_rounds=1, min_nodes=NODES, broken_partition=1, max_attempts=2)

    run = site.cluster.wait_run(run_id, lambda run: run["state"] == "failed", timeout_s=LONG_S, what="the failure")

    assert run["server_round"] == 0
    told = [
        event for event in events_of(site.cluster) if event["kind"] == "reply-rejected" and event["run_id"] == run_id
    ]
    nodes = json.loads(site.cluster.flwr("supernode", "list", "ha", "--format", "json"))["nodes"]
    assert len(told) == 2
    assert told[0]["node"] in {str(node["node-id"]) for node in nodes}
    assert told[0]["message"].startswith(f"node {told[0]['node']}: array")
    assert told[0]["message"].endswith("holds NaN or infinite values")
    shown = site.cluster.flwr("log", run_id, "ha", "--show")
    assert "NotEnoughNodesError" in shown
    assert "holds NaN or infinite values" in shown


def _submit_all(cluster: LocalCluster) -> dict[str, str]:
    return {
        name: cluster.submit(APP, num_server_rounds=ROUNDS, min_nodes=NODES, strategy=name, fraction_evaluate=0.0)
        for name in STRATEGIES
    }


def _wait_finished(cluster: LocalCluster, runs: dict[str, str]) -> None:
    for run_id in runs.values():
        cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=LONG_S, what=f"the end of {run_id}")


def _wait_commits(cluster: LocalCluster, runs: dict[str, str], *, more: int) -> None:
    goal = _commits(cluster, runs) + more
    wait_until(lambda: _commits(cluster, runs) >= goal, timeout_s=LONG_S, what=f"{goal} commits", poll_s=0.2)


def _commits(cluster: LocalCluster, runs: dict[str, str]) -> int:
    found = [cluster.run(run_id) for run_id in runs.values()]
    return sum(run["server_round"] for run in found if run is not None)


def _kill_leader(cluster: LocalCluster) -> None:
    """Kill the leader's whole tree, and start it again as a standby once another replica leads."""
    leader = cluster.wait_leader(timeout_s=LONG_S)
    cluster.replicas[leader].kill_tree()
    cluster.wait_leader(timeout_s=LONG_S, other_than=leader)
    cluster.start_replica(leader)


def _models(cluster: LocalCluster, run_id: str) -> list[str]:
    with reader(cluster) as facts:
        return [head.model_digest for head in facts.commit_log(run_id)]
