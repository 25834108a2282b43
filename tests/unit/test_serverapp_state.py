"""What a strategy remembers comes back exactly, through JSON."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedXgbBagging,
    FedXgbCyclic,
)

from flwr_ha.errors import CheckpointCorruptError, ConfigError
from flwr_ha.serverapp.state import Memory, State, capture, restore


class Remembering(FedAvg):
    """A strategy with attributes of all kinds."""


def memory(strategy, **config):
    return Memory(strategy, ConfigRecord(config), ConfigRecord())


def through_json(state: State) -> State:
    """Return the state as a checkpoint gives it back: parsed JSON, read-only arrays."""
    arrays = {
        name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) if a.size else a for name, a in state.arrays.items()
    }
    return State(json.loads(json.dumps(state.plain)), arrays)


def moved(strategy, fresh, **config):
    """Capture from one, restore into another."""
    before, after = memory(strategy, **config), memory(fresh)
    restore(after, through_json(capture(before, is_copied=False)))
    return after


VALUES = {
    "none": None,
    "flag": True,
    "number": 3,
    "big": 2**70,
    "real": 0.1 + 0.2,
    "infinite": float("inf"),
    "text": "ümläut",
    "bytes": b"\x00\xff",
    "empty_bytes": b"",
    "list": [1, [2.5, "a"], None],
    "tuple": (1, (2, 3)),
    "int_keys": {3: "c", 1: "a"},
    "nested": {"a": {"b": [np.arange(3), {"c": 1}]}},
    "set": {3, 1, 2},
    "dollar": {"$": "array", "value": "no tag"},
    "scalar": np.float32(1.5),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.zeros((0, 2)),
    "zero_d": np.asarray(2.5),
    "arrays": [np.ones(2), np.zeros(3, np.int64)],
    "dotted": {"a.b": np.ones(1), "a": {"b": np.zeros(1)}},
    "metrics": MetricRecord({"loss": 0.5, "counts": [1, 2]}),
    "config": ConfigRecord({"name": "x", "raw": b"\x01", "flags": [True, False]}),
}


def assert_equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, np.ndarray | np.generic):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", list(VALUES))
def test_every_kind_of_value_comes_back_exactly(name):
    """Types, dtypes, key order and float bits are kept."""
    strategy = Remembering()
    strategy.it = VALUES[name]
    assert_equal(moved(strategy, Remembering()).strategy.it, VALUES[name])


def test_array_records_come_back_with_the_same_hash():
    """A client's cache depends on it."""
    strategy = Remembering()
    strategy.it = ArrayRecord({"w": Array(np.ones((2, 2), np.float32)), "b": Array(np.zeros(2))})
    found = moved(strategy, Remembering()).strategy.it
    assert found.object_id == strategy.it.object_id


def test_restored_arrays_can_be_changed_in_place():
    """A checkpoint's arrays are read-only views; a strategy may write."""
    strategy = Remembering()
    strategy.it = np.zeros(3)
    found = moved(strategy, Remembering()).strategy.it
    found += 1
    assert found.tolist() == [1, 1, 1]


def test_random_generators_go_on_where_they_were():
    """Custom sampling stays the same over a failover."""
    strategy, fresh = Remembering(), Remembering()
    strategy.rng, strategy.plain_rng = np.random.default_rng(1), random.Random(1)
    fresh.rng, fresh.plain_rng = np.random.default_rng(2), random.Random(2)
    strategy.rng.random(5), strategy.plain_rng.random()
    after = moved(strategy, fresh).strategy
    assert after.rng.random() == strategy.rng.random()
    assert after.plain_rng.random() == strategy.plain_rng.random()


def test_wrapped_strategies_are_remembered_too():
    """Differential privacy wraps the strategy that holds the moments."""

    def wrapped():
        return DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(), 0.1, 2)

    strategy = wrapped()
    strategy.clipping_norm = 0.7
    strategy.strategy.m_t = {"w": np.ones(2)}
    fresh = wrapped()
    inner = fresh.strategy
    after = moved(strategy, fresh).strategy
    assert after.strategy is inner
    assert after.clipping_norm == 0.7
    assert_equal(inner.m_t, {"w": np.ones(2)})


def test_xgboost_strategies_are_remembered():
    """Boosted trees are bytes, node numbers are dict keys."""
    bagging, cyclic = FedXgbBagging(), FedXgbCyclic()
    bagging.current_bst, cyclic.registered_nodes = b'{"learner": {}}', {2**63: 1, 5: 2}
    assert moved(bagging, FedXgbBagging()).strategy.current_bst == b'{"learner": {}}'
    assert moved(cyclic, FedXgbCyclic()).strategy.registered_nodes == {2**63: 1, 5: 2}


class Accountant:
    """As Flower's privacy accountants: state_dict and load_state_dict."""

    def __init__(self):
        self.releases = 0

    def state_dict(self):
        return {"releases": self.releases}

    def load_state_dict(self, state):
        self.releases = state["releases"]


def test_objects_with_a_state_dict_are_loaded_in_place():
    """The privacy that was spent is not forgotten."""
    strategy, fresh = (DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2) for _ in range(2))
    strategy.accountant, fresh.accountant = Accountant(), Accountant()
    strategy.accountant.releases = 4
    kept = fresh.accountant
    after = moved(strategy, fresh).strategy
    assert after.accountant is kept
    assert kept.releases == 4


