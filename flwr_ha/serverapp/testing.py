"""A Grid and a clock in memory: try strategies and faults without processes and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Spoiler = Callable[[RecordDict], RecordDict | Error | None]
"""Turns a good answer into what arrives: another content, an error, or None for nothing at all."""


Work = Callable[[int, RecordDict], RecordDict]
"""What a node does: takes its partition and the content of a message, returns the content of its reply."""


class ServerDiedError(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class FakeClock:
    """Time passes only when somebody waits; what is due by then happens.

    Attributes
    ----------
    time_s : float
        Seconds since the clock was made.
    limit_s : float
        Waiting beyond it is an AssertionError: the test would never end.
    """

    def __init__(self, *, limit_s: float = 1e6) -> None:
        self.time_s = 0.0
        self.limit_s = limit_s
        self._due: list[tuple[float, Callable[[], None]]] = []

    def now_s(self) -> float:
        """Return the seconds that have passed."""
        return self.time_s

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something once that time is reached."""
        self._due.append((time_s, action))

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.time_s += seconds
        if self.time_s > self.limit_s:
            raise AssertionError(f"more than {self.limit_s:g} s were waited for")
        due = [entry for entry in self._due if entry[0] <= self.time_s]
        self._due = [entry for entry in self._due if entry[0] > self.time_s]
        for _, action in due:
            action()


@dataclass(slots=True)
class FakeNode:
    """Describe one node.

    Attributes
    ----------
    partition : int
        What it trains on.
    train_s : float
        Seconds until it answers.
    spoilers : list
        For its next replies, in order; None leaves one good.
    activation : str
        When it registered; a node that is restarted gets another one, and its work is lost.
    """

    partition: int
    train_s: float = 1.0
    spoilers: list[Spoiler | None] = field(default_factory=list)
    activation: str = "2026-11-24T00:00:00Z"


