"""ServerApp of the benchmarks: FedAvg, plain or highly available, over a model of any size."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and note when each round has ended."""
    config = context.run_config
    nodes = int(config["min-nodes"])
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    if not config["is-plain"]:
        from flwr_ha import HighlyAvailable

        strategy = HighlyAvailable(strategy, min_nodes=nodes)
    if config["is-timed"]:
        from clocks import Clocks

        Clocks(Path(str(config["notes"])).with_suffix(".costs")).install()
    rng = np.random.default_rng(0)
    layers = int(config["layers"])
    size = int(config["model-bytes"]) // (4 * layers)
    model = {f"layer{index}": Array(rng.normal(size=size).astype(np.float32)) for index in range(layers)}

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if config["notes"]:
            with Path(str(config["notes"])).open("a", encoding="utf-8") as file:
                file.write(f"{server_round} {time.time()}\n")
        return MetricRecord({"size": sum(len(array.data) for array in arrays.values())})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=note,
    )
