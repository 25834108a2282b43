"""A selection of fault plans with real processes; `make chaos` runs random ones for as long as you like."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from flwr_ha.local.processes import wait_until
from tests.chaos.evidence import events_of
from tests.chaos.plans import (
    Corrupt,
    Cut,
    FaultPlan,
    FlipInTransfer,
    Freeze,
    Kill,
    LoseMajority,
    LoseReply,
    Part,
    SlowDisk,
    Step,
    draw,
)
from tests.chaos.plans import Path as NetworkPath
from tests.chaos.runner import Chaos, started

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(900)]

LONG_S = 120.0
CHOSEN = FaultPlan(
    seed=0,
    steps=tuple(
        Step(fault=fault, is_leader_hit=True, after_commits=2, delay_s=0.1)
        for fault in (
            LoseReply(),
            Cut(NetworkPath.TO_ZOOKEEPER, 2.0),
            Cut(NetworkPath.TO_REPLICAS, 2.0),
            Corrupt(False),
            FlipInTransfer(1),
            FlipInTransfer(4),
            SlowDisk(2.0, 1.5),
            LoseMajority(20.0, True),
            Kill(Part.TREE),
            Freeze(Part.TREE, 2.5),
        )
    ),
)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """Run a cluster whose connections can be cut, and let a run commit all the time."""
    with started(tmp_path_factory.mktemp("chaos"), seed=1, supernodes=0) as made:
        yield made


def test_leader_that_reaches_no_standby_commits_nothing_and_says_why(chaos: Chaos) -> None:
    """It still leads, since ZooKeeper answers; once a standby is reached again the round counts."""
    cluster = chaos.cluster
    leader = cluster.wait_leader(timeout_s=LONG_S)
    links = cluster.links_of(leader, NetworkPath.TO_REPLICAS)

    for link in links:
        link.cut()
    try:
        known = len(events_of(cluster, leader))

        def reasons() -> list[str]:
            later = events_of(cluster, leader)[known:]
            return [event["message"] for event in later if event["kind"] == "not-committed"]

        why = wait_until(reasons, timeout_s=LONG_S, what="the reason")[0]
        assert "0 of 1 needed copies on other replicas were made" in why
        stopped_at = chaos.committed_round
        hold_s = time.monotonic() + 2 * cluster.plan.session_timeout_s
        wait_until(lambda: time.monotonic() > hold_s, timeout_s=LONG_S, what="two session timeouts")
        assert chaos.committed_round == stopped_at
        assert cluster.leader() == leader
    finally:
        for link in links:
            link.heal()

    wait_until(lambda: chaos.committed_round > stopped_at + 2, timeout_s=LONG_S, what="further rounds")


def test_no_invariant_is_broken_by_the_chosen_and_by_drawn_plans(chaos: Chaos) -> None:
    """A fault of each kind on the leader, then what a seed brings."""
    plans = [CHOSEN, draw(2, steps=2, has_supernodes=False)]

    for plan in plans:
        if not chaos.carry_out(plan):
            break
    report = chaos.report()

    assert report.violations == ()
    assert report.plans == 2
    assert report.faults.total() == len(CHOSEN.steps) + 2
    assert report.takeovers >= 3
    assert report.rounds > 20
