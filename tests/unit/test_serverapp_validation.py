"""Which replies are rejected, and with which sentence."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flwr_ha.serverapp.arrays import canonical, pack, unpack, view
from flwr_ha.serverapp.validation import expect, why_rejected


def arrays(**values):
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def sent():
    weight, bias = np.ones((2, 3), np.float32), np.ones(3)
    return RecordDict({"arrays": arrays(weight=weight, bias=bias), "config": ConfigRecord({"lr": 0.1})})


def why(content, *, is_train=True, sent=None):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    asked = sent or globals()["sent"]()
    instruction = Message(asked, 12, "train" if is_train else "evaluate")
    reply = Message(content, reply_to=instruction)
    return why_rejected(reply, expect(asked, same_arrays=is_train, weight_key="num-examples"), node=12)


def good(**changes):
    values = {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(3), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    return RecordDict({"arrays": arrays(**values), "metrics": MetricRecord({"num-examples": 5})})


def test_a_good_reply_is_taken():
    """Same names, dtypes and shapes, finite, with a weight."""
    assert why(good()) is None


def test_another_precision_is_taken():
    """FedAdam sends float64 from the second round on, and a float32 model answers in float32."""
    assert why(good(bias=np.zeros(3, np.float32))) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight": None}, "node 12: array 'weight' is missing"),
        ({"more": np.zeros(1)}, "node 12: array 'more' was not asked for"),
        ({"weight": np.zeros((3, 2), np.float32)}, "node 12: array 'weight' is float32 (3, 2), not float32 (2, 3)"),
        ({"weight": np.zeros((2, 3), "c8")}, "node 12: array 'weight' is complex64 (2, 3), not float32 (2, 3)"),
        ({"bias": np.array([0, np.nan, 0])}, "node 12: array 'bias' holds NaN or infinite values"),
        ({"bias": np.array([0, np.inf, 0])}, "node 12: array 'bias' holds NaN or infinite values"),
    ],
)
def test_arrays_of_another_form_are_rejected(changes, sentence):
    """The sentence names the node and the array."""
    assert why(good(**changes)) == sentence


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), [1]])
def test_a_weight_must_be_a_number_from_0(weight):
    """One below 0 or NaN would spoil the average of all."""
    content = good()
    content["metrics"] = MetricRecord({"num-examples": weight})
    assert "'num-examples' is" in why(content)


def test_a_missing_weight_is_rejected():
    """Flower's strategies would end the run."""
    content = good()
    content["metrics"] = MetricRecord({"loss": 1.0})
    assert why(content) == "node 12: the metric 'num-examples' is missing"


def test_an_error_reply_is_rejected_with_its_reason():
    """The sentence says what the ClientApp said."""
    assert why(Error(2, "out of memory")) == "node 12: error 2: out of memory"


def test_a_reply_without_arrays_is_rejected():
    """Training must return a model."""
    assert why(RecordDict({"metrics": MetricRecord({"num-examples": 5})})).endswith("0 array records, not one")


def test_an_evaluation_needs_no_arrays():
    """Metrics are enough."""
    assert why(RecordDict({"metrics": MetricRecord({"num-examples": 5})}), is_train=False) is None


@pytest.mark.parametrize("cut", [4, 20, -1])
def test_bytes_that_are_no_array_are_rejected(cut):
    """A hostile or broken client cannot make the aggregation raise."""
    content = good()
    array = content["arrays"]["bias"]
    content["arrays"]["bias"] = Array(array.dtype, array.shape, array.stype, array.data[:cut])
    assert "array 'bias' cannot be read" in why(content)


def test_what_an_array_says_of_itself_is_not_believed():
    """The form is read from the bytes, as the aggregation does."""
    content = good()
    wrong = Array(np.zeros(7))
    content["arrays"]["bias"] = Array("float64", (3,), wrong.stype, wrong.data)
    assert why(content) == "node 12: array 'bias' is float64 (7,), not float64 (3,)"


def test_serialized_models_may_grow():
    """XGBoost models travel as flat bytes of any length."""
    asked = RecordDict({"arrays": arrays(**{"0": np.zeros(10, np.uint8)}), "config": ConfigRecord()})
    content = RecordDict(
        {"arrays": arrays(**{"0": np.zeros(99, np.uint8)}), "metrics": MetricRecord({"num-examples": 5})}
    )
    assert why(content, sent=asked) is None


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 3)),
        np.asarray(3.5),
        np.arange(3, dtype=">i4"),
        np.array(["a", "bc"]),
        np.array([1 + 2j]),
        np.arange(12)[::2],
    ],
)
def test_views_and_canonical_records_keep_every_value(values):
    """No copy, any layout; the canonical form is stable and equal."""
    record = ArrayRecord({"a": Array(values)})
    found = view(record["a"])
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)
    once = canonical(record)
    assert canonical(once) is once
    assert unpack(*pack(once)).object_id == once.object_id
    assert np.array_equal(once["a"].numpy(), values)
    assert once["a"].numpy().flags.c_contiguous


def test_arrays_of_another_serialization_survive():
    """Only their bytes are known; they come back under their own description."""
    record = ArrayRecord({"t": Array("custom", (1, 2), "my.format", b"\x01\x02\x03")})
    back = unpack(*pack(record))
    assert (back["t"].dtype, back["t"].shape, back["t"].stype, back["t"].data) == (
        "custom",
        (1, 2),
        "my.format",
        b"\x01\x02\x03",
    )
