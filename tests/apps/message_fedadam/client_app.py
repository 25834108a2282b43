"""A ClientApp in Flower's Message API: adds a step that depends on the node's partition."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Add the learning rate times the number of the partition, counted from 1."""
    config = message.content["config"]
    step = float(config["learning-rate"]) * (int(context.node_config["partition-id"]) + 1)
    arrays = message.content["arrays"]
    trained = ArrayRecord({name: Array(array.numpy() + step) for name, array in arrays.items()})
    metrics = MetricRecord({"train_loss": 1.0 / int(config["server-round"]), "num-examples": 10})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)
