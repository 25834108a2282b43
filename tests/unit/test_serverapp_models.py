"""Models and clients less plain than a small CNN: what plain Flower trains is trained here, to equal values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, Result, Strategy
from numpy.typing import NDArray

from flwr_ha import HighlyAvailable
from flwr_ha.errors import NotEnoughNodesError
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, failed, some_nodes
from flwr_ha.testing import check_resume

NODES, ROUNDS = 3, 3
Train = Callable[[int, RecordDict], RecordDict]


def record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def reply(arrays: Mapping[str, NDArray[Any]], examples: int) -> RecordDict:
    return RecordDict({"arrays": record(arrays), "metrics": MetricRecord({"num-examples": examples})})


def batch_norm(partition: int, content: RecordDict) -> RecordDict:
    """Do as PyTorch: weights are float32 and the counter is int64 in each reply, whatever was sent."""
    sent = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    trained = {"weight": (sent["weight"] * 0.9).astype(np.float32), "mask": sent["mask"].astype(bool)}
    return reply({**trained, "batches": np.asarray(int(sent["batches"]) + 10 + partition)}, 10 + partition)


BATCH_NORM = {"weight": np.ones(3, np.float32), "batches": np.asarray(0), "mask": np.array([True, False])}


def unchanged(partition: int, content: RecordDict) -> RecordDict:
    """Send back what came."""
    return reply({name: array.numpy() for name, array in content.array_records["arrays"].items()}, 10 + partition)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Let time pass only when somebody waits."""
    made = FakeClock()
    monkeypatch.setattr(HighlyAvailable, "clock", made)
    return made


@pytest.fixture
def grid(clock: FakeClock) -> Callable[..., FakeGrid]:
    """Return a function that makes a grid whose nodes work as told."""
    return lambda **work: FakeGrid(clock, some_nodes(NODES), work=work)


def started(strategy: Strategy, grid: FakeGrid, arrays: Mapping[str, NDArray[Any]], **options: Any) -> Result:
    return strategy.start(grid, record(arrays), num_rounds=options.pop("num_rounds", ROUNDS), **options)


@pytest.mark.parametrize("make", [FedAvg, FedAdam, FedAvgM, FedMedian])
def test_model_with_counters_and_masks_is_trained_as_by_plain_flower(make: type[FedAvg], grid: Any) -> None:
    """The average of whole numbers is no whole number: clients are sent float64 and answer with int64."""
    plain = started(make(fraction_evaluate=0.0), grid(train=batch_norm), BATCH_NORM)
    ours = started(HighlyAvailable(make(fraction_evaluate=0.0), min_nodes=NODES), grid(train=batch_norm), BATCH_NORM)
    for name, array in plain.arrays.items():
        assert ours.arrays[name].dtype == array.dtype
        np.testing.assert_allclose(ours.arrays[name].numpy(), array.numpy(), rtol=1e-6)


def test_mask_of_minus_infinities_is_kept(grid: Any) -> None:
    """Only what was finite when it was sent has to be finite in a reply."""
    model = {"weight": np.ones(3, np.float32), "mask": np.triu(np.full((2, 2), -np.inf, np.float32), 1)}
    result = started(HighlyAvailable(FedAvg(fraction_evaluate=0.0), min_nodes=NODES), grid(train=unchanged), model)
    assert result.arrays["mask"].numpy().tolist() == [[0.0, -np.inf], [0.0, 0.0]]


def test_client_without_examples_weighs_nothing(grid: Any) -> None:
    """A node whose split is empty answers, too, as in plain Flower."""

    def evaluate(partition: int, content: RecordDict) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({"num-examples": partition, "loss": float(partition)})})

    work = {"train": unchanged, "evaluate": evaluate}
    model = {"weight": np.ones(3, np.float32)}
    plain = started(FedAvg(), grid(**work), model)
    ours = started(HighlyAvailable(FedAvg(), min_nodes=NODES), grid(**work), model)
    assert dict(ours.evaluate_metrics_clientapp[1]) == dict(plain.evaluate_metrics_clientapp[1])


def test_clients_that_all_have_no_examples_make_no_round(grid: Any) -> None:
    """Their average would be a division by zero."""

    def weightless(partition: int, content: RecordDict) -> RecordDict:
        done = unchanged(partition, content)
        done["metrics"] = MetricRecord({"num-examples": 0})
        return done

    strategy = HighlyAvailable(FedAvg(fraction_evaluate=0.0), min_nodes=NODES)
    with pytest.raises(NotEnoughNodesError, match="the metric 'num-examples' is 0 in all of them"):
        started(strategy, grid(train=weightless), {"weight": np.ones(3, np.float32)})


