"""The example's ClientApp: a classic NumPyClient, made repeatable and replayable by two mods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from flwr_ha.clientapp import numpy_client_mod, replay_mod
from task import Digits, evaluate, load_partition, new_net, train, use_one_deterministic_thread


class DigitsClient(NumPyClient):
    """Train and evaluate on the digits of one partition.

    Parameters
    ----------
    digits : Digits
        Of this node.
    partition : int
        Counts from 0; part of the seed.
    config : dict
        The run's settings.
    """

    def __init__(self, digits: Digits, partition: int, config: dict[str, object]) -> None:
        use_one_deterministic_thread()
        self._digits = digits
        self._partition = partition
        self._config = config
        self._net = new_net()

    def fit(
        self, parameters: list[NDArray[Any]], config: dict[str, Any]
    ) -> tuple[list[NDArray[Any]], int, dict[str, Any]]:
        """Train from the given weights; the same round gives the same weights."""
        self._load(parameters)
        seed = [self._partition, int(config["server-round"])]
        loss = train(self._net, self._digits, config=self._config, seed=seed)
        weights = [values.numpy() for values in self._net.state_dict().values()]
        return weights, len(self._digits), {"train_loss": loss}

    def evaluate(self, parameters: list[NDArray[Any]], config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        """Return loss and accuracy on the node's own digits."""
        self._load(parameters)
        loss, accuracy = evaluate(self._net, self._digits)
        return loss, len(self._digits), {"accuracy": accuracy}

    def _load(self, parameters: list[NDArray[Any]]) -> None:
        values = (torch.from_numpy(np.array(array)) for array in parameters)
        self._net.load_state_dict(dict(zip(self._net.state_dict(), values, strict=True)))


def client_fn(context: Context) -> Client:
    """Return the client of this node, as its ``partition-id`` and ``num-partitions`` say."""
    node = context.node_config
    missing = next((key for key in ("partition-id", "num-partitions") if key not in node), None)
    if missing:
        raise ValueError(f'{missing} is missing: start with --node-config "partition-id=0 num-partitions=5"')
    config: dict[str, object] = {**context.run_config, **{key: node[key] for key in node if key == "data"}}
    partition, num_partitions = int(node["partition-id"]), int(node["num-partitions"])
    return DigitsClient(load_partition(config, partition, num_partitions), partition, config).to_client()


app = ClientApp(client_fn=client_fn, mods=[replay_mod, numpy_client_mod])