class FakeGrid(Grid):
    """Deliver messages to nodes in memory, and their replies back.

    Parameters
    ----------
    clock : FakeClock
        Decides when a reply is there.
    nodes : dict of int to FakeNode
        Those that are online, by node id.
    run_id : int
        Of the run.
    work : mapping, optional
        What a node does with a message of type ``train`` and ``evaluate``.

    Attributes
    ----------
    nodes : dict of int to FakeNode
        Those that are online; change it to let nodes come and go.
    calls : list
        Partition, message type and round of each training and evaluation.
    groups : list of str
        Group ids of the messages that were pushed.
    deaths : int or None
        Replies that are still delivered before the server dies with `ServerDiedError`.
    """

    def __init__(
        self, clock: FakeClock, nodes: dict[int, FakeNode], *, run_id: int = 7, work: Mapping[str, Work] | None = None
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        self.nodes = nodes
        self.calls: list[tuple[int, str, object]] = []
        self.groups: list[str] = []
        self.deaths: int | None = None
        self._work: dict[str, Work] = {"train": train, "evaluate": evaluate, **(work or {})}
        self._clock = clock
        self._run = Run.create_empty(run_id)
        self._run.fab_id = "tests/app"
        self._ids = count(1)
        self._pending: dict[str, tuple[int, Message, float, str]] = {}

    def set_run(self, run: Run) -> None:
        """Take another run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message, the old way."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids in an order that nobody should rely on."""
        return list(reversed(list(self.nodes)))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are online."""
        ids = self.get_node_ids()
        return [NodeInfo(node_id=node, last_activated_at=self.nodes[node].activation) for node in ids]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start the work of the nodes that are online; other messages are lost."""
        ids = []
        for message in messages:
            message_id = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = message_id
            node, due_s = message.metadata.dst_node_id, self._clock.now_s()
            if node in self.nodes:
                due_s += self.nodes[node].train_s
                self._pending[message_id] = (node, _on_the_wire(message), due_s, self.nodes[node].activation)
            self.groups.append(message.metadata.group_id)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are due."""
        replies: list[Message] = []
        for message_id in message_ids:
            if message_id not in self._pending:
                continue
            node_id, sent, due_s, activation = self._pending[message_id]
            node = self.nodes.get(node_id)
            if node is None or node.activation != activation:
                del self._pending[message_id]
            elif due_s <= self._clock.now_s():
                del self._pending[message_id]
                replies += self._answer(node, sent)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and wait for the replies."""
        ids, end_s = list(self.push_messages(messages)), self._clock.now_s() + (timeout or 1e9)
        replies: list[Message] = []
        while len(replies) < len(ids) and self._clock.now_s() < end_s:
            self._clock.wait(0.1)
            replies += self.pull_messages(ids)
        return replies

    def _answer(self, node: FakeNode, sent: Message) -> list[Message]:
        if self.deaths is not None:
            if self.deaths == 0:
                raise ServerDiedError
            self.deaths -= 1
        kind = sent.metadata.message_type
        self.calls.append((node.partition, kind, sent.content.config_records["config"].get("server-round")))
        good = self._work[kind](node.partition, sent.content)
        spoiler = node.spoilers.pop(0) if node.spoilers else None
        answer = spoiler(good) if spoiler else good
        return [] if answer is None else [_reply(answer, sent)]


def _reply(answer: RecordDict | Error, sent: Message) -> Message:
    if isinstance(answer, Error):
        return Message(answer, reply_to=sent)
    return Message(answer, reply_to=sent)


def _on_the_wire(message: Message) -> Message:
    """Return a message that does not change any more when its sender changes a record."""
    content = RecordDict(dict(message.content))
    for name, record in message.content.config_records.items():
        content[name] = ConfigRecord(dict(record))
    metadata = message.metadata
    sent = Message(content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id)
    sent.metadata.__dict__["_message_id"] = metadata.message_id
    return sent


def train(partition: int, content: RecordDict) -> RecordDict:
    """Return what a node answers: a step that depends on the partition and all that was sent."""
    config = content.config_records["config"]
    server_round, rate = int(str(config.get("server-round", 0))), float(str(config.get("rate", 0.1)))
    rng = np.random.default_rng([partition, server_round])
    arrays = ArrayRecord()
    for name, array in content.array_records["arrays"].items():
        values = array.numpy()
        step = rate * rng.normal(size=values.shape)
        arrays[name] = Array(np.asarray(0.9 * values + step, dtype=values.dtype))
    metrics = {"num-examples": 100 + partition, "train_loss": 1.0 / (1 + server_round) + 0.01 * partition}
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(dict(metrics))})


def evaluate(partition: int, content: RecordDict) -> RecordDict:
    """Return a loss that depends on every value of the model."""
    total = sum(float(np.abs(array.numpy()).sum()) for array in content.array_records["arrays"].values())
    return RecordDict({"metrics": MetricRecord({"num-examples": 100 + partition, "loss": total + partition})})


def nan(good: RecordDict) -> RecordDict:
    """Spoil: the client has diverged."""
    for arrays in good.array_records.values():
        name = next(iter(arrays))
        arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
    return good


def wrong_shape(good: RecordDict) -> RecordDict:
    """Spoil: the client has another model."""
    for arrays in good.array_records.values():
        arrays[next(iter(arrays))] = Array(np.zeros((2, 2), np.float32))
    return good


def failed(good: RecordDict) -> Error:
    """Spoil: the ClientApp raised."""
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory")


def unavailable(good: RecordDict) -> Error:
    """Spoil: the SuperLink gave the node up."""
    return Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat")


def lost(good: RecordDict) -> None:
    """Spoil: nothing arrives."""


def some_nodes(number: int, *, first_id: int = 100, train_s: float = 1.0) -> dict[int, FakeNode]:
    """Return nodes with ids from `first_id` on, each with a partition of its own."""
    return {first_id + 7 * partition: FakeNode(partition, train_s) for partition in range(number)}


def some_model() -> ArrayRecord:
    """Return a small initial model: ``weight`` (3, 4) float32 and ``bias`` (4,) float64."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=4)
    return ArrayRecord({"weight": Array(weight), "bias": Array(bias)})
