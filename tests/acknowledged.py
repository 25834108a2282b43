"""Kill the leader right after it has acknowledged something, again and again.

Run as ``python -m tests.acknowledged --times 50 [--what runs|supernodes]``: the leader dies when `flwr run` has printed
its run id, or when a SuperNode has said that it is registered. The exit status is 1 when the next leader does not know
one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.local.zookeeper import free_ports
from flwr_ha.superlink.procfs import descendants

APP = Path(__file__).parent / "apps" / "sleeper"
BIN = Path(sys.executable).parent
LEADER_TIMEOUT_S = 120.0


def kill_after_acknowledgement(folder: Path, *, times: int, what: str = "runs") -> tuple[list[str], set[str]]:
    """Have something acknowledged and kill the leader at once, `times` times.

    Parameters
    ----------
    folder : Path
        For the cluster.
    times : int
        How often.
    what : str
        ``runs`` or ``supernodes``.

    Returns
    -------
    tuple
        The ids that were acknowledged, in their order, and those that the last leader knows.
    """
    acknowledged: list[str] = []
    act, known = ACTS[what]
    with LocalCluster(folder, Plan(is_embedded=True, supernodes=0)) as cluster:
        cluster.start()
        for number in range(times):
            leader = cluster.wait_leader(timeout_s=LEADER_TIMEOUT_S)
            acknowledged.append(act(cluster, leader))
            cluster.wait_leader(timeout_s=LEADER_TIMEOUT_S, other_than=leader)
            cluster.start_replica(leader)
            if what == "runs":
                cluster.flwr("stop", acknowledged[-1], "ha", timeout_s=120.0)  # it is there, and need not run on
            wait_until(
                lambda replica_id=leader: _is_standby(cluster, replica_id),  # type: ignore[misc]
                timeout_s=LEADER_TIMEOUT_S,
                what="the killed replica stands by",
                poll_s=0.1,
            )
            print(f"{number + 1}/{times}: {acknowledged[-1]} was acknowledged, another replica leads", flush=True)
        return acknowledged, known(cluster)


def _is_standby(cluster: LocalCluster, replica_id: int) -> bool:
    answer = cluster.get("/replica", replica_id=replica_id)
    return bool(answer) and answer["status"] == "ok"


def _submit_and_kill(cluster: LocalCluster, leader: int) -> str:
    """Return the run id; the leader is dead a few milliseconds after it was printed."""
    text = _kill_at("run-id", ["flwr", "run", str(APP), "ha", "--format", "json"], cluster, leader)
    return str(json.loads(text)["run-id"])


def _register_and_kill(cluster: LocalCluster, leader: int) -> str:
    """Return the id of a new node; the leader is dead a few milliseconds after the SuperNode has said it."""
    (port,) = free_ports(1)
    options = ["--insecure", "--superlink", cluster.supernode_address, "--port", str(port)]
    text = _kill_at(NODE_MARK, ["flower-supernode", *options], cluster, leader, is_endless=True)
    return text.split(NODE_MARK)[1].split()[0]


def _kill_at(mark: str, command: list[str], cluster: LocalCluster, leader: int, *, is_endless: bool = False) -> str:
    """Run a command, kill the leader once a line of its output holds `mark`, and return the output."""
    text = ""
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env={**os.environ, **cluster.environment},
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if is_endless else None,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            text += line
            if mark in line:
                cluster.replicas[leader].kill_tree()
                if is_endless:
                    break
        if is_endless:
            for pid in (process.pid, *descendants(process.pid)):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=120.0)
    return text


def _known_runs(cluster: LocalCluster) -> set[str]:
    # Without a limit it lists the newest 20.
    listed = json.loads(cluster.flwr("ls", "ha", "--limit", "100000", "--format", "json", timeout_s=120.0))["runs"]
    return {str(run["run-id"]) for run in listed}


def _known_nodes(cluster: LocalCluster) -> set[str]:
    listed = json.loads(cluster.flwr("supernode", "list", "ha", "--format", "json", timeout_s=120.0))["nodes"]
    return {str(node["node-id"]) for node in listed}


NODE_MARK = "SuperNode ID:"
ACTS: dict[str, tuple[Callable[[LocalCluster, int], str], Callable[[LocalCluster], set[str]]]] = {
    "runs": (_submit_and_kill, _known_runs),
    "supernodes": (_register_and_kill, _known_nodes),
}


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--what", choices=list(ACTS), default="runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        acknowledged, known = kill_after_acknowledgement(Path(folder), times=options.times, what=options.what)
    missing = [each for each in acknowledged if each not in known]
    print(f"{len(acknowledged)} {options.what} were acknowledged, {len(missing)} are missing: {missing}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
