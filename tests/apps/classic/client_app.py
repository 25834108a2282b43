"""A classic ClientApp: `client_fn` and a NumPyClient."""

import numpy as np
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp


class Adder(NumPyClient):
    """Add one."""

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """Return the parameters plus one."""
        return [array + 1 for array in parameters], 10, {}


def client_fn(context: Context) -> Client:
    """Return the client."""
    return Adder().to_client()


app = ClientApp(client_fn=client_fn)
