"""The fast average: Flower's bits for every dtype and layout, in memory and from disk."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, MultiKrum, fedavg, multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.task_identity import TaskIdentity

from flwr_ha import HighlyAvailable
from flwr_ha.serverapp.aggregation import fast_averages, weighted_average
from flwr_ha.serverapp.spill import Spill, SpilledArray
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, some_model, some_nodes

KEY = "num-examples"
DTYPES = ["f2", "f4", "f8", ">f4", "i1", "u1", "i4", "i8", "?", "c8"]


def replies(values: list[dict[str, np.ndarray]]) -> list[RecordDict]:
    """Return contents of replies with different weights."""
    weights = [3, 1000, 17, 0.3, 41]
    return [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
                "metrics": MetricRecord({KEY: weights[index % 5], "loss": 0.5}),
            }
        )
        for index, arrays in enumerate(values)
    ]


def spilled(records: list[RecordDict], folder: Path) -> list[RecordDict]:
    """Return the same contents, their arrays on disk."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    spill = Spill(folder)
    for record in records:
        spill.keep(Message(record, 1, "train"))
    return records


def numbers(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(100 * rng.normal(size=shape)).astype(dtype)


def assert_same(got: ArrayRecord, wanted: ArrayRecord) -> None:
    """Names, dtypes, shapes, and the very bytes that numpy wrote."""
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].data == array.data, name
    assert got.object_id == wanted.object_id


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (150_001,), (40, 1, 5000)])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_average_has_the_bits_of_flower(dtype, shape, tmp_path):
    """Five replies, more than one part and block each, in memory and from disk."""
    values = [{"a": numbers(dtype, shape, seed), "b": numbers("f4", (7,), seed)} for seed in range(5)]
    wanted = aggregate_arrayrecords(replies(values), KEY)

    assert_same(weighted_average(replies(values), KEY), wanted)
    assert_same(weighted_average(spilled(replies(values), tmp_path), KEY), wanted)


@pytest.mark.parametrize(
    "arrays",
    [
        [np.asfortranarray(numbers("f4", (300, 400), seed)) for seed in range(3)],
        [numbers("f4", (300, 400), 0), np.asfortranarray(numbers("f4", (300, 400), 1)), numbers("f4", (300, 400), 2)],
        [numbers("f8", (70_000,), 0), numbers("f4", (70_000,), 1), numbers("f2", (70_000,), 2)],
        [numbers("f4", (300, 400), 0), numbers("f4", (400,), 1), numbers("f4", (1,), 2)],
    ],
    ids=["fortran", "one-fortran", "narrower-later", "broadcast"],
)
def test_average_of_unlike_arrays_has_the_bits_of_flower(arrays, tmp_path):
    """Layouts, precisions and shapes that differ go the way of Flower."""
    values = [{"a": array} for array in arrays]
    wanted = aggregate_arrayrecords(replies(values), KEY)

    assert_same(weighted_average(replies(values), KEY), wanted)
    assert_same(weighted_average(spilled(replies(values), tmp_path), KEY), wanted)


def test_arrays_that_flower_refuses_are_refused():
    """Shapes that do not fit are an error, not a wrong model."""
    values = [{"a": np.zeros(4, np.float32)}, {"a": np.zeros(5, np.float32)}]

    with pytest.raises(ValueError, match="broadcast"):
        aggregate_arrayrecords(replies(values), KEY)
    with pytest.raises(ValueError, match="broadcast"):
        weighted_average(replies(values), KEY)


def test_average_takes_one_model_of_memory():
    """The result and a few blocks: Flower takes two models more."""
    size = 4_000_000
    records = replies([{"a": numbers("f4", (size,), seed)} for seed in range(3)])
    tracemalloc.start()
    try:
        result = weighted_average(records, KEY)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert len(result["a"].data) > 4 * size
    assert peak_bytes < 1.1 * 4 * size


def test_strategies_use_the_fast_average_inside_only():
    """Both of Flower's modules that call the function get ours; afterwards it is theirs again."""
    with fast_averages():
        assert fedavg.aggregate_arrayrecords is multikrum.aggregate_arrayrecords is weighted_average
    assert fedavg.aggregate_arrayrecords is multikrum.aggregate_arrayrecords is aggregate_arrayrecords


