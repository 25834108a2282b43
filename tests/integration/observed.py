"""A run that is watched while parts of its cluster are killed: what must stay true whatever happens."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr_ha.coordination.reader import ClusterReader
from flwr_ha.local.cluster import SERVERAPP, LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.model import Head
from flwr_ha.replica.main import make_store

NUMPY_APP = Path(__file__).parents[1] / "apps" / "numpy_app"
ROUND_TIMEOUT_S = 120.0  # for a machine that does much else; a round takes about 7 s
MakeCluster = Callable[[Plan], LocalCluster]
BUSY = ("training", "evaluating")


class ObservedRun:
    """Follow one run of a local cluster, and check what must not change.

    Parameters
    ----------
    cluster : LocalCluster
        Its replicas and SuperNodes run.
    run_id : str
        Flower's run id.
    """

    def __init__(self, cluster: LocalCluster, run_id: str) -> None:
        self.cluster = cluster
        self.run_id = run_id
        self._supernodes = {index: program.pid for index, program in cluster.supernodes.items()}
        self._node_ids = node_ids(cluster)

    def wait_round(self, server_round: int, *, timeout_s: float = ROUND_TIMEOUT_S) -> dict[str, Any]:
        """Return the run once this round is committed."""
        return self.cluster.wait_run(
            self.run_id, lambda run: run["server_round"] >= server_round, timeout_s=timeout_s, what="the next round"
        )

    def wait_middle_of_round(self, server_round: int = 0, *, timeout_s: float = 2 * ROUND_TIMEOUT_S) -> int:
        """Return the committed round before the one whose messages are out, once it is `server_round` or later."""
        run = self.cluster.wait_run(
            self.run_id,
            lambda run: run["server_round"] >= server_round and run["state"] in BUSY and "replies" in run["reason"],
            timeout_s=timeout_s,
            what=f"the middle of the round after {server_round}",
        )
        return int(run["server_round"])

    def wait_finished(self, *, timeout_s: float = 4 * ROUND_TIMEOUT_S) -> dict[str, Any]:
        """Return the run once it has finished."""
        return self.cluster.wait_run(
            self.run_id, lambda run: run["state"] == "finished", timeout_s=timeout_s, what="the end of the run"
        )

    def commit_log(self) -> tuple[Head, ...]:
        """Return the commits of the run, as the coordinator has them."""
        with reader(self.cluster) as facts:
            return facts.commit_log(self.run_id)

    def check_commits(self) -> None:
        """Check that each round is committed exactly once, in order, under terms that do not go back."""
        log = self.commit_log()
        rounds = [head.position.server_round for head in log]
        terms = [head.position.term for head in log]
        assert rounds == list(range(1, len(rounds) + 1))
        assert terms == sorted(terms)
        told = Counter(
            event["server_round"]
            for event in all_events(self.cluster)
            if event["kind"] == "commit" and event["run_id"] == self.run_id
        )
        assert {server_round: count for server_round, count in told.items() if count > 1} == {}

    def check_supernodes(self) -> None:
        """Check that all SuperNodes are the processes, and the nodes, that they were at the start."""
        alive = {index: self.cluster.supernodes[index].pid for index in self._supernodes if self._is_alive(index)}
        assert alive == self._supernodes
        assert node_ids(self.cluster) == self._node_ids

    def _is_alive(self, index: int) -> bool:
        return self.cluster.supernodes[index].is_alive

    def check_finished(self, rounds: int) -> None:
        """Check commits, SuperNodes, and what Flower's own command line shows at the end."""
        self.check_commits()
        assert len(self.commit_log()) == rounds
        self.check_supernodes()
        listed = {str(run["run-id"]): run["status"] for run in flwr_ls(self.cluster)}
        assert listed == {self.run_id: "finished:completed"}


@contextmanager
def reader(cluster: LocalCluster) -> Iterator[ClusterReader]:
    """Read the facts of the cluster over a connection of our own."""
    store = make_store(cluster.settings)
    store.start(lambda: None, timeout_s=15.0)
    try:
        yield ClusterReader(store)
    finally:
        store.close()


def start_run(cluster: LocalCluster, **run_config: object) -> ObservedRun:
    """Submit the numpy app, and follow it once all SuperNodes of the cluster are online."""
    run_id = cluster.submit(NUMPY_APP, **{"fraction_evaluate": 0.0, "step_s": 0.5, **run_config})
    wanted = len(cluster.supernodes)
    cluster.wait_run(
        run_id, lambda run: run["nodes_online"] == wanted, timeout_s=ROUND_TIMEOUT_S, what=f"{wanted} SuperNodes"
    )
    return ObservedRun(cluster, run_id)


def flwr_ls(cluster: LocalCluster) -> list[dict[str, Any]]:
    """Return the runs that ``flwr ls`` shows."""
    runs: list[dict[str, Any]] = json.loads(cluster.flwr("ls", "ha", "--format", "json"))["runs"]
    return runs


def node_ids(cluster: LocalCluster) -> list[str]:
    """Return the ids of the nodes that are online, as Flower's command line shows them."""
    nodes = json.loads(cluster.flwr("supernode", "list", "ha", "--format", "json"))["nodes"]
    return sorted(str(node["node-id"]) for node in nodes if node["status"] == "online")


def all_events(cluster: LocalCluster) -> list[dict[str, Any]]:
    """Return what all replicas have written into their event logs, earlier lives included."""
    return [
        json.loads(line)
        for file in cluster.settings.data_dir.glob("replica-*/events.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.endswith("}")
    ]


def at_s(event: Mapping[str, Any]) -> float:
    """Return when an event happened, in seconds since 1970, as ``time.time()`` tells it."""
    return datetime.fromisoformat(event["at"]).timestamp()


def wait_next_term(cluster: LocalCluster, *, after: int, timeout_s: float = 30.0) -> dict[str, Any]:
    """Return the event with which the first leader of a newer term began to serve."""

    def found() -> dict[str, Any] | None:
        newer = [event for event in all_events(cluster) if event["kind"] == "leading" and event["term"] > after]
        return min(newer, key=at_s, default=None)

    return wait_until(found, timeout_s=timeout_s, what=f"a leader of a term after {after}", poll_s=0.1)


def heal(cluster: LocalCluster) -> int:
    """Start the replicas that have ended, wait until all of them are ready, and return the leader's id."""
    for replica_id, program in cluster.replicas.items():
        if not program.is_alive:
            cluster.start_replica(replica_id)

    def is_whole() -> bool:
        state = cluster.get("/cluster")
        return (
            state is not None
            and state["leader"] is not None
            and all(replica["state"] == "running" for replica in state["replicas"])
        )

    wait_until(is_whole, timeout_s=60.0, what="a leader and running standbys", poll_s=0.1)
    return cluster.wait_leader(timeout_s=30.0)


def wait_serverapp(cluster: LocalCluster, replica_id: int, *, other_than: int = 0) -> int:
    """Return the process id of the leader's ServerApp once it runs."""

    def found() -> int | None:
        pid = cluster.replicas[replica_id].find(SERVERAPP)
        return None if pid == other_than else pid

    return wait_until(found, timeout_s=60.0, what="a ServerApp")


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits to be reaped has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def seconds_until_gone(pids: tuple[int, ...], *, since_s: float, timeout_s: float) -> float:
    """Wait until all processes have ended and return how long that took since ``time.monotonic()`` was `since_s`."""
    wait_until(lambda: all(map(is_gone, pids)), timeout_s=timeout_s, what=f"the end of processes {pids}", poll_s=0.005)
    return time.monotonic() - since_s
