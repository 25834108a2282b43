"""Which nodes are online, how many a strategy needs, and the Grid through which it samples them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run

Kind = Literal["train", "evaluate"]

_CALLS_OF_SNAPSHOT = 4  # FedAvg asks twice


@dataclass(frozen=True, slots=True)
class Need:
    """Say how many nodes must be online before a strategy is asked to sample.

    Attributes
    ----------
    nodes : int
        0: the strategy skips this phase.
    reason : str
        Why, for people; empty where it is ``min_nodes`` alone.
    """

    nodes: int
    reason: str = ""


def online(grid: Grid) -> dict[int, str]:
    """Return the nodes that are online, sorted by id, each with the time at which it registered itself last.

    A node whose time changes was restarted: what it was doing is lost.
    """
    nodes = {node.node_id: str(getattr(node, "last_activated_at", "")) for node in grid.get_nodes()}
    return {node: nodes[node] for node in sorted(nodes)}


def need(strategy: Strategy, kind: Kind, *, min_nodes: int) -> Need:
    """Return how many nodes a strategy needs online, so that it neither waits unseen nor samples too few.

    Notes
    -----
    Flower's strategies sample ``max(int(n * fraction), min_…_nodes)`` of n nodes, and wait without
    an end until ``min_available_nodes`` are online.
    """
    fraction = _setting(strategy, f"fraction_{kind}")
    if fraction == 0.0:
        return Need(0)
    sampled = int(_setting(strategy, f"min_{kind}_nodes") or 0)
    nodes = max(min_nodes, sampled, int(_setting(strategy, "min_available_nodes") or 0))
    reason = f"{type(strategy).__name__} asks for as many" if nodes > min_nodes else ""
    if kind == "train" and fraction and sampled < min_nodes:
        nodes = max(nodes, math.ceil(min_nodes / fraction) - 1)
        while int(nodes * fraction) < min_nodes:
            nodes += 1
            reason = f"fraction_train = {fraction:g} of them must be {min_nodes} nodes or more"
    return Need(nodes, reason)


def _setting(strategy: Strategy, name: str) -> float | None:
    """Return a number that a strategy, or one that it wraps, holds under this name."""
    for layer in layers(strategy):
        value = getattr(layer, name, None)
        if isinstance(value, int | float):
            return value
    return None


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy and, from the outside in, those that it wraps."""
    yield strategy
    for value in list(getattr(strategy, "__dict__", {}).values()):
        if isinstance(value, Strategy):
            yield from layers(value)


def names(strategy: Strategy) -> str:
    """Return the classes of a strategy and of those that it wraps."""
    return " > ".join(type(layer).__name__ for layer in layers(strategy))


def weight_key(strategy: Strategy) -> str | None:
    """Return the metric by which a strategy weights replies."""
    keys = (getattr(layer, "weighted_by_key", None) for layer in layers(strategy))
    return next((key for key in keys if isinstance(key, str)), None)


@contextmanager
def seeded_sampling(run_id: str, server_round: int, kind: Kind) -> Iterator[None]:
    """Make `random` repeatable inside: the same round samples the same nodes in every life of the ServerApp.

    Only for sampling: noise for differential privacy must stay unpredictable.
    """
    before = random.getstate()
    random.seed(hashlib.sha256(f"{run_id}/{server_round}/{kind}".encode()).digest())
    try:
        yield
    finally:
        random.setstate(before)


class SamplingGrid(Grid):
    """Show a strategy the nodes sorted, as they were when enough of them were found online.

    Without the snapshot a node that goes between two looks would make ``sample_nodes`` wait unseen.
    A strategy that looks again and again waits for nodes itself: it gets to see the present ones.

    Parameters
    ----------
    grid : Grid
        Does the work.
    nodes : mapping of int to str
        The snapshot.
    """

    def __init__(self, grid: Grid, nodes: Mapping[int, str]) -> None:
        self._grid = grid
        self._nodes = tuple(nodes)
        self._calls = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids, sorted."""
        self._calls += 1
        return list(self._nodes) if self._calls <= _CALLS_OF_SNAPSHOT else sorted(self._grid.get_node_ids())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes, sorted by id."""
        found = {node.node_id: node for node in self._grid.get_nodes()}
        return [found.get(node_id, NodeInfo(node_id=node_id)) for node_id in self.get_node_ids()]

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)
