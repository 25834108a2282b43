"""A ServerApp whose strategy is the user's own class: it keeps a state, and changes the config from round to round."""

import logging
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_ha import HighlyAvailable

app = ServerApp()
log = logging.getLogger("flwr")


class Decaying(FedAvg):
    """Halve the learning rate each round, in the config that the next round gets; remember the losses."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.losses: list[float] = []
        self.velocity = np.zeros(100)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Change the config in place, as Flower's own examples do."""
        if server_round > 1:
            config["learning-rate"] = float(config["learning-rate"]) / 2
        log.info("round %d has learning rate %g", server_round, config["learning-rate"])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move on with a momentum of its own."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.losses.append(float(metrics["train_loss"]))
        self.velocity = 0.5 * self.velocity + arrays["weight"].numpy()
        return ArrayRecord({"weight": Array(self.velocity)}), metrics


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a vector, and log the strategy's own state."""
    nodes = int(context.run_config["min-nodes"])
    inner = Decaying(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    result = HighlyAvailable(inner, min_nodes=nodes).start(
        grid=grid,
        initial_arrays=ArrayRecord({"weight": Array(np.zeros(100))}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"learning-rate": 1.0}),
    )
    log.info("result rounds %s", sorted(result.train_metrics_clientapp))
    log.info("losses %s", [round(loss, 3) for loss in inner.losses])
    log.info("weight %.6f", result.arrays["weight"].numpy()[0])
