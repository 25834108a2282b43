"""HighlyAvailable over a Grid in memory: resumed training is bit-equal, and faults change nothing."""

from __future__ import annotations

import gc
import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Result,
    Strategy,
)

from flwr_ha import HighlyAvailable
from flwr_ha.errors import ConfigError, FencedError, NotEnoughNodesError
from flwr_ha.model import REPLAYED
from flwr_ha.serverapp import strategy as strategy_module
from flwr_ha.serverapp.session import NullSession
from flwr_ha.serverapp.testing import (
    FakeClock,
    FakeGrid,
    FakeNode,
    ServerDiedError,
    failed,
    lost,
    nan,
    some_model,
    some_nodes,
    unavailable,
    wrong_shape,
)

ROUNDS = 8


class DecayingFedAvg(FedAvg):
    """Custom: lowers the learning rate in the configuration from round to round."""

    def configure_train(self, server_round, arrays, config, grid):
        config["rate"] = float(config.get("rate", 0.2)) * 0.7
        return super().configure_train(server_round, arrays, config, grid)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": FedAvg,
    "fedavgm": lambda: FedAvgM(server_learning_rate=0.9, server_momentum=0.9),
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedprox": lambda: FedProx(proximal_mu=0.1),
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "qfedavg": lambda: QFedAvg(client_learning_rate=0.1, q=0.2),
    "krum": lambda: Krum(num_malicious_nodes=1),
    "multikrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "bulyan": lambda: Bulyan(num_malicious_nodes=0),
    "dp_over_fedadam": lambda: DifferentialPrivacyServerSideFixedClipping(FedAdam(), 0.0, 5.0, 5),
    "dp_client_side": lambda: DifferentialPrivacyClientSideFixedClipping(FedAvgM(server_momentum=0.5), 0.0, 5.0, 5),
    "decaying": DecayingFedAvg,
}


