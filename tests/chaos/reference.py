"""What `tests/apps/numpy_app` must come to: the same training over a Grid in memory, without any process."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi

from flwr_ha import HighlyAvailable
from flwr_ha.serverapp.arrays import pack
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, some_nodes
from flwr_ha.storage.checkpoint import model_digest

STRATEGIES = {
    "fedavg": FedAvg,
    "fedavgm": lambda **nodes: FedAvgM(server_learning_rate=0.9, server_momentum=0.9, **nodes),
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}


def expected_model(strategy: str, *, rounds: int, nodes: int, size: int = 1000) -> str:
    """Return the digest of the model that a run of the numpy app must end with, with faults or without.

    Notes
    -----
    The nodes of `flwr_ha.serverapp.testing` do the same step as the app's clients.
    """
    rng = np.random.default_rng(0)
    initial = {"weight": rng.normal(size=size).astype(np.float32), "bias": np.zeros(8, np.float64)}
    inner = STRATEGIES[strategy](
        min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes, fraction_evaluate=0.0
    )
    wrapped = HighlyAvailable(inner, min_nodes=nodes)
    clock = FakeClock()
    wrapped.clock = clock
    result = wrapped.start(
        grid=FakeGrid(clock, some_nodes(nodes)),
        initial_arrays=ArrayRecord({name: Array(values) for name, values in initial.items()}),
        num_rounds=rounds,
    )
    arrays, _ = pack(result.arrays)
    return model_digest(arrays)
