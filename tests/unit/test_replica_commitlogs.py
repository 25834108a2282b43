"""The commit logs that a replica holds: right at every moment, and cheap whatever the past."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.coordination.memory import MemoryStore, MemoryTree
from flwr_ha.coordination.protocol import Versioned
from flwr_ha.model import Head, Position
from flwr_ha.replica import commitlogs
from flwr_ha.replica.commitlogs import CommitLogs


class CountingStore(MemoryStore):
    """Count what is read."""

    def __init__(self, tree: MemoryTree) -> None:
        super().__init__(tree)
        self.reads = 0

    def get(self, key: str) -> Versioned | None:
        self.reads += 1
        return super().get(key)

    def children(self, key: str) -> tuple[str, ...]:
        self.reads += 1
        return super().children(key)


class World:
    """A coordinator that commits, and logs that follow it."""

    def __init__(self) -> None:
        self.store = CountingStore(MemoryTree())
        self.store.start(lambda: None, timeout_s=1.0)
        self.coordinator = Coordinator(self.store, replica_id=0, instance="only")
        found = self.coordinator.campaign("a test")
        assert found is not None
        self.leadership: Leadership = found
        self.rounds: dict[str, int] = {}
        self.logs = CommitLogs(self.coordinator)

    def commit(self, run_id: str, *, to: int, num_rounds: int = 10**6, first: int = 1, app: str = "a/b") -> None:
        for server_round in range(self.rounds.get(run_id, first - 1) + 1, to + 1):
            digest = f"sha256:{int(run_id):032x}{server_round:032x}"
            position = Position(self.leadership.term, server_round, digest)
            head = Head(run_id=run_id, app=app, num_rounds=num_rounds, position=position, model_digest="", size_bytes=1)
            self.coordinator.commit(self.leadership, head)
            self.rounds[run_id] = server_round

    def follow(self) -> Mapping[str, tuple[Head, ...]]:
        return self.logs.follow(self.coordinator.heads())

    def followed_reads(self) -> int:
        heads = self.coordinator.heads()
        before = self.store.reads
        self.logs.follow(heads)
        return self.store.reads - before


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Small limits, so that logs soon count as long."""
    monkeypatch.setattr(commitlogs, "KEPT", 10)
    monkeypatch.setattr(commitlogs, "READ_AT_ONCE", 5)
    return World()


def rounds(log: tuple[Head, ...]) -> list[int]:
    return [head.position.server_round for head in log]


def test_each_commit_shows_at_once_and_is_not_read_again(world: World) -> None:
    """The head that the heartbeat has read anyway is the log's next entry."""
    for server_round in range(1, 15):
        world.commit("7", to=server_round)
        assert world.followed_reads() == 0
        assert rounds(world.follow()["7"]) == list(range(max(server_round - 9, 1), server_round + 1))


def test_rounds_between_two_heartbeats_are_read(world: World) -> None:
    """Rounds can be shorter than a heartbeat."""
    world.commit("7", to=2)
    world.follow()
    world.commit("7", to=5)

    assert world.followed_reads() == 2
    assert rounds(world.follow()["7"]) == [1, 2, 3, 4, 5]
    assert world.follow()["7"] == world.coordinator.commit_log("7")


def test_initial_model_is_no_round(world: World) -> None:
    """Round 0 has a head, but no entry."""
    world.commit("7", to=0, first=0)
    assert world.follow() == {"7": ()}
    assert world.logs.is_read("7")
    world.commit("7", to=1)
    assert rounds(world.follow()["7"]) == [1]


def test_ended_runs_of_the_past_cost_nothing(world: World) -> None:
    """Neither a heartbeat nor the commit of another run looks at them."""
    for run in range(1, 40):
        world.commit(str(run), to=1, num_rounds=1)
    world.follow()
    world.commit("99", to=1)
    assert world.followed_reads() == 0
    assert len(world.follow()) == 40


def test_long_log_is_left_to_another_thread_after_a_start(world: World) -> None:
    """A replica that starts can be elected before it has read thousands of rounds."""
    world.commit("7", to=300)
    world.commit("8", to=3)
    assert world.followed_reads() == 2  # run 8 alone
    assert rounds(world.follow()["7"]) == [300]
    assert not world.logs.is_read("7")
    assert world.logs.is_read("8")
    assert rounds(world.logs.newest(world.coordinator.heads()["7"], 3)) == [298, 299, 300]

    world.commit("7", to=301)
    assert rounds(world.follow()["7"]) == [301]
    assert world.logs.read_rest()
    world.commit("7", to=302)
    assert rounds(world.follow()["7"]) == list(range(293, 303))
    assert world.logs.is_read("7")
    assert not world.logs.read_rest()


def test_commits_while_a_log_is_read_are_added(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a thousand rounds takes longer than a round may take."""
    world.commit("7", to=300)
    world.follow()
    read = world.coordinator.committed_rounds

    def slowly(run_id: str, wanted: list[int]) -> dict[int, Head]:
        monkeypatch.undo()
        found = read(run_id, wanted)
        world.commit("7", to=302)
        assert rounds(world.follow()["7"]) == [302]
        return found

    monkeypatch.setattr(world.coordinator, "committed_rounds", slowly)
    assert world.logs.read_rest()
    assert len(world.follow()["7"]) > 1
    assert world.follow()["7"][-3:] == world.coordinator.commit_log("7")[-3:]


def test_run_that_was_begun_anew_is_read_anew(world: World) -> None:
    """The coordinator lost its data, and the run its rounds."""
    world.commit("7", to=4)
    world.follow()
    other = World()
    other.commit("7", to=2, app="b/c")
    world.logs._reader = other.coordinator
    assert world.logs.follow(other.coordinator.heads())["7"] == other.coordinator.commit_log("7")


@pytest.mark.parametrize("seed", range(30))
def test_logs_are_ends_of_the_truth_in_any_order_of_events(world: World, seed: int) -> None:
    """Whatever is shown is a gapless end of the commit log up to the head, and all of it in the end."""
    dice = random.Random(seed)
    for _ in range(120):
        match dice.randrange(4):
            case 0 | 1:
                run_id = str(dice.randrange(1, 4))
                world.commit(run_id, to=world.rounds.get(run_id, 0) + dice.choice([1, 1, 1, 3, 12]))
            case 2:
                world.logs.read_rest()
            case 3:
                if dice.random() < 0.1:
                    world.logs = CommitLogs(world.coordinator)
                for run_id, log in world.follow().items():
                    truth = world.coordinator.commit_log(run_id)
                    assert log == truth[-len(log) :]
                    assert not world.logs.is_read(run_id) or len(log) == min(len(truth), 10)
    world.follow()
    while world.logs.read_rest():
        world.follow()
    for run_id, log in world.follow().items():
        assert log == world.coordinator.commit_log(run_id)[-10:]
