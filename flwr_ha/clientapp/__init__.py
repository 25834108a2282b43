"""The ClientApp side: mods for replay and for classic NumPyClients."""

from flwr_ha.clientapp.numpy_client import numpy_client_mod
from flwr_ha.clientapp.replay import replay_mod

__all__ = ["numpy_client_mod", "replay_mod"]