def test_average_that_somebody_has_replaced_stays(monkeypatch):
    """A project that patches Flower itself keeps its own function."""
    own = lambda records, key: ArrayRecord()  # noqa: E731
    monkeypatch.setattr(fedavg, "aggregate_arrayrecords", own)

    with fast_averages():
        assert fedavg.aggregate_arrayrecords is own
    assert fedavg.aggregate_arrayrecords is own


def test_training_averages_fast(monkeypatch):
    """HighlyAvailable is what brings it in: Flower's function is not called."""
    clock = FakeClock(limit_s=1e4)
    monkeypatch.setattr(HighlyAvailable, "clock", clock)
    calls = []
    monkeypatch.setattr(
        "flwr_ha.serverapp.aggregation.weighted_average",
        lambda records, key: calls.append(len(records)) or aggregate_arrayrecords(records, key),
    )
    HighlyAvailable(FedAvg(), min_nodes=3).start(FakeGrid(clock, some_nodes(3)), some_model(), num_rounds=2)

    assert calls == [3, 3]


def test_spilled_array_is_an_array(tmp_path):
    """Whoever gets it can read, hash, copy and change it as one in memory."""
    values = numbers("f4", (200, 500), 1)
    (record,) = spilled(replies([{"a": values}]), tmp_path)
    array = record.array_records["arrays"]["a"]

    assert isinstance(array, SpilledArray)
    assert list(tmp_path.iterdir()) == [], "the file has no name: nothing is left after a kill"
    assert record.object_id == replies([{"a": values}])[0].object_id
    np.testing.assert_array_equal(copy.deepcopy(array).numpy(), values)
    assert array.deflate() == Array(values).deflate()
    array.data = Array(2 * values).data
    np.testing.assert_array_equal(array.numpy(), 2 * values)
    assert array.object_id == Array(2 * values).object_id
    assert_same(weighted_average([record], KEY), ArrayRecord({"a": Array(2 * values)}))


def test_reply_stays_in_memory_when_the_disk_refuses(tmp_path, caplog):
    """A full or missing disk costs memory, not the round."""
    values = [{"a": numbers("f4", (80_000,), seed)} for seed in range(2)]
    records = spilled(replies(values), tmp_path / "missing")

    assert not any(isinstance(record.array_records["arrays"]["a"], SpilledArray) for record in records)
    assert caplog.text.count("the disk refuses them") == 1
    assert_same(weighted_average(records, KEY), aggregate_arrayrecords(replies(values), KEY))


class WatchedGrid(FakeGrid):
    """Notes how many replies are asked for at once."""

    def pull_messages(self, message_ids):
        self.largest = max(getattr(self, "largest", 0), len(list(message_ids)))
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam, FedMedian, lambda: MultiKrum(num_nodes_to_select=2)])
def test_big_replies_are_pulled_one_by_one_and_give_the_same_model(monkeypatch, strategy):
    """What waits on disk is averaged to the same bits, whatever the order of arrival."""
    monkeypatch.setattr("flwr_ha.serverapp.spill._SMALLEST_BYTES", 1)
    monkeypatch.setattr("flwr_ha.serverapp.gather.GROUP_BYTES", 1)
    seen = []
    digests = []
    for in_memory_bytes, slow in [(10**9, 0), (0, 0), (0, 1), (0, 2)]:
        clock = FakeClock(limit_s=1e4)
        monkeypatch.setattr(HighlyAvailable, "clock", clock)
        monkeypatch.setattr(HighlyAvailable, "in_memory_bytes", in_memory_bytes)
        nodes = some_nodes(3)
        list(nodes.values())[slow].train_s = 50.0
        grid = WatchedGrid(clock, nodes)
        ha = HighlyAvailable(strategy(), min_nodes=3)
        result = ha.start(grid, some_model(), num_rounds=2)
        digests.append(result.arrays.object_id)
        seen.append(grid.largest)

    assert len(set(digests)) == 1
    assert seen[0] == 3