class OwnState(FedAvg):
    """Keeps what it wants, and nothing else."""

    def __init__(self):
        super().__init__()
        self.momentum, self.noise = None, 1

    def state_dict(self):
        return {"momentum": self.momentum}

    def load_state_dict(self, state):
        self.momentum = state["momentum"]


def test_a_strategys_own_state_dict_wins():
    """What it leaves out is left alone."""
    strategy, fresh = OwnState(), OwnState()
    strategy.momentum, strategy.noise, fresh.noise = {"w": np.ones(2)}, 2, 3
    after = moved(strategy, fresh).strategy
    assert_equal(after.momentum, {"w": np.ones(2)})
    assert after.noise == 3


def test_an_own_state_dict_that_cannot_be_kept_is_refused():
    """Silently losing it would change the result after a failover."""
    strategy = OwnState()
    strategy.momentum = object()
    with pytest.raises(ConfigError, match=r"OwnState.state_dict\(\) holds a object"):
        capture(memory(strategy), is_copied=False)


def test_what_cannot_be_kept_is_named_once_and_left_alone(caplog):
    """Functions are code, no state; for other objects the log says how to keep them."""
    strategy = Remembering()
    strategy.handle, strategy.function = object(), lambda: None
    caplog.set_level("WARNING", "flwr.ha")
    state = capture(memory(strategy), is_copied=False)
    capture(memory(strategy), is_copied=False)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "Remembering.handle holds a object" in lines[0]
    handle = strategy.handle
    restore(memory(strategy), state, is_exact=True)
    assert strategy.handle is handle


def test_undoing_an_attempt_restores_everything():
    """In-place changes, replaced values, new attributes and changed configurations go."""
    strategy = Remembering()
    strategy.momentum, strategy.steps = np.zeros(3), [1]
    it = memory(strategy, lr=0.1)
    before = capture(it, is_copied=True)
    strategy.momentum += 5
    strategy.steps.append(2)
    strategy.new = "attempt"
    it.train_config["lr"] = 0.05
    it.train_config["more"] = 1
    config = it.train_config
    for _ in range(2):
        restore(it, before, is_exact=True)
        assert strategy.momentum.tolist() == [0, 0, 0]
        assert strategy.steps == [1]
        assert not hasattr(strategy, "new")
        assert it.train_config is config
        assert dict(config) == {"lr": 0.1}
        strategy.momentum += 7


def test_a_checkpoint_of_another_strategy_is_refused():
    """A changed app must not take a state that means something else."""
    state = capture(memory(FedAdam()), is_copied=False)
    with pytest.raises(ConfigError, match="made with the strategy FedAdam, not with FedAvg"):
        restore(memory(FedAvg()), state)


def test_a_state_that_does_not_fit_together_is_corrupt():
    """Another copy may be good."""
    strategy = Remembering()
    strategy.it = np.ones(2)
    state = capture(memory(strategy), is_copied=False)
    with pytest.raises(CheckpointCorruptError, match="the state of Remembering does not fit"):
        restore(memory(Remembering()), State(state.plain, {}))


def test_kinds_of_dicts_are_kept():
    """A plain dict in their place would raise KeyError in the strategy."""
    strategy, fresh = Remembering(), Remembering()
    strategy.counter, strategy.ordered = Counter(a=2), OrderedDict(b=1, a=2)
    strategy.default, fresh.default = defaultdict(list, a=[1]), defaultdict(list)
    moved(strategy, fresh)
    assert (fresh.counter, fresh.ordered, fresh.default) == (strategy.counter, strategy.ordered, strategy.default)
    assert fresh.counter["none"] == 0
    fresh.default["new"].append(1)
    assert list(fresh.ordered) == ["b", "a"]


def test_a_tuple_with_names_is_reported_and_left_alone(caplog):
    """A plain tuple in its place would have no names."""
    Point = namedtuple("Point", "x y")
    strategy, fresh = Remembering(), Remembering()
    strategy.point = Point(1, 2)
    fresh.point = Point(0, 0)
    moved(strategy, fresh)
    assert fresh.point.x == 0
    assert "Remembering.point holds a Point, which is not kept over a failover" in caplog.text


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_generator_that_is_made_during_training_is_made_again(kind):
    """The next life has not made it yet."""
    strategy, fresh = Remembering(), Remembering()
    strategy.rng, fresh.rng = np.random.Generator(getattr(np.random, kind)(5)), None
    strategy.dice, fresh.dice = random.Random(5), None
    strategy.rng.random(3)
    moved(strategy, fresh)
    assert fresh.rng.random() == strategy.rng.random()
    assert fresh.dice.random() == strategy.dice.random()


class Momentum:
    """Stand for an optimizer of PyTorch."""

    def state_dict(self):
        return {"momentum": np.ones(2)}

    def load_state_dict(self, state):
        raise AssertionError("there is nobody to load it")


def test_an_object_that_is_made_during_training_is_reported_and_the_run_goes_on(caplog):
    """Nobody here can make it; a run that ended for it would have lost all its rounds."""
    strategy, fresh = Remembering(), Remembering()
    strategy.optimizer, fresh.optimizer = Momentum(), None
    moved(strategy, fresh)
    assert fresh.optimizer is None
    assert "Remembering.optimizer was made during training" in caplog.text