class World:
    """One training that can be killed and run again."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path / "checkpoints"
        self.monkeypatch = monkeypatch
        self.clock = FakeClock()
        self.evaluated: list[int] = []

    def grid(self, number: int = 5, *, first_id: int = 100, run_id: int = 7) -> FakeGrid:
        self.clock = FakeClock()
        self.monkeypatch.setattr(HighlyAvailable, "clock", self.clock)
        return FakeGrid(self.clock, some_nodes(number, first_id=first_id), run_id=run_id)

    def start(self, grid: Grid, inner: Strategy, *, rounds: int = ROUNDS, keep: bool = True, **settings) -> Result:
        settings.setdefault("min_nodes", 5)
        strategy = HighlyAvailable(inner, checkpoint_dir=self.folder if keep else None, **settings)
        config = ConfigRecord({"rate": 0.2})
        return strategy.start(grid, some_model(), num_rounds=rounds, train_config=config, evaluate_fn=self.evaluate)

    def evaluate(self, server_round, arrays):
        self.evaluated.append(server_round)
        return MetricRecord({"norm": float(np.abs(arrays["weight"].numpy()).sum())})


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv("FLWR_HA_SESSION", raising=False)
    gc.freeze()  # QFedAvg and Bulyan collect garbage for each reply: let that not look at the whole test session
    yield World(tmp_path, monkeypatch)
    gc.unfreeze()


@pytest.fixture
def log(caplog):
    """Capture our log."""
    caplog.set_level(logging.INFO, "flwr.ha")
    return caplog


def same(found: Result, wanted: Result) -> None:
    """Bit for bit: arrays and all metrics of all rounds."""
    assert found.arrays.object_id == wanted.arrays.object_id
    assert found.train_metrics_clientapp == wanted.train_metrics_clientapp
    assert found.evaluate_metrics_clientapp == wanted.evaluate_metrics_clientapp
    assert found.evaluate_metrics_serverapp == wanted.evaluate_metrics_serverapp


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_killed_in_every_round_and_resumed_is_bit_equal(world, name):
    """Each life ends in the middle of the next round, with other node ids and another run id each time."""
    wanted = world.start(world.grid(), STRATEGIES[name](), keep=False)
    for life in range(ROUNDS):
        grid = world.grid(first_id=1000 - 31 * life, run_id=50 + life)
        grid.deaths = 10 + 3 + life % 5  # one whole round of training and evaluation, then in the middle of the next
        with pytest.raises(ServerDiedError):
            world.start(grid, STRATEGIES[name]())
            pytest.fail("it should have died")
        if life == ROUNDS - 2:
            break
    found = world.start(world.grid(first_id=9), STRATEGIES[name]())
    assert sorted(found.train_metrics_clientapp) == list(range(1, ROUNDS + 1))
    same(found, wanted)


def test_flowers_own_loop_gives_the_same_model(world):
    """Without faults nothing differs from Flower but the order of sums, which content decides."""
    grid = world.grid()
    flower = FedAvg().start(grid, some_model(), num_rounds=3, train_config=ConfigRecord({"rate": 0.2}))
    ours = world.start(world.grid(), FedAvg(), rounds=3, keep=False)
    for name, array in flower.arrays.items():
        np.testing.assert_allclose(ours.arrays[name].numpy(), array.numpy(), rtol=1e-6)
    assert list(ours.train_metrics_clientapp) == [1, 2, 3]


def test_a_committed_round_is_not_trained_again(world):
    """Five nodes train eight rounds once each, over three lives."""
    calls = []
    for deaths in (25, 33, None):
        grid = world.grid()
        grid.deaths = deaths
        if deaths is None:
            world.start(grid, FedAvg())
        else:
            with pytest.raises(ServerDiedError):
                world.start(grid, FedAvg())
        calls += grid.calls
    trained = [server_round for _, kind, server_round in calls if kind == "train"]
    # A life ends with a round that was under way; that round alone is trained again (clients replay it).
    assert sorted(set(trained)) == list(range(1, ROUNDS + 1))
    assert len(trained) <= 5 * (ROUNDS + 2)
    assert world.evaluated == sorted(world.evaluated)


def test_a_finished_training_starts_anew_in_a_local_folder(world):
    """Run again it trains again, under the new run id."""
    first = world.start(world.grid(), FedAvg(), rounds=2)
    grid = world.grid(run_id=8)
    same(world.start(grid, FedAvg(), rounds=2), first)
    assert len(grid.calls) == 20


def test_replies_are_ordered_by_content_alone(world):
    """Arrival and node ids change neither the sums nor the metrics."""
    wanted = world.start(world.grid(), FedAvg(), rounds=2, keep=False)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        grid = world.grid()
        grid.nodes = {500 - 3 * i: FakeNode(partition, 1.0 + i) for i, partition in enumerate(order)}
        same(world.start(grid, FedAvg(), rounds=2, keep=False), wanted)


@pytest.mark.parametrize("spoiler", [nan, wrong_shape, failed, unavailable])
def test_a_bad_reply_costs_nobody_elses_work(world, log, spoiler):
    """Only that node is asked again, and the model is the same as without the fault."""
    wanted = world.start(world.grid(), FedAdam(), rounds=3, keep=False)
    grid = world.grid()
    grid.nodes[107].spoilers = [spoiler]
    same(world.start(grid, FedAdam(), rounds=3, keep=False), wanted)
    trained = [partition for partition, kind, r in grid.calls if kind == "train" and r == 1]
    assert sorted(trained) == [0, 1, 1, 2, 3, 4]
    assert ("node 107" in log.text) == (spoiler is not unavailable)


def test_a_content_that_was_rejected_is_asked_under_another_group(world):
    """Else a client's cache would answer with the same NaN; an error is not cached, so its group stays."""
    grid = world.grid(1)
    grid.nodes[100].spoilers = [failed, nan]
    world.start(grid, FedAvg(min_available_nodes=1, min_train_nodes=1, min_evaluate_nodes=1), rounds=1, min_nodes=1)
    assert grid.groups == ["1", "1", "1.1", "1"]


def test_a_reply_from_a_clients_cache_is_counted_and_changes_nothing(world, monkeypatch):
    """The mark by which it is known is gone before anybody sorts or aggregates the replies."""

    def replayed(good: RecordDict) -> RecordDict:
        good[REPLAYED] = ConfigRecord({"is-replayed": True})
        return good

    noted = []
    monkeypatch.setattr(NullSession, "record", lambda _, kind, message, **fields: noted.append((kind, fields["node"])))
    wanted = world.start(world.grid(), FedAdam(), rounds=2, keep=False)
    grid = world.grid()
    grid.nodes[107].spoilers = [replayed]
    same(world.start(grid, FedAdam(), rounds=2, keep=False), wanted)
    assert noted == [("reply-replayed", "107")]


