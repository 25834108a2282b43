"""The threshold and the deadline of a phase, over all orders of arrival."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_ha.errors import ConfigError
from flwr_ha.serverapp.rounds import (
    Back,
    Continue,
    Decision,
    Done,
    Event,
    Gone,
    Phase,
    Rejected,
    Rules,
    Short,
    Tick,
    Valid,
    begin,
    step,
)


def run(phase: Phase, *events: Event, now_s: float = 0.0) -> tuple[Phase, Decision]:
    """Apply events at one moment."""
    decision: Decision = Continue("")
    for event in events:
        phase, decision = step(phase, event, now_s=now_s)
    return phase, decision


def bad(node: int) -> Rejected:
    return Rejected(node, f"node {node}: bad")


@pytest.mark.parametrize("order", list(permutations([1, 2, 3])))
def test_all_replies_end_the_phase_in_any_order(order):
    """Who answers first does not matter."""
    phase = begin(Rules(min_nodes=3), [1, 2, 3], now_s=0)
    phase, decision = run(phase, *map(Valid, order[:2]))
    assert decision == Continue("2 of 3 replies")
    assert run(phase, Valid(order[2]))[1] == Done("3 of 3 replies")


def test_every_outcome_of_four_nodes_in_every_order():
    """Exhaustive: the last event decides, and Done is decided exactly when enough replies are valid."""
    rules = Rules(min_nodes=3)
    for outcomes in product("vrg", repeat=4):
        events = [{"v": Valid, "r": bad, "g": Gone}[outcome](node) for node, outcome in enumerate(outcomes)]
        for order in permutations(events):
            _, decision = run(begin(rules, range(4), now_s=0), *order, Tick())
            if outcomes.count("v") >= 3:
                assert isinstance(decision, Done), outcomes
            else:
                assert isinstance(decision, Short), outcomes
                assert decision.is_failure == ("r" in outcomes)


def test_short_as_soon_as_the_threshold_is_out_of_reach():
    """The other nodes need not finish before the training can say what is wrong."""
    _, decision = run(begin(Rules(min_nodes=3), [1, 2, 3], now_s=0), Gone(2))
    assert decision == Short(
        "0 of 3 replies, 3 are needed (node 2 is gone; node 1 has not answered; node 3 has not answered)", False
    )


def test_a_node_that_comes_back_counts_again():
    """A missed heartbeat does not cost the round."""
    phase, _ = run(begin(Rules(min_nodes=2), [1, 2, 3], now_s=0), Gone(2), Back(2), Valid(1), Valid(3))
    assert phase.pending == {2}
    assert isinstance(run(phase, Valid(2))[1], Done)


def test_min_replies_give_up_stragglers_after_the_grace_time():
    """The grace time counts from when enough replies were there."""
    rules = Rules(min_nodes=2, min_replies=2, grace_s=5.0)
    phase, decision = run(begin(rules, [1, 2, 3], now_s=0), Valid(1), Valid(2), now_s=10.0)
    assert isinstance(decision, Continue)
    assert isinstance(run(phase, Tick(), now_s=14.9)[1], Continue)
    assert run(phase, Tick(), now_s=15.0)[1] == Done("2 of 3 replies are enough")
    assert run(phase, Valid(3), now_s=11.0)[1] == Done("3 of 3 replies")


def test_no_min_replies_means_all_that_were_asked():
    """Five replies of six do not end the phase while the sixth may come."""
    phase, decision = run(begin(Rules(min_nodes=2), range(6), now_s=0), *map(Valid, range(5)))
    assert isinstance(decision, Continue)
    assert run(phase, Gone(5))[1] == Done("5 of 6 replies (node 5 is gone)")


def test_the_deadline_keeps_the_promise():
    """At the deadline enough replies are aggregated; too few end short, and that is a failure."""
    rules = Rules(min_nodes=2, round_timeout_s=60.0)
    phase, _ = run(begin(rules, [1, 2, 3], now_s=100.0), Valid(1))
    decision = run(phase, Tick(), now_s=160.0)[1]
    assert isinstance(decision, Short)
    assert decision.is_failure
    assert "within 60 s" in decision.reason
    assert isinstance(run(phase, Valid(2), now_s=160.0)[1], Done)


def test_late_duplicate_and_foreign_events_change_nothing():
    """What arrives twice or from elsewhere is ignored."""
    phase, _ = run(begin(Rules(min_nodes=2), [1, 2, 3], now_s=0), Valid(1), bad(2))
    for event in (Valid(1), bad(1), Gone(1), Valid(2), Gone(2), Valid(9), bad(9), Gone(9), Back(9), Back(3)):
        assert run(phase, event)[0] == phase


def test_asking_fewer_nodes_than_min_nodes_is_refused():
    """It could never succeed."""
    with pytest.raises(ConfigError, match="the strategy asks 2 nodes, fewer than min_nodes = 3"):
        begin(Rules(min_nodes=3), [1, 2], now_s=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_nodes": 0},
        {"min_nodes": 1, "round_timeout_s": 0.0},
        {"min_nodes": 3, "min_replies": 2},
        {"min_nodes": 1, "grace_s": -1.0},
        {"min_nodes": 1, "wait_timeout_s": -1.0},
        {"min_nodes": 1, "round_timeout_s": float("nan")},
    ],
)
def test_impossible_rules_name_the_setting(wrong):
    """The last key is the one that is wrong."""
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        Rules(**wrong)


_EVENTS = st.one_of(
    st.builds(Valid, st.integers(0, 6)),
    st.builds(Rejected, st.integers(0, 6), st.just("bad")),
    st.builds(Gone, st.integers(0, 6)),
    st.builds(Back, st.integers(0, 6)),
    st.just(Tick()),
)


@settings(max_examples=300, deadline=None)
@given(
    asked=st.integers(1, 6),
    data=st.data(),
    events=st.lists(st.tuples(_EVENTS, st.floats(0, 3)), max_size=25),
    grace_s=st.sampled_from([0.0, 2.0]),
)
def test_the_threshold_is_never_violated(asked, data, events, grace_s):
    """Whatever happens: Done only with min_nodes valid replies; every attempt ends by its deadline."""
    min_nodes = data.draw(st.integers(1, asked))
    min_replies = data.draw(st.none() | st.integers(min_nodes, 8))
    rules = Rules(min_nodes=min_nodes, min_replies=min_replies, grace_s=grace_s, round_timeout_s=10.0)
    phase, now_s = begin(rules, range(asked), now_s=0.0), 0.0
    good: set[int] = set()
    for event, passed_s in events:
        now_s += passed_s
        before = phase
        phase, decision = step(phase, event, now_s=now_s)
        if isinstance(event, Valid) and event.node < asked and event.node not in before.rejected:
            good.add(event.node)
        assert phase.valid == good
        assert phase.pending | phase.valid | phase.gone | set(phase.rejected) == phase.asked
        if isinstance(decision, Done):
            assert len(good) >= min_nodes
        if isinstance(decision, Short):
            assert len(good) < min_nodes
        if now_s >= 10.0:
            assert not isinstance(decision, Continue)
