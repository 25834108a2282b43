"""A selection of fault plans with real processes; `make chaos` runs random ones for as long as you like."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.plans import Corrupt, Cut, FaultPlan, Freeze, Kill, LoseReply, Part, Step, draw
from tests.chaos.plans import Path as NetworkPath
from tests.chaos.runner import run_plans

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(900)]

CHOSEN = FaultPlan(
    seed=0,
    steps=tuple(
        Step(fault=fault, is_leader_hit=True, after_commits=2, delay_s=0.1)
        for fault in (
            LoseReply(),
            Cut(NetworkPath.TO_ZOOKEEPER, 2.0),
            Cut(NetworkPath.TO_REPLICAS, 2.0),
            Corrupt(False),
            Kill(Part.TREE),
            Freeze(Part.SUPERLINK, 2.0),
        )
    ),
)


def test_no_invariant_is_broken_by_the_chosen_and_by_drawn_plans(tmp_path: Path) -> None:
    """One of each kind of fault on the leader, then what two seeds bring."""
    drawn = [draw(seed, steps=2, has_supernodes=False) for seed in (1, 2)]

    report = run_plans(tmp_path, [CHOSEN, *drawn])

    assert report.violations == ()
    assert report.plans == 3
    assert report.faults.total() == len(CHOSEN.steps) + 4
    assert report.takeovers >= 3
    assert report.rounds > 20