def test_a_node_that_never_gives_a_good_reply_ends_the_training(world):
    """After ten attempts the reason is raised."""
    grid = world.grid()
    grid.nodes[107].spoilers = [failed] * 100
    with pytest.raises(NotEnoughNodesError, match=r"10 attempts to train failed.*node 107: error 2: out of memory"):
        world.start(grid, FedAvg(), keep=False)
    assert len([1 for partition, _, _ in grid.calls if partition == 1]) == 10
    assert len(grid.calls) == 14


def test_bad_replies_beyond_the_threshold_are_left_out(world):
    """Four of five are enough when the user says so."""
    grid = world.grid()
    grid.nodes[107].spoilers = [nan]
    result = world.start(grid, FedAvg(), rounds=1, keep=False, min_nodes=4)
    assert list(result.train_metrics_clientapp) == [1]
    assert len([1 for _, kind, _ in grid.calls if kind == "train"]) == 5


def test_a_lost_reply_is_asked_for_again_after_the_deadline(world):
    """Nothing came, so the deadline decides; the others are not asked again."""
    wanted = world.start(world.grid(), FedAvg(), rounds=2, keep=False)
    grid = world.grid()
    grid.nodes[107].spoilers = [lost]
    same(world.start(grid, FedAvg(), rounds=2, keep=False, round_timeout_s=30), wanted)
    assert sorted(partition for partition, kind, r in grid.calls if kind == "train" and r == 1) == [0, 1, 1, 2, 3, 4]
    assert 30 < world.clock.time_s < 60


def test_a_late_reply_counts_even_after_the_deadline(world):
    """It is kept though the node was asked again by then."""
    grid = world.grid()
    grid.nodes[107].train_s = 40.0
    world.start(grid, FedAvg(fraction_evaluate=0), rounds=1, keep=False, round_timeout_s=30)
    assert world.clock.time_s < 45


def test_training_waits_for_enough_nodes_and_goes_on_by_itself(world, log):
    """Four of five nodes: it says so, trains nothing, and goes on when the fifth is there."""
    grid = world.grid(4)
    clock = world.clock
    seen: list[int] = []
    clock.at(100.0, lambda: (seen.append(len(grid.calls)), grid.nodes.update({555: FakeNode(4)})))
    result = world.start(grid, FedAvg(), rounds=2, keep=False)
    assert seen == [0]
    assert "4 of 5 nodes online" in log.text
    assert log.text.count("4 of 5 nodes online") == 4  # at 0, 30, 60 and 90 s
    same(result, world.start(world.grid(), FedAvg(), rounds=2, keep=False))


def test_the_wait_for_nodes_can_be_bounded(world):
    """The message says how many were there."""
    with pytest.raises(NotEnoughNodesError, match="round 1: 4 of 5 nodes online after 60 s"):
        world.start(world.grid(4), FedAvg(), keep=False, wait_timeout_s=60)


def test_a_node_that_dies_while_it_trains_is_replaced(world):
    """Its successor has another id; the other four are not asked again; the result is the same."""
    wanted = world.start(world.grid(), FedAvgM(server_momentum=0.9), rounds=3, keep=False)
    grid = world.grid()
    grid.nodes[128].train_s = 50.0
    world.clock.at(5.0, lambda: grid.nodes.pop(128))
    world.clock.at(400.0, lambda: grid.nodes.update({900: FakeNode(4)}))
    same(world.start(grid, FedAvgM(server_momentum=0.9), rounds=3, keep=False), wanted)
    assert len([1 for _, kind, r in grid.calls if kind == "train" and r == 1]) == 5


def test_nodes_that_go_and_come_do_not_use_up_attempts(world):
    """Flapping is waiting, not failing."""
    grid = world.grid()
    grid.nodes[128].train_s = 8.0
    for i in range(30):
        world.clock.at(4.0 + 10 * i, lambda: grid.nodes.pop(128, None))
        world.clock.at(9.0 + 10 * i, lambda: grid.nodes.update({128: FakeNode(4, 8.0)}))
    assert len(world.start(grid, FedAvg(), rounds=1, keep=False).train_metrics_clientapp) == 1
    assert world.clock.time_s > 290


