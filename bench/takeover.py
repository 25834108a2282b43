"""The leader's tree is killed: how long until the next round is finished, and where the time goes."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.picture import draw
from bench.result import Figure, Scale
from bench.rounds import APP
from flwr_ha.local.cluster import LocalCluster, Plan

SESSION_TIMEOUT_S, STEP_S = 4.0, 4.0
NVFLARE_S, NVFLARE_ROUND_S = 20.2, 6.0  # version 2.4.2, from kill to the next finished round: see docs/performance.md
PHASES = (
    "noticed",
    "elected",
    "carried over",
    "serving",
    "ServerApp running",
    "first client request",
    "round finished",
)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "takeover.svg"


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Kill the leader in the middle of a client's step, some rounds apart, and start it again each time."""
    times = scale.pick(2, 10)
    plan = Plan(supernodes=2, session_timeout_s=SESSION_TIMEOUT_S)
    splits: list[dict[str, float]] = []
    with LocalCluster(folder, plan) as cluster:
        cluster.start()
        run_id = cluster.submit(APP, num_server_rounds=1000, min_nodes=2, step_s=STEP_S, model_bytes=4000, layers=1)
        _wait_round(cluster, run_id, 1)
        undisturbed = _rounds(cluster, run_id, 3)
        for number in range(times):
            splits.append(_kill(cluster, run_id, after_s=1.0 + 0.6 * number % STEP_S))
            undisturbed += _rounds(cluster, run_id, 1)
        cluster.flwr("stop", run_id, "ha")
    totals = [split["round finished"] for split in splits]
    round_s = statistics.median(undisturbed)
    medians = {phase: statistics.median(split[phase] for split in splits) for phase in PHASES}
    if not scale.is_quick:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(draw(splits, PHASES, round_s=round_s), encoding="utf-8")
    name = "kill -9 of the leader's tree to the next finished round"
    limit_s = round_s + SESSION_TIMEOUT_S + 3.0
    return [
        Figure(name=f"{name}, median", value=statistics.median(totals), unit="s", against=NVFLARE_S, goal=limit_s),
        Figure(name=f"{name}, worst of {times}", value=max(totals), unit="s", against=NVFLARE_S, goal=limit_s + 2.0),
        Figure(name="an undisturbed round of the same cluster", value=round_s, unit="s", against=NVFLARE_ROUND_S),
        *(Figure(name=f"takeover until {phase}", value=medians[phase], unit="s") for phase in PHASES),
    ]


def _rounds(cluster: LocalCluster, run_id: str, number: int) -> list[float]:
    """Return the seconds of the next rounds; called when one has just been committed."""
    first, times = _round(cluster, run_id), [time.monotonic()]
    for server_round in range(first + 1, first + 1 + number):
        _wait_round(cluster, run_id, server_round)
        times.append(time.monotonic())
    return [after - before for before, after in itertools.pairwise(times)]


def _round(cluster: LocalCluster, run_id: str) -> int:
    run = cluster.run(run_id)
    return int(run["server_round"]) if run else 0


def _wait_round(cluster: LocalCluster, run_id: str, wanted: int) -> int:
    run = cluster.wait_run(run_id, lambda run: run["server_round"] >= wanted, timeout_s=180.0, what=f"round {wanted}")
    return int(run["server_round"])


def _kill(cluster: LocalCluster, run_id: str, *, after_s: float) -> dict[str, float]:
    """Kill the leader some seconds after a commit; return the seconds from the kill to each phase.

    At the end the next round is committed, and the killed replica starts again.
    """
    before = _round(cluster, run_id)
    time.sleep(after_s)  # not a wait: the moment of the kill is what is varied
    leader = cluster.leader()
    assert leader is not None
    killed_s = time.time()
    cluster.replicas[leader].kill_tree()
    new = cluster.wait_leader(timeout_s=60.0, other_than=leader)
    _wait_round(cluster, run_id, before + 1)
    events = [event for event in cluster.get("/events?after=0", replica_id=new) if _at(event) > killed_s]
    split = phases(events, killed_s, _first_request_s(cluster, new, killed_s))
    cluster.start_replica(leader)
    return split


def phases(events: Sequence[Mapping[str, Any]], killed_s: float, first_request_s: float) -> dict[str, float]:
    """Return the seconds from the kill to each phase, from the event log of the new leader."""

    def after(kind: str) -> float:
        return next(_at(event) for event in events if event["kind"] == kind) - killed_s

    return {
        "noticed": after("role"),
        "elected": after("elected"),
        "carried over": after("carried-over"),
        "serving": after("leading"),
        "ServerApp running": after("session"),
        "first client request": first_request_s - killed_s,
        "round finished": after("commit"),
    }


def _at(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["at"].replace("Z", "+00:00")).timestamp()


def _first_request_s(cluster: LocalCluster, replica_id: int, killed_s: float) -> float:
    """Return when the new leader's SuperLink was first asked for work, from its log."""
    pattern = re.compile(r"^(\S+ \S+),(\d+) INFO flwr_ha.superlink.parking: the first SuperNode", re.M)
    found = [float("nan")]
    for file in (cluster.folder / "data" / f"replica-{replica_id}").rglob("*.log"):
        for when, milliseconds in pattern.findall(file.read_text(encoding="utf-8", errors="replace")):
            at_s = datetime.strptime(when, "%Y-%m-%d %H:%M:%S").astimezone().timestamp() + int(milliseconds) / 1000
            if at_s > killed_s:
                found.insert(0, at_s)
    return found[0]
