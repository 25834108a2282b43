"""A NumPyClient answers Message-API strategies through the mod."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from flwr_ha.clientapp import numpy_client_mod
from flwr_ha.errors import ConfigError


class Client(NumPyClient):
    def __init__(self):
        self.config = None
        self.drop = 0
        self.metrics = {"train_loss": 0.25, "steps": 3, "note": "text", "good": True}

    def fit(self, parameters, config):
        self.config = config
        return [p + 1 for p in parameters[self.drop :]], 40, self.metrics

    def evaluate(self, parameters, config):
        return 0.5, 10, {"accuracy": 0.75}


def call(client, kind="train", *, content=None):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1
    app = ClientApp(client_fn=lambda context: client.to_client(), mods=[numpy_client_mod])
    arrays = {"w": Array(np.zeros((2, 3), np.float32)), "b": Array(np.zeros(3))}
    sent = {"arrays": ArrayRecord(arrays), "config": ConfigRecord({"server-round": 2, "lr": 0.1, "name": "x"})}
    message = Message(RecordDict(sent) if content is None else content, 9, kind)
    context = Context(run_id=5, node_id=9, node_config={}, state=RecordDict(), run_config={})
    return app(message, context)


def test_training_keeps_names_dtypes_and_shapes():
    """The strategy finds what it sent, one step on; texts are no metrics."""
    client = Client()
    reply = call(client)
    arrays = reply.content["arrays"]
    assert [(name, a.dtype, a.shape) for name, a in arrays.items()] == [
        ("w", "float32", (2, 3)),
        ("b", "float64", (3,)),
    ]
    assert arrays["w"].numpy().tolist() == np.ones((2, 3)).tolist()
    assert dict(reply.content["metrics"]) == {"train_loss": 0.25, "steps": 3, "good": 1, "num-examples": 40}
    assert client.config == {"server-round": 2, "lr": 0.1, "name": "x"}


def test_evaluation_gives_loss_and_metrics():
    """As FedAvg wants them."""
    reply = call(Client(), "evaluate")
    assert dict(reply.content["metrics"]) == {"loss": 0.5, "accuracy": 0.75, "num-examples": 10}
    assert len(reply.content.array_records) == 0


def test_other_record_names_are_kept():
    """A strategy may call its records anything, and send no configuration."""
    content = RecordDict({"model": ArrayRecord([np.zeros(2)])})
    assert list(call(Client(), content=content).content["model"]) == ["0"]


def test_a_wrong_number_of_arrays_is_named():
    """A client that returns half a model is an error, not a silent mix-up."""
    client = Client()
    client.drop = 1
    with pytest.raises(ConfigError, match=r"fit\(\) returned 1 arrays, 2 were sent"):
        call(client)


def test_two_models_in_one_message_are_refused():
    """A NumPyClient cannot know which one is meant."""
    content = RecordDict({"a": ArrayRecord([np.zeros(2)]), "b": ArrayRecord([np.zeros(2)])})
    with pytest.raises(ConfigError, match="holds 2 ArrayRecords"):
        call(Client(), content=content)
