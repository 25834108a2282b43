"""Memory of a ServerApp with 20 replies of 100 MB, against Flower's own loop with FedAvg."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.result import Figure, Scale


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Run one round in a process of its own for each way, replies made one by one as they are pulled."""
    nodes, megabytes = scale.pick(10, 20), scale.pick(20, 100)
    ours, forward = (_run(folder, nodes, megabytes, kind) for kind in ("ours", "ours-backwards"))
    twice = _run(folder, 2 * nodes, megabytes, "ours") if not scale.is_quick else ours
    plain = _run(folder, nodes, megabytes, "plain")
    name = f"memory of the ServerApp, {nodes} replies of {megabytes} MB"
    return [
        Figure(name=name, value=ours["models"], unit="models", against=plain["models"], goal=4.0),
        Figure(name=f"{name}: with twice as many clients", value=twice["models"], unit="models", goal=4.0),
        Figure(
            name=f"{name}: other bits in another order of arrival",
            value=float(ours["digest"] != forward["digest"]), unit="models", goal=0,
        ),
    ]  # fmt: skip


def _run(folder: Path, nodes: int, megabytes: int, kind: str) -> dict[str, float | str]:
    command = [sys.executable, "-m", "bench.memoryprocess", str(folder), str(nodes), str(megabytes), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    answer: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return answer
