"""A classic ServerApp: `server_fn` and `flwr.server.strategy`, without a word of flwr_ha."""

import logging
import time
from pathlib import Path

import numpy as np
from flwr.common import Context, Scalar, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


def server_fn(context: Context) -> ServerAppComponents:
    """Return a classic strategy and the number of rounds."""
    logging.getLogger("flwr").info("server_fn was called")
    nodes = int(context.run_config["min-nodes"])
    hold = str(context.run_config["hold"])

    def fit_config(server_round: int) -> dict[str, Scalar]:
        """Begin no round but the first while there is a file at `hold`."""
        while server_round > 1 and hold and Path(hold).exists():
            time.sleep(0.1)
        return {}

    strategy = FedAvg(
        fraction_evaluate=0.0,
        on_fit_config_fn=fit_config,
        min_fit_clients=nodes,
        min_available_clients=nodes,
        initial_parameters=ndarrays_to_parameters([np.zeros(100)]),
    )
    return ServerAppComponents(
        strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    )


app = ServerApp(server_fn=server_fn)