def test_a_restarted_node_with_the_same_id_is_asked_again_at_once(world):
    """Its work is lost though it was never seen offline; the deadline of an hour is not waited for."""
    grid = world.grid()
    grid.nodes[128].train_s = 20.0
    world.clock.at(10.0, lambda: setattr(grid.nodes[128], "activation", "later"))
    world.start(grid, FedAvg(), rounds=1, keep=False)
    assert world.clock.time_s < 90


def test_stragglers_are_given_up_only_if_allowed(world):
    """min_replies ends the wait; a late reply does not reach the next round."""
    grid = world.grid()
    grid.nodes[128].train_s = 1000.0
    settings = {"min_nodes": 3, "min_replies": 4, "grace_s": 5.0}
    result = world.start(grid, FedAvg(), rounds=3, keep=False, **settings)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert world.clock.time_s < 100
    assert {partition for partition, _, _ in grid.calls} == {0, 1, 2, 3}


def leaves_for_a_while(clock: FakeClock, grid: FakeGrid, node_id: int, *, at_s: float) -> None:
    node = grid.nodes[node_id]
    clock.at(at_s, lambda: grid.nodes.pop(node_id, None))
    clock.at(at_s + 40, lambda: grid.nodes.update({node_id: node}))


def test_the_threshold_holds_whatever_nodes_do(world):
    """Random faults: every round that counts was aggregated from min_nodes valid replies or more."""
    for seed in range(15):
        rng = random.Random(seed)
        counted: list[int] = []

        class Counting(FedAvg):
            def aggregate_train(self, server_round, replies, counted=counted):
                counted.append(len(list(replies)))
                return super().aggregate_train(server_round, replies)

        grid = world.grid(6)
        for node in grid.nodes.values():
            node.train_s = rng.uniform(0.5, 20)
            node.spoilers = [rng.choice([None, None, None, nan, failed, wrong_shape, unavailable]) for _ in range(8)]
        for node_id in list(grid.nodes):
            if rng.random() < 0.5:
                leaves_for_a_while(world.clock, grid, node_id, at_s=rng.uniform(0, 60))
        result = world.start(grid, Counting(), rounds=3, keep=False, min_nodes=4)
        assert list(result.train_metrics_clientapp) == [1, 2, 3]
        assert len(counted) == 3
        assert min(counted) >= 4


def test_evaluation_repeats_only_what_is_missing(world):
    """A failed evaluation neither trains again nor asks the others again."""
    grid = world.grid()
    grid.nodes[100].spoilers = [None, failed]
    world.start(grid, FedAvg(), rounds=1, keep=False)
    assert len([1 for _, kind, _ in grid.calls if kind == "train"]) == 5
    assert len([1 for _, kind, _ in grid.calls if kind == "evaluate"]) == 6


def test_without_evaluation_nothing_is_asked(world):
    """fraction_evaluate = 0 sends no messages."""
    grid = world.grid()
    result = world.start(grid, FedAvg(fraction_evaluate=0.0), rounds=2, keep=False)
    assert {kind for _, kind, _ in grid.calls} == {"train"}
    assert result.evaluate_metrics_clientapp == {}


def test_sampling_is_the_same_in_every_life(world):
    """The seed comes from the training and the round, and the global generator is left as it was."""
    inner = {"fraction_train": 0.4, "fraction_evaluate": 0.2}
    whole = world.grid(10)
    wanted = world.start(whole, FedAvg(**inner), rounds=4, min_nodes=2)
    world.folder = world.folder.with_name("again")
    grid = world.grid(10)
    grid.deaths = 9
    with pytest.raises(ServerDiedError):
        world.start(grid, FedAvg(**inner), rounds=4, min_nodes=2)
    random.seed(3)
    before = random.getstate()
    same(world.start(world.grid(10, run_id=99), FedAvg(**inner), rounds=4, min_nodes=2), wanted)
    assert random.getstate() == before
    sampled = [tuple(p for p, kind, r in whole.calls if kind == "train" and r == n) for n in range(1, 5)]
    assert len(set(sampled)) > 1


def test_a_fraction_makes_it_wait_for_more_nodes(world, log):
    """Half of the nodes must be min_nodes: six nodes for three."""
    grid = world.grid(5)
    world.clock.at(50.0, lambda: grid.nodes.update({900: FakeNode(5)}))
    world.start(grid, FedAvg(fraction_train=0.5), rounds=1, keep=False, min_nodes=3)
    assert "5 of 6 nodes online (fraction_train = 0.5 of them must be 3 nodes or more)" in log.text
    assert len([1 for _, kind, _ in grid.calls if kind == "train"]) == 3


