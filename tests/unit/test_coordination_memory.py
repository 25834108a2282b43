"""What the coordinator does when the store is away for long, on the store in memory."""

import time

import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.memory import MemoryStore, MemoryTree
from flwr_ha.coordination.protocol import Versioned
from flwr_ha.errors import CoordinationError
from flwr_ha.model import Head, Position

SESSION_TIMEOUT_S = 0.15
HEAD = Head(
    run_id="17",
    app="test/app",
    num_rounds=10,
    position=Position(1, 0, "sha256:" + "a" * 64),
    model_digest="sha256:" + "a" * 64,
    size_bytes=1,
)


@pytest.fixture
def tree():
    """Return an empty tree."""
    return MemoryTree()


@pytest.fixture
def store(tree):
    """Return a started session."""
    store = tree.store(session_timeout_s=SESSION_TIMEOUT_S)
    store.start(lambda: None, timeout_s=1)
    return store


@pytest.fixture
def coordinator(store):
    """Return a coordinator on the session."""
    return Coordinator(store, replica_id=0, instance="first")


def test_a_commit_gives_up_after_a_lease(coordinator, store):
    """The outcome is unknown and stays so: the caller is told in time to step down."""
    leadership = coordinator.campaign("start")
    store.set_reachable(False)

    started_s = time.monotonic()
    with pytest.raises(CoordinationError):
        coordinator.commit(leadership, HEAD)

    assert store.lease_s <= time.monotonic() - started_s < 10 * store.lease_s


def test_a_commit_goes_through_when_the_store_comes_back(tree):
    """Two lost answers in a row, one of them after it was applied."""
    store = tree.store(session_timeout_s=60.0)
    store.start(lambda: None, timeout_s=1)
    coordinator = Coordinator(store, replica_id=0, instance="first")
    leadership = coordinator.campaign("start")
    store.lose_answer(is_applied=False)
    store.lose_answer(is_applied=True)

    committed = coordinator.commit(leadership, HEAD)

    assert committed.position == HEAD.position
    assert committed.committed_at.endswith("Z")
    assert coordinator.head("17") == committed


def test_every_call_says_when_the_store_is_away(coordinator, store):
    """None of them makes an answer up."""
    leadership = coordinator.campaign("start")
    store.set_reachable(False)

    for call in (
        coordinator.view,
        lambda: coordinator.campaign("x"),
        lambda: coordinator.publish({}),
        lambda: coordinator.renew(leadership, {}),
        lambda: coordinator.resign(leadership),
        lambda: coordinator.set_paused(True),
        lambda: coordinator.request_switchover(1),
    ):
        with pytest.raises(CoordinationError):
            call()


def test_a_left_over_leadership_is_not_mistaken_for_that_of_a_faster_replica(tree, store, coordinator, monkeypatch):
    """Between two reads of a campaign its own old session ends and another replica wins: it stays the leader."""
    other_store = tree.store()
    other_store.start(lambda: None, timeout_s=1)
    other = Coordinator(other_store, replica_id=1, instance="second")
    coordinator.campaign("start")
    get = store.get

    def get_late(key):
        if key == "term":
            monkeypatch.undo()
            store.expire()
            assert other.campaign("the leader is gone").term == 2
        return get(key)

    monkeypatch.setattr(store, "get", get_late)

    assert coordinator.campaign("again") is None
    assert other.leader().replica_id == 1


def test_ended_runs_of_the_past_cost_a_heartbeat_nothing() -> None:
    """A replica reads all heads several times a second; the last head of a run is read once."""

    class Counting(MemoryStore):
        reads = 0

        def get(self, key: str) -> Versioned | None:
            self.reads += 1
            return super().get(key)

    tree = MemoryTree()
    store = Counting(tree)
    store.start(lambda: None, timeout_s=1.0)
    coordinator = Coordinator(store, replica_id=0, instance="a")
    coordinator.join({"id": 0}, wait_timeout_s=1.0)
    leadership = coordinator.campaign("first")
    assert leadership is not None

    def commit(run_id: str, server_round: int, num_rounds: int) -> None:
        position = Position(leadership.term, server_round, f"sha256:{server_round:064x}")
        head = Head(run_id=run_id, app="a/b", num_rounds=num_rounds, position=position, model_digest="", size_bytes=1)
        coordinator.commit(leadership, head)

    def reads() -> int:
        before = store.reads
        coordinator.view()
        return store.reads - before

    commit("open", 1, 5)
    alone = reads()
    for run in range(20):
        commit(str(run), 1, 1)
    assert reads() > alone
    assert reads() == alone
    commit("open", 2, 5)
    assert coordinator.heads()["open"].position.server_round == 2
    assert len(coordinator.heads()) == 21
