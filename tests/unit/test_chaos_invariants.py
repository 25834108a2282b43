"""The judge of the chaos suite notices each way in which a promise can be broken."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from flwr_ha.model import Head, LeadershipChange, Position
from tests.chaos.evidence import Evidence
from tests.chaos.invariants import CHECKS, broken
from tests.chaos.links import MULTI, Frames
from tests.chaos.plans import WITH_SUPERNODES, WITHOUT_SUPERNODES, Kill, Part, draw

RUN = "7"


def _head(server_round: int, *, term: int) -> Head:
    position = Position(term, server_round, f"d{server_round}")
    return Head(run_id=RUN, app="a/b", num_rounds=3, position=position, model_digest=f"m{server_round}", size_bytes=1)


def _event(kind: str, replica: int, term: int, **fields: object) -> dict[str, object]:
    return {"kind": kind, "replica": replica, "term": term, **fields}


def _commit(server_round: int, replica: int, term: int, *, digest: str = "") -> dict[str, object]:
    return _event("commit", replica, term, run_id=RUN, server_round=server_round, digest=digest or f"d{server_round}")


def _change(term: int, leader: int) -> LeadershipChange:
    return LeadershipChange(term=term, leader=leader, at="", reason="")


GOOD = Evidence(
    events=(
        _event("elected", 0, 1),
        _event("leading", 0, 1),
        _commit(1, 0, 1),
        _event("elected", 2, 2),
        _event("leading", 2, 2),
        _commit(2, 2, 2),
        _commit(3, 2, 2),
    ),
    history=(_change(1, 0), _change(2, 2)),
    commits={RUN: (_head(1, term=1), _head(2, term=2), _head(3, term=2))},
    rounds={RUN: 3},
    trainings={(RUN, f"partition-{part}", each): 1 for part in (0, 1) for each in (1, 2, 3)},
    min_nodes={RUN: 2},
    final_models={RUN: "m3"},
    expected_models={RUN: "m3"},
)
TWICE = {**GOOD.trainings, (RUN, "partition-1", 2): 2}
ALONE = {key: 1 for key in GOOD.trainings if key != (RUN, "partition-0", 2)}
BAD = {
    "term 2 has 2 leaders": replace(GOOD, events=(*GOOD.events, _event("leading", 1, 2))),
    "after 2": replace(GOOD, events=(*GOOD.events, _event("elected", 2, 1))),
    "terms of the history": replace(GOOD, history=(_change(1, 0), _change(3, 2))),
    "which is not its own": replace(GOOD, events=(*GOOD.events, _commit(3, 0, 2))),
    "an older leader committed": replace(GOOD, commits={RUN: (_head(1, term=2), _head(2, term=1), _head(3, term=2))}),
    "commits of the rounds": replace(GOOD, commits={RUN: (_head(1, term=1), _head(3, term=2))}),
    "but d3 is kept": replace(GOOD, events=(*GOOD.events, _commit(3, 2, 2, digest="another"))),
    "but nothing is kept": replace(GOOD, events=(*GOOD.events, _commit(4, 2, 2))),
    "3 committed rounds of 4": replace(GOOD, rounds={RUN: 4}),
    "cannot be read": replace(GOOD, unreadable={"d3": "it is gone"}),
    "counts 1 clients": replace(GOOD, trainings=ALONE),
    "at the end, not m3": replace(GOOD, final_models={RUN: "m4"}),
    "trained round 2 of run 7 2 times": replace(GOOD, trainings=TWICE),
}


def test_a_good_run_breaks_nothing() -> None:
    """A failover and a repeated training whose SuperNode was killed are no violation."""
    assert broken(GOOD) == ()
    assert broken(replace(GOOD, trainings=TWICE, allowed_repeats=1)) == ()
    assert broken(Evidence()) == ()


@pytest.mark.parametrize("words", BAD)
def test_a_broken_promise_is_named(words: str) -> None:
    """The sentence says what was seen."""
    assert any(words in sentence for sentence in broken(BAD[words]))


def test_each_check_finds_something() -> None:
    """No check is there for show."""
    for check in CHECKS:
        assert any(list(check(evidence)) for evidence in BAD.values()), check.__name__


def test_a_seed_always_gives_the_same_plan() -> None:
    """A failing seed can be run again; other seeds give other plans."""
    assert draw(7, steps=4, has_supernodes=True) == draw(7, steps=4, has_supernodes=True)
    plans = {draw(seed, steps=4, has_supernodes=False) for seed in range(50)}
    assert len(plans) == 50
    assert {step.fault for plan in plans for step in plan.steps} == set(WITHOUT_SUPERNODES)
    drawn = {seed: {step.fault for step in draw(seed, steps=50, has_supernodes=True).steps} for seed in (5, 6)}
    assert Kill(Part.SUPERNODE) in drawn[5]
    assert drawn[6] <= set(WITH_SUPERNODES)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_zookeeper_messages_are_found_however_they_are_cut(size: int) -> None:
    """The handshake has no header and is skipped, whatever its bytes look like."""

    def message(*numbers: int) -> bytes:
        return struct.pack(f">i{len(numbers)}i", 4 * len(numbers), *numbers)

    stream = message(0, MULTI, 0) + message(1, MULTI, 5, 6) + message(-2, 11) + message(2, 4)
    frames = Frames()
    found = []
    for start in range(0, len(stream), size):
        found += frames.feed(stream[start : start + size])

    assert found == [(1, MULTI), (-2, 11), (2, 4)]
