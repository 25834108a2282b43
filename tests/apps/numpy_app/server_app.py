"""ServerApp of the tests: any of four strategies over a vector."""

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi

from flwr_ha import HighlyAvailable

logger = logging.getLogger("flwr.ha.numpy_app")
app = ServerApp()

STRATEGIES = {
    "fedavg": FedAvg,
    "fedavgm": lambda **nodes: FedAvgM(server_learning_rate=0.9, server_momentum=0.9, **nodes),
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and log which rounds the Result holds."""
    config = context.run_config
    min_nodes = int(config["min-nodes"])
    inner = STRATEGIES[str(config["strategy"])](
        min_train_nodes=min_nodes,
        min_evaluate_nodes=min_nodes,
        min_available_nodes=min_nodes,
        fraction_evaluate=float(config["fraction-evaluate"]),
    )
    strategy = HighlyAvailable(
        inner,
        min_nodes=min_nodes,
        round_timeout_s=float(config["round-timeout-s"]),
        wait_timeout_s=float(config["wait-timeout-s"]) or None,
        checkpoint_dir=str(config["checkpoint-dir"]) or None,
    )
    strategy.max_attempts = int(config["max-attempts"])
    rng = np.random.default_rng(int(config["seed"]))
    size = int(config["size"])
    initial = {"weight": rng.normal(size=size).astype(np.float32), "bias": np.zeros(8, np.float64)}
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({name: Array(values) for name, values in initial.items()}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
    logger.info("result rounds %s", sorted(result.train_metrics_clientapp))
    logger.info("result digest %s", result.arrays.object_id)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return a number that depends on every value of the model."""
    values = [array.numpy() for array in arrays.values()]
    total = sum(float(np.abs(each).sum(dtype=np.float64)) for each in values)
    size = sum(each.size for each in values)
    return MetricRecord({"loss": total / size, "accuracy": max(0.0, 1.0 - total / size)})
