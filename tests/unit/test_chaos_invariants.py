"""The judge of the chaos suite notices each way in which a promise can be broken."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.model import Head, LeadershipChange, Position
from flwr_ha.storage.frames import PROTOCOL, Kind, question
from flwr_ha.storage.frames import Head as FrameHead
from tests.chaos import verdict
from tests.chaos.evidence import Attempt, Evidence, NodeKill, Training, trainings_in
from tests.chaos.invariants import CHECKS, Reason, broken, repeats
from tests.chaos.links import MULTI, Frames, PulledBlobs, PushedBlobs
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


FIRST = Attempt(node="11", began_s=10.0, ended_s=12.0)
HALF = Attempt(node="11", began_s=10.0)
SAME = Attempt(node="11", began_s=20.0, ended_s=22.0)
ANOTHER = Attempt(node="12", began_s=20.0, ended_s=22.0)
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
    trainings={(RUN, f"partition-{part}", each): (FIRST,) for part in (0, 1) for each in (1, 2, 3)},
    min_nodes={RUN: 2},
    final_models={RUN: "m3"},
    expected_models={RUN: "m3"},
)
ALONE = {key: (FIRST,) for key in GOOD.trainings if key != (RUN, "partition-0", 2)}


def _twice(*attempts: Attempt, kill_s: float | None = None, partition: str = "partition-1") -> Evidence:
    kills = () if kill_s is None else (NodeKill(partition=partition, at_s=kill_s),)
    return replace(GOOD, trainings={**GOOD.trainings, (RUN, "partition-1", 2): attempts}, kills=kills)


UNEXCUSED = {
    "no SuperNode was killed": _twice(FIRST, ANOTHER),
    "the same SuperNode did it twice": _twice(FIRST, SAME, kill_s=15.0),
    "another SuperNode was killed": _twice(FIRST, ANOTHER, kill_s=15.0, partition="partition-0"),
    "it was killed before": _twice(FIRST, ANOTHER, kill_s=9.0),
    "it was killed later": _twice(FIRST, ANOTHER, kill_s=21.0),
    "one kill excuses one repeat": _twice(FIRST, ANOTHER, replace(SAME, began_s=30.0), kill_s=15.0),
}
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
    "of run 7 counts 1 clients": replace(GOOD, trainings={**GOOD.trainings, (RUN, "partition-0", 3): (HALF,)}),
    "at the end, not m3": replace(GOOD, final_models={RUN: "m4"}),
    "trained round 2 of run 7 again": UNEXCUSED["no SuperNode was killed"],
}


def test_a_good_run_breaks_nothing() -> None:
    """A failover is no violation."""
    assert broken(GOOD) == ()
    assert broken(Evidence()) == ()


@pytest.mark.parametrize(("attempt", "reason"), [(HALF, Reason.IN_THE_MIDDLE), (FIRST, Reason.BEFORE_COMMIT)])
def test_a_killed_supernode_excuses_a_repeat(attempt: Attempt, reason: Reason) -> None:
    """What it had in hand, or in its cache, is lost with it."""
    evidence = _twice(attempt, ANOTHER, kill_s=15.0)

    assert broken(evidence) == ()
    assert list(repeats(evidence)) == [((RUN, "partition-1", 2), reason)]


@pytest.mark.parametrize("case", UNEXCUSED)
def test_nothing_else_excuses_a_repeat(case: str) -> None:
    """A replica's crash least of all."""
    assert any("for no good reason" in sentence for sentence in broken(UNEXCUSED[case]))


def test_notes_of_clients_become_attempts(tmp_path: Path) -> None:
    """A training that did not end is an attempt as well."""
    folder = tmp_path / "run-7"
    folder.mkdir()
    (folder / "partition-1").write_text("begin 2 11 10.0\nevaluate 1 11 10.5\nbegin 2 12 20.0\ntrain 2 12 22.0\n")

    assert trainings_in(tmp_path) == {(RUN, "partition-1", 2): (HALF, ANOTHER)}


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


def test_pulled_blobs_are_found_behind_their_headers() -> None:
    """In the same piece as the header, or in the next one; nothing else on the connection is a blob."""
    blobs = PulledBlobs()
    header = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n\r\n"

    assert blobs.find(b"HTTP/1.1 404 Not Found\r\n\r\n") is None
    assert blobs.find(header + b"blob") == range(len(header), len(header) + 4)
    assert blobs.find(b"more of it") is None
    assert blobs.find(header) is None
    assert blobs.find(b"blob") == range(4)


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_pushed_blobs_are_found_in_the_frames(size: int) -> None:
    """Each piece once, however the stream is cut; neither the request nor heads nor questions are bytes of a blob."""
    digest = "sha256:" + "ab" * 32
    pieces = [b"first blob", b"second"]
    stream = question({digest: 10})
    for piece in pieces:
        stream += FrameHead(Kind.PIECE, digest, 0, 10, len(piece)).to_bytes() + piece + question({digest: 10})
    blobs = PushedBlobs()
    assert blobs.find(b"POST /switchover HTTP/1.1\r\n\r\n") is None
    assert blobs.find(f"GET /blobs HTTP/1.1\r\nUpgrade: {PROTOCOL}\r\n\r\n".encode()) is None

    found = []
    for start in range(0, len(stream), size):
        data = stream[start : start + size]
        if (where := blobs.find(data)) is not None:
            found.append(data[where.start : where.stop])

    expected = pieces if size < 100 else pieces[:1]  # one is enough in what is read at once
    assert len(found) == len(expected)
    assert all(piece.startswith(part) and part for piece, part in zip(expected, found, strict=True))


class GoesOn:
    """Stands for a cluster that commits one more round whenever anybody has looked at it."""

    def __init__(self) -> None:
        self.rounds = 1
        self.replicas: dict[int, object] = {}

    def looked(self, answer: Any) -> Any:
        self.rounds += 1
        return answer

    def history(self) -> tuple[LeadershipChange, ...]:
        return (_change(1, 0),)

    def heads(self) -> dict[str, Head]:
        return self.looked({RUN: _head(self.rounds, term=1)})

    def commit_log(self, run_id: str) -> tuple[Head, ...]:
        assert run_id == RUN
        return self.looked(tuple(_head(each, term=1) for each in range(1, self.rounds + 1)))


def test_a_run_that_goes_on_while_it_is_judged_is_not_blamed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that is committed between two looks is told of and kept, or not told of."""
    cluster = GoesOn()

    def told(_: GoesOn) -> tuple[dict[str, object], ...]:
        return cluster.looked(tuple(_commit(each, 0, 1) for each in range(1, cluster.rounds + 1)))

    def trained(_: Path) -> dict[Training, tuple[Attempt, ...]]:
        return {(RUN, "partition-0", each): (FIRST,) for each in range(1, cluster.rounds + 1)}

    monkeypatch.setattr(verdict, "events_of", told)
    monkeypatch.setattr(verdict, "reader", lambda _: nullcontext(cluster))
    monkeypatch.setattr(verdict, "trainings_in", trained)
    monkeypatch.setattr(verdict, "_unreadable", lambda *_: {})
    run = verdict.JudgedRun(run_id=RUN, expected=lambda rounds: f"m{rounds}", min_nodes=1)

    assert broken(verdict.gather(cluster, [run], calls=tmp_path, kills=())) == ()
