"""A ServerApp in Flower's Message API: FedAdam, made highly available by one line."""

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam

from flwr_ha import HighlyAvailable

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a vector, and log which rounds the result holds."""
    nodes = int(context.run_config["min-nodes"])
    strategy = HighlyAvailable(
        FedAdam(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes), min_nodes=nodes
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"weight": Array(np.zeros(100))}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"learning-rate": float(context.run_config["learning-rate"])}),
    )
    logging.getLogger("flwr").info("result rounds %s", sorted(result.train_metrics_clientapp))
