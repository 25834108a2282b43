"""Operations of the coordination store: for each round, and for each heartbeat with many runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.result import Figure, Scale
from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.memory import MemoryStore, MemoryTree
from flwr_ha.coordination.protocol import Operation, Versioned
from flwr_ha.model import Head, Position
from flwr_ha.replica.commitlogs import CommitLogs

ROUNDS = 5


class CountingStore(MemoryStore):
    """Count the requests that ZooKeeper would get."""

    def __init__(self, tree: MemoryTree) -> None:
        super().__init__(tree)
        self.requests: Counter[str] = Counter()

    def get(self, key: str) -> Versioned | None:
        """Count, then read."""
        self.requests["get"] += 1
        return super().get(key)

    def children(self, key: str) -> tuple[str, ...]:
        """Count, then read."""
        self.requests["children"] += 1
        return super().children(key)

    def transact(self, operations: Sequence[Operation]) -> None:
        """Count, then write."""
        self.requests["transact"] += 1
        super().transact(operations)


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Count for small and for big models and many clients, for few and for many runs."""
    small, big = _per_round(5, 10**6), _per_round(1000, 10**10)
    few, many = _per_beat(1), _per_beat(scale.pick(50, 500))
    young, old = _per_followed_round(2, 1), _per_followed_round(scale.pick(50, 500), scale.pick(50, 500))
    return [
        Figure(name="store operations for a round, 1,000 clients, 10 GB", value=big, unit="operations", against=small,
               ratio=big / small, goal=1.0),
        Figure(name="store operations for a heartbeat, 500 ended runs", value=many, unit="operations", against=few,
               ratio=many / few, goal=1.0),
        Figure(name="store operations of a replica that follows a round, after 500 rounds and 500 ended runs",
               value=old, unit="operations", against=young, ratio=old / young, goal=1.0),
    ]  # fmt: skip


def _coordinator() -> tuple[CountingStore, Coordinator]:
    store = CountingStore(MemoryTree())
    store.start(lambda: None, timeout_s=1.0)
    coordinator = Coordinator(store, replica_id=0, instance="bench")
    coordinator.join({"id": 0, "state": "running"}, wait_timeout_s=1.0)
    return store, coordinator


def _per_round(clients: int, model_bytes: int) -> float:
    """Commit some rounds: their metrics name no client, and the model goes by its digest."""
    store, coordinator = _coordinator()
    leadership = coordinator.campaign("bench")
    assert leadership is not None
    metrics = {"train_loss": 1.0 / clients, "accuracy": 0.9}

    def train() -> None:
        for server_round in range(1, ROUNDS + 1):
            coordinator.commit(leadership, _head("1", server_round, ROUNDS, model_bytes, metrics))

    return _count(store, train) / ROUNDS


def _per_beat(runs: int) -> float:
    store, coordinator = _coordinator()
    leadership = coordinator.campaign("bench")
    assert leadership is not None
    for run in range(runs):
        coordinator.commit(leadership, _head(str(run), 1, 1, 10**6, {}))
    coordinator.view()
    return float(_count(store, coordinator.view))


def _per_followed_round(past_rounds: int, past_runs: int) -> float:
    """Let a replica see the next commit of a run, as its heartbeat does."""
    store, coordinator = _coordinator()
    leadership = coordinator.campaign("bench")
    assert leadership is not None
    for run in range(past_runs):
        coordinator.commit(leadership, _head(str(run), 1, 1, 10**6, {}))
    for server_round in range(1, past_rounds + 1):
        coordinator.commit(leadership, _head("99999", server_round, past_rounds + 1, 10**6, {}))
    logs = CommitLogs(coordinator)
    logs.follow(coordinator.view().heads)
    while logs.read_rest():
        logs.follow(coordinator.view().heads)
    coordinator.commit(leadership, _head("99999", past_rounds + 1, past_rounds + 1, 10**6, {}))
    return float(_count(store, lambda: logs.follow(coordinator.view().heads)))


def _head(run_id: str, server_round: int, num_rounds: int, size_bytes: int, metrics: dict[str, float]) -> Head:
    return Head(
        run_id=run_id,
        app="bench/steps",
        num_rounds=num_rounds,
        position=Position(1, server_round, f"sha256:{server_round:064x}"),
        model_digest="",
        size_bytes=size_bytes,
        copies=(0, 1, 2),
        metrics=metrics,
    )


def _count(store: CountingStore, act: Callable[[], object]) -> int:
    before = sum(store.requests.values())
    act()
    return sum(store.requests.values()) - before
