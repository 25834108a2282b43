"""Heartbeats while a model of 1 GB is trained and both cores are busy: nobody may be replaced."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from bench.result import Figure, Scale
from bench.rounds import APP
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import WaitTimeoutError

BUSY = "while True: sum(i * i for i in range(10 ** 6))"


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Count changes of the leader under load."""
    seconds = 600 if scale.is_long else scale.pick(20, 90)
    model_bytes = scale.pick(10_000_000, 1_000_000_000)
    with LocalCluster(folder, Plan(supernodes=2, session_timeout_s=4.0)) as cluster:
        cluster.start()
        run_id = cluster.submit(APP, num_server_rounds=1000, min_nodes=2, model_bytes=model_bytes, layers=8)
        load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
        try:
            with contextlib.suppress(WaitTimeoutError):  # it goes on training: that is what is wanted
                cluster.wait_run(run_id, lambda run: run["state"] == "failed", timeout_s=seconds, what="a failure")
            run = cluster.run(run_id) or {"server_round": 0}
            term = (cluster.get("/cluster") or {"term": 0})["term"]
        finally:
            for process in load:
                process.kill()
                process.wait()
    name = f"{model_bytes / 1e9:g} GB model and busy cores for {seconds} s"
    return [
        Figure(name=f"{name}: false failovers", value=term - 1, unit="failovers", goal=0),
        Figure(name=f"{name}: rounds meanwhile", value=run["server_round"], unit="rounds"),
    ]