def test_an_aggregation_without_a_model_is_an_attempt_that_failed(world):
    """Flower would use the round up; here it is repeated, from an unchanged state."""

    class Moody(FedAvgM):
        tries = 0

        def aggregate_train(self, server_round, replies):
            Moody.tries += 1
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (None, None) if Moody.tries == 2 else (arrays, metrics)

    settings = {"server_momentum": 0.9, "server_learning_rate": 0.5}
    wanted = world.start(world.grid(), FedAvgM(**settings), rounds=3, keep=False)
    found = world.start(world.grid(), Moody(**settings), rounds=3, keep=False)
    assert Moody.tries == 4
    same(found, wanted)


def test_replies_that_aggregation_has_spoiled_are_fetched_again(world):
    """FedTrimmedAvg empties the replies: a second attempt must not aggregate what is left of them."""

    class Moody(FedTrimmedAvg):
        tries = 0

        def aggregate_train(self, server_round, replies):
            Moody.tries += 1
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (None, None) if Moody.tries == 1 else (arrays, metrics)

    wanted = world.start(world.grid(), FedTrimmedAvg(), rounds=2, keep=False)
    grid = world.grid()
    same(world.start(grid, Moody(), rounds=2, keep=False), wanted)
    assert grid.groups[5:10] == ["1"] * 5  # clients may answer from their caches


class FencedSession(NullSession):
    """A replica that was deposed before round 2."""

    def commit(self, checkpoint, metrics):
        if checkpoint.server_round == 2:
            raise FencedError("term 1 is fenced off by term 2")
        return super().commit(checkpoint, metrics)


def test_a_fenced_leader_stops_at_once(world):
    """No further round is trained."""
    grid = world.grid()
    world.monkeypatch.setattr(strategy_module, "open_session", lambda **_: FencedSession(run_id="7", app="a"))
    with pytest.raises(FencedError, match="fenced off by term 2"):
        world.start(grid, FedAvg(), keep=False)
    assert max(r for _, _, r in grid.calls) == 2


def test_a_second_training_in_one_run_is_refused(world):
    """It would take the committed rounds of the first for its own."""

    class Once(NullSession):
        is_once_per_run = True

    world.monkeypatch.setattr(strategy_module, "open_session", lambda **_: Once(run_id="7", app="a"))
    grid = world.grid()
    world.start(grid, FedAvg(), rounds=1, keep=False)
    with pytest.raises(ConfigError, match="called twice in one run"):
        world.start(grid, FedAvg(), rounds=1, keep=False)


def test_another_number_of_rounds_is_refused(world):
    """What is committed belongs to a training of eight rounds."""
    grid = world.grid()
    grid.deaths = 15
    with pytest.raises(ServerDiedError):
        world.start(grid, FedAvg())
    with pytest.raises(ConfigError, match="round 1 of 8 is committed, but now 9 rounds"):
        world.start(world.grid(), FedAvg(), rounds=9)


def test_too_few_messages_are_refused_with_a_reason(world):
    """A strategy that asks one node can never satisfy min_nodes = 2."""

    class Single(FedAvg):
        def configure_train(self, *args):
            return list(super().configure_train(*args))[:1]

    with pytest.raises(ConfigError, match="asks 1 nodes, fewer than min_nodes = 5"):
        world.start(world.grid(), Single(), keep=False)


def test_only_strategies_are_wrapped_and_only_once():
    """Both mistakes are named."""
    with pytest.raises(ConfigError, match="not <class 'int'>"):
        HighlyAvailable(3, min_nodes=1)
    with pytest.raises(ConfigError, match="wrap the strategy once"):
        HighlyAvailable(HighlyAvailable(FedAvg(), min_nodes=1), min_nodes=1)


def test_it_is_a_strategy_and_delegates(world):
    """Whoever calls the five methods gets those of the wrapped strategy."""
    inner = FedAvg()
    outer = HighlyAvailable(inner, min_nodes=2)
    assert isinstance(outer, Strategy)
    messages = list(outer.configure_train(1, some_model(), ConfigRecord(), world.grid()))
    assert len(messages) == 5
    assert outer.aggregate_train(1, []) == (None, None)
    assert outer.aggregate_evaluate(1, []) is None
