"""Time to import `flwr_ha` as a ServerApp does, against the imports that every ServerApp has."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.result import Figure, Scale, interleaved, median_ratio

PLAIN = "import flwr; from flwr.serverapp import ServerApp; from flwr.serverapp.strategy import FedAvg"
OURS = f"{PLAIN}; from flwr_ha import HighlyAvailable"


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Start interpreters turn about, with bytecode as an installation has it."""
    _seconds(OURS)
    ours, plain = interleaved(scale.pick(5, 15), lambda: _seconds(OURS), lambda: _seconds(PLAIN))
    return [
        Figure(
            name="import of flwr_ha in a ServerApp", value=statistics.median(ours), unit="s",
            against=statistics.median(plain), ratio=median_ratio(ours, plain), goal=1.1,
        )
    ]  # fmt: skip


def _seconds(code: str) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)  # a timeout would wait in steps of 50 ms
    return time.perf_counter() - start_s
