"""Kill the leader right after `flwr run` has printed its run id, again and again.

Run as ``python -m tests.acknowledged --times 50``; the exit status is 1 when a run is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until

APP = Path(__file__).parent / "apps" / "sleeper"
LEADER_TIMEOUT_S = 120.0


def kill_after_acknowledgement(folder: Path, *, times: int) -> tuple[list[str], set[str]]:
    """Submit a run and kill the leader as soon as its id is printed, `times` times.

    Parameters
    ----------
    folder : Path
        For the cluster.
    times : int
        How often.

    Returns
    -------
    tuple
        The run ids that were acknowledged, in their order, and those that the last leader knows.
    """
    acknowledged: list[str] = []
    with LocalCluster(folder, Plan(is_embedded=True, supernodes=0)) as cluster:
        cluster.start()
        for number in range(times):
            leader = cluster.wait_leader(timeout_s=LEADER_TIMEOUT_S)
            acknowledged.append(_submit_and_kill(cluster, leader))
            cluster.wait_leader(timeout_s=LEADER_TIMEOUT_S, other_than=leader)
            cluster.start_replica(leader)
            cluster.flwr("stop", acknowledged[-1], "ha", timeout_s=120.0)  # it is there, and need not run on
            wait_until(
                lambda replica_id=leader: _is_standby(cluster, replica_id),  # type: ignore[misc]
                timeout_s=LEADER_TIMEOUT_S,
                what="the killed replica stands by",
                poll_s=0.1,
            )
            print(f"{number + 1}/{times}: run {acknowledged[-1]} is known to the next leader", flush=True)
        listed = json.loads(cluster.flwr("ls", "ha", "--format", "json", timeout_s=120.0))["runs"]
    return acknowledged, {str(run["run-id"]) for run in listed}


def _is_standby(cluster: LocalCluster, replica_id: int) -> bool:
    answer = cluster.get("/replica", replica_id=replica_id)
    return bool(answer) and answer["status"] == "ok"


def _submit_and_kill(cluster: LocalCluster, leader: int) -> str:
    """Return the run id; the leader is dead a few milliseconds after it was printed."""
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(APP), "ha", "--format", "json"]
    environment: Mapping[str, str] = {**os.environ, **cluster.environment}
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, env=environment, cwd=scratch, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if "run-id" in line:
                cluster.replicas[leader].kill_tree()
        process.wait(timeout=120.0)
    return str(json.loads(text)["run-id"])


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    with tempfile.TemporaryDirectory() as folder:
        acknowledged, known = kill_after_acknowledgement(Path(folder), times=parser.parse_args().times)
    missing = [run_id for run_id in acknowledged if run_id not in known]
    print(f"{len(acknowledged)} runs were acknowledged, {len(missing)} are missing: {missing}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
