"""ClientApp of the benchmarks: a step of any length that changes every value."""

import os
import threading
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_ha.clientapp import replay_mod

app = ClientApp(mods=[replay_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the step."""
    threading.Event().wait(float(context.run_config["step-s"]))
    partition = int(context.node_config["partition-id"])
    if folder := os.environ.get("FLWR_HA_TEST_CALLS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / f"partition-{partition}").open("a", encoding="utf-8") as file:
            file.write(f"train {message.content['config']['server-round']}\n")
    arrays = ArrayRecord()
    for name, array in message.content["arrays"].items():
        arrays[name] = Array(np.float32(0.9) * array.numpy() + np.float32(0.01 * (partition + 1)))
    metrics = MetricRecord({"num-examples": 100 + partition, "loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return a loss."""
    total = float(sum(np.abs(array.numpy()).sum() for array in message.content["arrays"].values()))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 100, "loss": total})}), reply_to=message)
