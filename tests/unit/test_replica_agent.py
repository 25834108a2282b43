"""The agent's loop, with a coordinator in memory and a SuperLink that is always ready."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.memory import MemoryStore, MemoryTree
from flwr_ha.coordination.protocol import Operation
from flwr_ha.errors import CheckpointError, CoordinationError
from flwr_ha.local.processes import wait_until
from flwr_ha.replica.agent import LONGEST_PAUSE_S, Agent, Life
from flwr_ha.replica.duties import Duties
from flwr_ha.replica.machine import Phase, Timing
from flwr_ha.replica.messages import Seen, StartSuperLink, StopAsked, SuperLinkReady


class SilentAfterTransaction(MemoryStore):
    """A store that applies a transaction, loses its answer, and then does not answer at all."""

    def transact(self, operations: Sequence[Operation]) -> None:
        try:
            super().transact(operations)
        except CoordinationError:
            self.set_reachable(False)
            raise


def make_agent(store: MemoryStore, coordinator: Coordinator) -> Agent:
    """Return the agent of replica 1, not started."""
    superlink = SimpleNamespace(start=lambda: None, close=lambda: None, set_lease=lambda until_s: None)
    tools = SimpleNamespace(
        coordinator=coordinator,
        events=SimpleNamespace(add=lambda *args, **fields: None),
        storage=SimpleNamespace(close=lambda: None),
    )
    return Agent(
        cast(Any, SimpleNamespace(id=1, address="127.0.0.1:8000")),
        cast(Any, tools),
        lambda on_event: Life(superlink=cast(Any, superlink), database=Path("state.db"), token=""),
        proven_until=store.proven_until,
        timing=Timing(),
    )


def seen(coordinator: Coordinator) -> Seen:
    """Read the coordinator, as the pulse does."""
    view = coordinator.view()
    return Seen(leader=view.leader.replica_id if view.leader else None, term=view.term)


def test_leadership_whose_grant_was_never_heard_is_given_up() -> None:
    """ZooKeeper is silent right after the election and its session lives on: another campaign must be possible."""
    store = SilentAfterTransaction(MemoryTree())
    store.start(lambda: None, timeout_s=1.0)
    coordinator = Coordinator(store, replica_id=1, instance="this start")
    agent = make_agent(store, coordinator)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        nobody = seen(coordinator)
        store.lose_answer(is_applied=True)
        agent.post(SuperLinkReady())
        agent.post(nobody)
        wait_until(lambda: agent.state.leaderless_since_s is not None, timeout_s=5.0, what="the campaign", poll_s=0.01)
        wait_until(lambda: agent.state.phase is Phase.STANDBY, timeout_s=5.0, what="its failure", poll_s=0.01)
        store.set_reachable(True)
        listed = seen(coordinator)
        assert (listed.leader, listed.term) == (1, 1)

        agent.post(listed)

        wait_until(lambda: seen(coordinator).leader is None, timeout_s=5.0, what="the resignation", poll_s=0.01)
        assert agent.state.phase is Phase.STANDBY
    finally:
        agent.post(StopAsked("the test ends"))
        thread.join(5.0)
    assert not thread.is_alive()


def test_campaign_that_fails_in_an_unforeseen_way_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica stands by and can be stopped; it would else wait for the outcome for ever."""
    store = MemoryTree().store()
    store.start(lambda: None, timeout_s=1.0)
    coordinator = Coordinator(store, replica_id=1, instance="this start")
    agent = make_agent(store, coordinator)
    reasons: list[str] = []

    def fail(reason: str) -> None:
        reasons.append(reason)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(coordinator, "campaign", fail)
    thread = threading.Thread(target=agent.run)
    thread.start()
    agent.post(SuperLinkReady())
    agent.post(seen(coordinator))
    wait_until(lambda: reasons and agent.state.phase is Phase.STANDBY, timeout_s=5.0, what="its end", poll_s=0.01)
    agent.post(StopAsked("the test ends"))
    thread.join(5.0)
    assert not thread.is_alive()


def test_stop_does_not_wait_for_the_checkpoint_that_a_takeover_fetches() -> None:
    """It may be gigabytes, or a peer that answers no more."""
    store = MemoryTree().store()
    store.start(lambda: None, timeout_s=1.0)
    coordinator = Coordinator(store, replica_id=1, instance="this start")
    agent = make_agent(store, coordinator)
    is_fetching, is_closed = threading.Event(), threading.Event()

    def fetch(*_: object) -> None:
        is_fetching.set()
        assert is_closed.wait(60.0)
        raise CheckpointError("the transfer was given up")

    agent.tools = cast(Any, SimpleNamespace(**{**vars(agent.tools), "storage": SimpleNamespace(close=is_closed.set)}))
    agent.list_stale = tuple
    thread = threading.Thread(target=agent.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Duties, "take_over", fetch)
        thread.start()
        agent.post(SuperLinkReady())
        agent.post(seen(coordinator))
        assert is_fetching.wait(5.0)
        agent.post(StopAsked("the test ends"))
        thread.join(5.0)
    assert not thread.is_alive()
    assert coordinator.leader() is None


def test_superlink_that_does_not_start_for_days_is_still_tried_again() -> None:
    """The pause between two attempts stays what it is; the number of failures grows."""
    store = MemoryTree().store()
    store.start(lambda: None, timeout_s=1.0)
    agent = make_agent(store, Coordinator(store, replica_id=1, instance="this start"))
    agent._failed_starts = 100_000
    before_s = time.monotonic()
    agent._perform(StartSuperLink("again"))
    assert agent._start_due_s is not None
    assert agent._start_due_s - before_s == pytest.approx(LONGEST_PAUSE_S, abs=1.0)
