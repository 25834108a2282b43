"""How many nodes are waited for, and what a strategy sees when it samples."""

from __future__ import annotations

import random

import pytest
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy

from flwr_ha.serverapp.nodes import Need, SamplingGrid, layers, need, online, seeded_sampling, weight_key
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, some_nodes


@pytest.fixture
def grid():
    return FakeGrid(FakeClock(), some_nodes(5))


class Custom(Strategy):
    """Has none of Flower's settings."""

    def configure_train(self, *args):
        return []

    configure_evaluate = aggregate_train = aggregate_evaluate = configure_train

    def summary(self):
        pass


@pytest.mark.parametrize(
    ("strategy", "kind", "min_nodes", "nodes"),
    [
        (FedAvg(), "train", 5, 5),
        (FedAvg(min_available_nodes=8), "train", 5, 8),
        (FedAvg(min_train_nodes=7), "train", 5, 7),
        (FedAvg(min_train_nodes=7), "evaluate", 5, 5),
        (FedAvg(min_evaluate_nodes=7), "evaluate", 5, 7),
        (FedAvg(fraction_train=0.5), "train", 5, 10),
        (FedAvg(fraction_train=0.3), "train", 3, 10),
        (FedAvg(fraction_train=1e-6), "train", 3, 3_000_000),
        (FedAvg(fraction_train=0.1, min_train_nodes=5), "train", 5, 5),
        (FedAvg(fraction_evaluate=0.1), "evaluate", 5, 5),
        (FedAvg(fraction_evaluate=0.0), "evaluate", 5, 0),
        (FedAvg(fraction_train=0.0), "train", 5, 0),
        (DifferentialPrivacyServerSideFixedClipping(FedAvg(min_train_nodes=9), 0.1, 1.0, 9), "train", 5, 9),
        (Custom(), "train", 4, 4),
        (Custom(), "evaluate", 4, 4),
    ],
)
def test_as_many_nodes_are_waited_for_as_the_strategy_needs(strategy, kind, min_nodes, nodes):
    """Fewer, and it would wait unseen or sample too few; more, and the training would not start."""
    found = need(strategy, kind, min_nodes=min_nodes)
    assert found.nodes == nodes
    assert bool(found.reason) == (nodes > min_nodes)
    fraction = getattr(strategy, f"fraction_{kind}", None)
    if kind == "train" and fraction:
        assert max(int(nodes * fraction), strategy.min_train_nodes) >= min_nodes


def test_a_need_without_a_surplus_has_no_reason():
    """The threshold explains itself."""
    assert need(FedAvg(), "train", min_nodes=5) == Need(5)


def test_nodes_are_shown_sorted(grid):
    """The order in which they registered must not matter."""
    assert list(grid.get_node_ids()) == [128, 121, 114, 107, 100]
    view = SamplingGrid(grid, online(grid))
    assert list(view.get_node_ids()) == [100, 107, 114, 121, 128]
    assert [node.node_id for node in view.get_nodes()] == [100, 107, 114, 121, 128]


def test_a_node_that_goes_while_sampling_does_not_block_it(grid):
    """The strategy sees the nodes as they were when there were enough; later looks see the present."""
    view = SamplingGrid(grid, online(grid))
    del grid.nodes[114]
    assert len(list(view.get_node_ids())) == 5
    for _ in range(5):
        last = list(view.get_node_ids())
    assert last == [100, 107, 121, 128]


def test_sampling_is_seeded_by_training_round_and_phase():
    """The same in each life, different from round to round, and invisible to others."""
    random.seed(1)
    before = random.getstate()

    def draw(*key):
        with seeded_sampling(*key):
            return random.random()

    assert draw("7", 3, "train") == draw("7", 3, "train")
    assert (
        len({draw(*key) for key in (("7", 3, "train"), ("7", 4, "train"), ("7", 3, "evaluate"), ("8", 3, "train"))})
        == 4
    )
    assert random.getstate() == before


def test_settings_of_wrapped_strategies_are_found():
    """Differential privacy wraps; the weight is the inner strategy's."""
    inner = FedAvg(weighted_by_key="n")
    outer = DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 2)
    assert list(layers(outer)) == [outer, inner]
    assert weight_key(outer) == "n"
    assert weight_key(Custom()) is None
