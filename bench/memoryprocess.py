"""One round over replies that come into being when they are pulled, as from a socket; prints its memory."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flwr_ha import HighlyAvailable
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, some_nodes

LAYERS = 5  # of a fifth of the model each


class LargeGrid(FakeGrid):
    """Make each reply when it is pulled."""

    is_backwards = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep no content."""
        self.waiting: dict[str, Message] = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{message.metadata.dst_node_id}"
            self.waiting[message.metadata.message_id] = message
        return list(self.waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer what was asked; backwards: the last message first, one at a time."""
        ids = [message_id for message_id in message_ids if message_id in self.waiting]
        if self.is_backwards:
            ids = [message_id for message_id in ids if message_id == max(self.waiting)]
        return [self._reply(self.waiting.pop(message_id)) for message_id in ids]

    def _reply(self, message: Message) -> Message:
        partition = self.nodes[message.metadata.dst_node_id].partition
        rng = np.random.default_rng(partition)
        arrays = ArrayRecord()
        for name, array in message.content.array_records["arrays"].items():
            arrays[name] = Array(rng.standard_normal(array.shape, dtype=np.float32))
        metrics = MetricRecord({"num-examples": 100 + partition})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        return Message(content, reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return all replies, as Flower's own loop wants it."""
        return self.pull_messages(self.push_messages(messages))


def main() -> None:
    """Run the round."""
    folder, nodes, megabytes, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    tempfile.tempdir = str(folder)
    clock = FakeClock()
    HighlyAvailable.clock = clock
    HighlyAvailable.in_memory_bytes = min(HighlyAvailable.in_memory_bytes, megabytes * 1_000_000)
    grid = LargeGrid(clock, some_nodes(nodes))
    grid.is_backwards = kind == "ours-backwards"
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    before = _peak_bytes()
    size = megabytes * 1_000_000 // (4 * LAYERS)
    model = {f"layer{k}": Array(np.zeros(size, np.float32)) for k in range(LAYERS)}
    wrapped = strategy if kind == "plain" else HighlyAvailable(strategy, min_nodes=nodes)
    result = wrapped.start(grid=grid, initial_arrays=ArrayRecord(model), num_rounds=1)
    models = (_peak_bytes() - before) / (megabytes * 1e6)
    print(json.dumps({"models": models, "digest": result.arrays.object_id}))


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
