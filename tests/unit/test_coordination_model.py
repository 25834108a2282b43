"""A random walk over the coordinator with lost answers and lost sessions, checked against a model."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flwr_ha.coordination import ledger
from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.coordination.memory import MemoryTree
from flwr_ha.coordination.reader import ClusterReader
from flwr_ha.errors import CheckpointError, CoordinationError, FencedError
from flwr_ha.model import Head, Position

REPLICAS = st.integers(0, 2)


class Walk(RuleBasedStateMachine):
    """Let three replicas campaign, commit, renew and resign while their sessions and answers get lost.

    A replica keeps every leadership that it ever won, and tries to commit under any of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pause = pytest.MonkeyPatch()
        self.pause.setattr(ledger, "RETRY_PAUSE_S", 0.0)
        tree = MemoryTree()
        self.stores = [tree.store(session_timeout_s=60.0) for _ in range(3)]
        for store in self.stores:
            store.start(lambda: None, timeout_s=1)
        self.coordinators = [
            Coordinator(store, replica_id=index, instance=f"start-{index}") for index, store in enumerate(self.stores)
        ]
        watcher = tree.store()
        watcher.start(lambda: None, timeout_s=1)
        self.reader = ClusterReader(watcher)
        self.won: list[tuple[int, Leadership]] = []
        self.committed: dict[int, Head] = {}
        self.newest_term = 0
        self.letters = 0

    def teardown(self) -> None:
        """Undo what `__init__` patched."""
        self.pause.undo()

    @rule(replica=REPLICAS)
    def campaign(self, replica: int) -> None:
        """Take the next term; nobody else may have it."""
        before = self.reader.view()
        try:
            leadership = self.coordinators[replica].campaign("random")
        except CoordinationError:
            return
        if leadership is not None:
            assert leadership.term == before.term + 1
            assert all(leadership.term != other.term for _, other in self.won)
            self.won.append((replica, leadership))

    @rule(replica=REPLICAS)
    def expire(self, replica: int) -> None:
        """Lose a session."""
        self.stores[replica].expire()

    @rule(replica=REPLICAS, answers=st.lists(st.booleans(), min_size=1, max_size=3))
    def lose_answers(self, replica: int, answers: list[bool]) -> None:
        """Let the next transactions end without an answer, applied or not."""
        for is_applied in answers:
            self.stores[replica].lose_answer(is_applied=is_applied)

    @rule(data=st.data(), step=st.integers(-1, 1))
    def commit(self, data: st.DataObject, step: int) -> None:
        """Commit a round with new content under any leadership, old or new."""
        if not self.won:
            return
        replica, leadership = data.draw(st.sampled_from(self.won[-3:]))
        current = self.reader.head("17")
        server_round = max(0, (current.position.server_round if current else -1) + 1 + step)
        self.letters += 1
        head = Head(
            run_id="17",
            app="test/app",
            num_rounds=10,
            position=Position(leadership.term, server_round, f"sha256:{self.letters:064}"),
            model_digest="",
            size_bytes=1,
        )
        leader = self.reader.leader()
        try:
            committed = self.coordinators[replica].commit(leadership, head)
        except (FencedError, CheckpointError, CoordinationError):
            return
        assert committed.position == head.position
        assert leader is not None
        assert leader.term == leadership.term == self.reader.view().term
        assert step == 0 or (current is None and server_round in (0, 1))

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """Get a lease only while holding the leader entry."""
        if not self.won:
            return
        replica, leadership = data.draw(st.sampled_from(self.won[-3:]))
        try:
            self.coordinators[replica].renew(leadership, {})
        except (FencedError, CoordinationError):
            return
        leader = self.reader.leader()
        assert leader is not None
        assert (leader.term, leader.replica_id) == (leadership.term, replica)

    @rule(data=st.data())
    def resign(self, data: st.DataObject) -> None:
        """Give a leadership up, without touching a newer one."""
        if not self.won:
            return
        replica, leadership = data.draw(st.sampled_from(self.won[-3:]))
        leader = self.reader.leader()
        try:
            self.coordinators[replica].resign(leadership)
        except CoordinationError:
            return
        if leader is not None and leader.term != leadership.term:
            assert self.reader.leader() == leader

    @invariant()
    def terms_rise(self) -> None:
        """Check that term and history only grow, and that the leader has the newest term."""
        view = self.reader.view()
        assert view.term >= self.newest_term
        self.newest_term = view.term
        assert view.leader is None or view.leader.term == view.term
        assert [change.term for change in self.reader.history()] == list(range(1, view.term + 1))

    @invariant()
    def committed_rounds_never_change(self) -> None:
        """Check that a round stays as it was first seen, terms rise along the log."""
        log = self.reader.commit_log("17")
        for head in log:
            assert self.committed.setdefault(head.position.server_round, head) == head
        rounds = [head.position.server_round for head in log]
        assert rounds == sorted(self.committed) == list(range(1, len(rounds) + 1))
        assert [head.position.term for head in log] == sorted(head.position.term for head in log)


Walk.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_terms_rise_and_committed_rounds_never_change = Walk.TestCase