class Growing(FedAvg):
    """Adds an array to the model in each round."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        arrays[f"layer{server_round}"] = Array(np.full(2, server_round, np.float32))
        return arrays, metrics


def test_model_that_grows_goes_on_after_a_failover(grid: Any, tmp_path: Path) -> None:
    """The arrays that the run began with are compared with the initial ones, not the present ones."""
    model = {"weight": np.ones(3, np.float32)}

    def strategy() -> HighlyAvailable:
        return HighlyAvailable(Growing(fraction_evaluate=0.0), min_nodes=NODES, checkpoint_dir=tmp_path)

    class StopError(Exception):
        """Ends the first life."""

    def stop_after_two(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 3:
            raise StopError
        return MetricRecord({"arrays": len(arrays)})

    with pytest.raises(StopError):
        started(strategy(), grid(train=unchanged), model, evaluate_fn=stop_after_two)
    result = started(strategy(), grid(train=unchanged), model)
    assert list(result.arrays) == ["weight", "layer1", "layer2", "layer3"]
    assert dict(result.evaluate_metrics_serverapp[2]) == {"arrays": 3}


def test_numpy_scalars_of_the_servers_evaluation_are_kept(grid: Any, tmp_path: Path) -> None:
    """`evaluate_fn` returns what a metrics library gives; Flower takes it, and JSON must."""
    strategy = HighlyAvailable(FedAvg(fraction_evaluate=0.0), min_nodes=NODES, checkpoint_dir=tmp_path)
    result = started(
        strategy,
        grid(train=unchanged),
        {"weight": np.ones(3, np.float32)},
        evaluate_fn=lambda server_round, arrays: {"accuracy": np.float32(0.5)},
    )
    assert dict(result.evaluate_metrics_serverapp[ROUNDS]) == {"accuracy": 0.5}


class Counting(FedAvg):
    """Keeps what every strategy's author may reach for."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.seen: defaultdict[str, int] = defaultdict(int)

    def aggregate_train(self, server_round, replies):
        self.seen[f"round-{server_round}"] += 1
        return super().aggregate_train(server_round, replies)


def test_defaultdict_is_one_after_an_attempt_that_was_undone(grid: Any) -> None:
    """One reply that failed undoes the attempt; the strategy must not notice."""
    inner, nodes = Counting(), grid(train=unchanged)
    next(iter(nodes.nodes.values())).spoilers = [failed]
    started(HighlyAvailable(inner, min_nodes=NODES), nodes, {"weight": np.ones(3, np.float32)})
    assert inner.seen == {"round-1": 1, "round-2": 1, "round-3": 1}
    assert inner.seen["round-9"] == 0


class Adapters(FedAvg):
    """Average adapters alone, and put them into a model that the clients send nothing else of."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
        self.arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
        averaged, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({**self.arrays, **(averaged or {})}), metrics


def adapter(partition: int, content: RecordDict) -> RecordDict:
    """Train and send back one array of the model, and what the server has never seen."""
    sent = content.array_records["arrays"]["adapter"].numpy()
    return reply({"adapter": sent * 0.9 + partition, "rank": np.asarray(float(partition))}, 10 + partition)


ADAPTED = {"base": np.ones(5, np.float32), "adapter": np.zeros(3, np.float32)}


def test_clients_that_send_other_arrays_on_purpose_are_trained_as_by_plain_flower(grid: Any) -> None:
    """Adapters, compressed updates: the strategy knows what to do with them."""
    plain = started(Adapters(fraction_evaluate=0.0), grid(train=adapter), ADAPTED)
    wrapped = HighlyAvailable(Adapters(fraction_evaluate=0.0), min_nodes=NODES, same_arrays=False)
    ours = started(wrapped, grid(train=adapter), ADAPTED)
    assert set(ours.arrays) == set(plain.arrays) == {"base", "adapter", "rank"}
    check_resume(
        lambda: Adapters(fraction_evaluate=0.0), initial_arrays=record(ADAPTED), train=adapter, same_arrays=False
    )
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(ours.arrays[name].numpy(), array.numpy(), rtol=1e-6)


def test_clients_that_send_other_arrays_are_rejected_where_nobody_allows_it(grid: Any) -> None:
    """A client of another version would otherwise spoil the model."""
    wrapped = HighlyAvailable(Adapters(fraction_evaluate=0.0), min_nodes=NODES)
    with pytest.raises(NotEnoughNodesError, match="'base' is missing"):
        started(wrapped, grid(train=adapter), ADAPTED)


def test_garbage_is_rejected_whatever_its_form(grid: Any) -> None:
    """Any form is no licence for NaN."""

    def broken(partition: int, content: RecordDict) -> RecordDict:
        return reply({"adapter": np.full(3, np.nan if partition == 1 else 1.0, np.float32)}, 10)

    wrapped = HighlyAvailable(Adapters(fraction_evaluate=0.0), min_nodes=NODES, same_arrays=False)
    with pytest.raises(NotEnoughNodesError, match="holds NaN or infinite values"):
        started(wrapped, grid(train=broken), ADAPTED)
