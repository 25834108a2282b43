"""How long nobody serves: the SuperLink alone is killed, or the leadership is handed over."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from bench.plain import PlainFlower, is_serving
from bench.result import Figure, Scale
from bench.rounds import APP
from flwr_ha.config import load_secret
from flwr_ha.local.cluster import SUPERLINK, LocalCluster, Plan
from flwr_ha.local.processes import wait_until

GOAL = 0.15


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Do both turn about with cold starts of ``flower-superlink``."""
    times = scale.pick(1, 5)
    killed: list[float] = []
    switched: list[float] = []
    cold: list[float] = []
    with LocalCluster(folder / "ours", Plan(supernodes=0, session_timeout_s=4.0)) as cluster:
        cluster.start()
        for number in range(times):
            killed.append(_gap_s(cluster, lambda: cluster.kill_part(_leader(cluster), SUPERLINK)))
            _wait_standbys(cluster)
            switched.append(_gap_s(cluster, lambda: _switchover(cluster)))
            _wait_standbys(cluster)
            with PlainFlower(folder / f"plain-{number}", supernodes=0) as plain:
                plain.start_coordinator()
                cold.append(plain.start_superlink())
    against = statistics.median(cold)
    figures = [
        Figure(name=name, value=statistics.median(values), unit="s", against=against,
               ratio=statistics.median(values) / against, goal=GOAL)
        for name, values in (
            ("SuperLink killed until a new leader serves", killed),
            ("planned switchover: seconds in which nobody serves", switched),
        )
    ]  # fmt: skip
    return [*figures, _repeated(folder / "repeated", scale)]


def _leader(cluster: LocalCluster) -> int:
    return cluster.wait_leader(timeout_s=60.0)


def _switchover(cluster: LocalCluster) -> None:
    replica = cluster.settings.replica(_leader(cluster))
    header = {"Authorization": f"Bearer {load_secret(cluster.settings)}"}
    httpx.post(f"http://{replica.api}/switchover", json={}, headers=header, timeout=10.0, trust_env=False)


def _wait_standbys(cluster: LocalCluster) -> None:
    """Wait until all SuperLinks are warm again."""

    def are_warm() -> bool:
        replicas = (cluster.get("/cluster") or {"replicas": []})["replicas"]
        return sum(replica["state"] == "running" for replica in replicas) == cluster.plan.replicas

    wait_until(are_warm, timeout_s=90.0, what="warm standbys", poll_s=0.2)


def _gap_s(cluster: LocalCluster, act: Callable[[], object]) -> float:
    """Return the longest time between two good answers at the public address around an act."""
    answers = [time.monotonic()]
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            if is_serving(cluster.address):
                answers.append(time.monotonic())
            is_over.wait(0.01)

    asking = threading.Thread(target=ask, name="asking")
    asking.start()
    term = (cluster.get("/cluster") or {})["term"]
    act()
    wait_until(lambda: (cluster.get("/cluster") or {"term": 0})["term"] > term, timeout_s=60.0, what="the next term")
    wait_until(lambda: is_serving(cluster.address), timeout_s=60.0, what="the new leader")
    wait_until(lambda: len(answers) > 5 and is_serving(cluster.address), timeout_s=60.0, what="answers")
    is_over.set()
    asking.join()
    return max(after - before for before, after in itertools.pairwise(answers))


def _repeated(folder: Path, scale: Scale) -> Figure:
    """Switch over in the middle of a client's step, and count trainings that were done twice."""
    calls = folder / "calls"
    rounds = scale.pick(2, 4)
    plan = Plan(supernodes=2, session_timeout_s=4.0, environment={"FLWR_HA_TEST_CALLS": str(calls)})
    with LocalCluster(folder, plan) as cluster:
        cluster.start()
        run_id = cluster.submit(APP, num_server_rounds=rounds, min_nodes=2, step_s=2.0, model_bytes=4000, layers=1)
        cluster.wait_run(run_id, lambda run: run["server_round"] >= 1, timeout_s=180.0, what="round 1")
        _switchover(cluster)
        cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=300.0, what="the end")
    done = [line for file in calls.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    repeated = sum("train" in line for line in done) - 2 * rounds
    return Figure(name="planned switchover: trainings repeated", value=repeated, unit="trainings", goal=0)
