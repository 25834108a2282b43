"""A Grid in memory whose nodes train deterministically, and fail on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Behaviour = Callable[[Message, RecordDict], RecordDict | Error | None]


class FakeClock:
    """Time passes only when somebody waits; what is due then happens."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def now_s(self) -> float:
        return self.time_s

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self.due.append((time_s, action))

    def wait(self, seconds: float) -> None:
        self.time_s += seconds
        if self.time_s > 1e6:
            raise AssertionError("the test waits for ever")
        for entry in [entry for entry in self.due if entry[0] <= self.time_s]:
            self.due.remove(entry)
            entry[1]()


@dataclass
class FakeNode:
    """One node: what it holds, how long it trains, and how it spoils its next replies."""

    partition: int
    train_s: float = 1.0
    spoil: list[Behaviour | None] = field(default_factory=list)
    activation: str = "2026-11-24T00:00:00Z"


class FakeGrid(Grid):
    """Deliver messages to nodes and their replies back."""

    def __init__(self, clock: FakeClock, nodes: dict[int, FakeNode], *, run_id: int = 7) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        self.clock = clock
        self.nodes = nodes
        self.trainings: list[tuple[int, str, Any]] = []  # partition, message type, round
        self.groups: list[str] = []
        self.die_after: int | None = None  # replies pulled before the server dies
        self._run = Run.create_empty(run_id)
        self._run.fab_id = "tests/app"
        self._ids = count(1)
        self._pending: dict[str, tuple[int, Message, float, str]] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return reversed(list(self.nodes))

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=i, last_activated_at=self.nodes[i].activation) for i in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = str(next(self._ids))
            node = message.metadata.dst_node_id
            content = RecordDict(dict(message.content))  # what is on the wire does not change any more
            for name, record in message.content.config_records.items():
                content[name] = type(record)(dict(record))
            sent = Message(content, node, message.metadata.message_type, group_id=message.metadata.group_id)
            sent.metadata.__dict__["_message_id"] = message_id
            if node in self.nodes:
                due_s = self.clock.now_s() + self.nodes[node].train_s
                self._pending[message_id] = (node, sent, due_s, self.nodes[node].activation)
            self.groups.append(message.metadata.group_id)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            if message_id not in self._pending:
                continue
            node, sent, due_s, activation = self._pending[message_id]
            if node not in self.nodes or self.nodes[node].activation != activation:
                del self._pending[message_id]  # lost with the node
            elif due_s <= self.clock.now_s():
                del self._pending[message_id]
                replies += self._answer(self.nodes[node], sent)
        return replies

    def _answer(self, node: FakeNode, sent: Message) -> list[Message]:
        kind = sent.metadata.message_type
        self.trainings.append((node.partition, kind, sent.content["config"].get("server-round")))
        good = (train if kind == "train" else evaluate)(node.partition, sent.content)
        spoil = node.spoil.pop(0) if node.spoil else None
        answer = spoil(sent, good) if spoil else good
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                raise ServerDiedError
        return [] if answer is None else [Message(answer, reply_to=sent)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("HighlyAvailable polls itself")


class ServerDiedError(BaseException):
    """Stands for SIGKILL."""


def train(partition: int, content: RecordDict) -> RecordDict:
    """Return what a node answers: a step that depends on all that was sent."""
    config = content["config"]
    server_round, rate = int(config.get("server-round", 0)), float(config.get("rate", 0.1))
    rng = np.random.default_rng([partition, server_round])
    arrays = {
        name: Array((a := array.numpy()) * np.float32(0.9) + (rate * rng.normal(size=a.shape)).astype(a.dtype))
        for name, array in content["arrays"].items()
    }
    metrics = {"num-examples": 100 + partition, "train_loss": 1.0 / (1 + server_round) + 0.01 * partition}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})


def evaluate(partition: int, content: RecordDict) -> RecordDict:
    """Return the loss of a node's evaluation."""
    total = sum(float(np.abs(array.numpy()).sum()) for array in content["arrays"].values())
    return RecordDict({"metrics": MetricRecord({"num-examples": 100 + partition, "loss": total + partition})})


def nan(sent: Message, good: RecordDict) -> RecordDict:
    """Spoil: a diverged client."""
    name = next(iter(good["arrays"]))
    good["arrays"][name] = Array(np.full_like(good["arrays"][name].numpy(), np.nan))
    return good


def wrong_shape(sent: Message, good: RecordDict) -> RecordDict:
    """Spoil: an old client with another model."""
    good["arrays"]["weight"] = Array(np.zeros((2, 2), np.float32))
    return good


def failed(sent: Message, good: RecordDict) -> Error:
    """Spoil: the ClientApp raised."""
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory")


def lost(sent: Message, good: RecordDict) -> None:
    """Spoil: no reply at all."""


def nodes(number: int, *, first_id: int = 100, train_s: float = 1.0) -> dict[int, FakeNode]:
    """Return nodes with ids from `first_id` on, one partition each."""
    return {first_id + 7 * partition: FakeNode(partition, train_s) for partition in range(number)}


def model() -> ArrayRecord:
    """Return a small initial model."""
    rng = np.random.default_rng(0)
    arrays = {"weight": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float64)}
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})
