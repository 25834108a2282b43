"""ClientApp of the tests: a deterministic step; each real training leaves a line in two files.

The file of the run also holds a line for each beginning, with the node and ``time.monotonic()``.
"""

import os
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp

from flwr_ha.clientapp import numpy_client_mod, replay_mod


class NumpyClient(NumPyClient):
    """Add a step that depends on the partition, the round and the model."""

    def __init__(self, context: Context) -> None:
        self.partition = int(context.node_config["partition-id"])
        self.run_id = context.run_id
        self.node_id = context.node_id
        self.step_s = float(context.run_config["step-s"])
        self.is_broken = self.partition == int(context.run_config["broken-partition"])
        self.calls = str(context.node_config.get("calls", "")) or os.environ.get("FLWR_HA_TEST_CALLS", "")

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """Train for ``step_s`` seconds."""
        server_round = int(config["server-round"])
        self.trace(f"begin {server_round}")
        threading.Event().wait(self.step_s)
        rng = np.random.default_rng([self.partition, server_round])
        arrays = [(0.9 * w + 0.1 * rng.normal(size=w.shape)).astype(w.dtype) for w in parameters]
        if self.is_broken:
            arrays[0].flat[0] = np.nan
        self.note(f"train {server_round}")
        return arrays, 100 + self.partition, {"train_loss": 1.0 / server_round}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        """Return a loss that depends on the model."""
        self.note(f"evaluate {config['server-round']}")
        return float(sum(np.abs(w).sum() for w in parameters)), 100 + self.partition, {"accuracy": 0.5}

    def note(self, line: str) -> None:
        """Append a line in one write, so that lines of several processes never mix."""
        if self.calls:
            self.append(Path(self.calls), line)
            self.trace(line)

    def trace(self, line: str) -> None:
        """Append a line with node and time to the run's file."""
        if self.calls:
            self.append(Path(self.calls) / f"run-{self.run_id}", f"{line} {self.node_id} {time.monotonic():.3f}")

    def append(self, folder: Path, line: str) -> None:
        """Append a line to the partition's file in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"partition-{self.partition}").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def client_fn(context: Context) -> Client:
    """Return the client of this node's partition."""
    return NumpyClient(context).to_client()


app = ClientApp(client_fn=client_fn, mods=[replay_mod, numpy_client_mod])
