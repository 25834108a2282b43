"""What users test their own strategies with."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from flwr_ha.testing import NotResumableError, check_resume


class Remembering(FedAvg):
    """Adds a momentum that is kept in `velocity`."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.make_memory()

    def make_memory(self) -> object:
        return {"steps": 0}

    def count(self) -> int:
        self.memory["steps"] += 1
        return self.memory["steps"]

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            scale = 1.0 / self.count()
            arrays = ArrayRecord({name: Array(array.numpy() * scale) for name, array in arrays.items()})
        return arrays, metrics


class Counter:
    """A state that is no plain value."""

    steps = 0


class Forgetful(Remembering):
    """Keeps its state in an object that nobody can look into."""

    def make_memory(self) -> object:
        return Counter()

    def count(self) -> int:
        self.memory.steps += 1
        return self.memory.steps


class Careful(Forgetful):
    """The same, and says what its state is."""

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.memory.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.memory.steps = int(state["steps"])


@pytest.mark.parametrize("make_strategy", [FedAvg, FedAdam, Remembering, Careful])
def test_a_strategy_that_resumes_passes(make_strategy):
    result = check_resume(make_strategy)

    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]


def test_a_strategy_that_forgets_is_found_out():
    """The message says after which death, and what differs."""
    with pytest.raises(NotResumableError, match=r"died after reply \d+ of 18 .* other values"):
        check_resume(Forgetful)


def test_arrays_and_work_of_the_users_own():
    """Each node is given its partition and what was sent."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def train(partition: int, content: RecordDict) -> RecordDict:
        values = content.array_records["arrays"]["w"].numpy()
        seen.append((partition, values.shape))
        arrays = ArrayRecord({"w": Array(values + partition)})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})

    model = ArrayRecord({"w": Array(np.zeros(5))})
    result = check_resume(FedAvg, initial_arrays=model, num_rounds=2, num_nodes=4, train=train)

    np.testing.assert_array_equal(result.arrays["w"].numpy(), np.full(5, 2 * 1.5))
    np.testing.assert_array_equal(model["w"].numpy(), np.zeros(5))
    assert set(seen) == {(partition, (5,)) for partition in range(4)}


def test_the_server_dies_before_each_reply():
    """2 rounds of training and evaluation with 2 nodes are 8 replies: 8 deaths, 8 resumed lives, 1 undisturbed one."""
    lives = []

    def make_strategy() -> FedAvg:
        lives.append(1)
        return FedAvg()

    check_resume(make_strategy, num_rounds=2, num_nodes=2)

    assert len(lives) == 1 + 8 + 8


def test_a_metric_that_is_nan_is_no_difference():
    """A loss that is not defined is so in both trainings."""

    class Undefined(FedAvg):
        """Its metric is NaN."""

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            if metrics is not None:
                metrics["undefined"] = float("nan")
            return arrays, metrics

    result = check_resume(Undefined, num_rounds=2)
    assert "undefined" in result.train_metrics_clientapp[2]
