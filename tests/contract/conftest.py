"""The stores that the contract tests run on: in memory, embedded, and a real ZooKeeper ensemble."""

import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from kazoo.client import KazooClient

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.embedded import EmbeddedStore, _drop_session
from flwr_ha.coordination.memory import MemoryStore, MemoryTree
from flwr_ha.coordination.protocol import ConflictError, Operation, Store, Versioned
from flwr_ha.coordination.zookeeper import ZooKeeperStore
from flwr_ha.errors import CoordinationError
from flwr_ha.local.zookeeper import LocalEnsemble
from flwr_ha.model import Head, Position

SESSION_TIMEOUT_S = 2.0  # sessions must live through a busy machine
MEMORY_TIMEOUT_S = 1.0
START_TIMEOUT_S = 10.0
HOLDER = """
import sys
from pathlib import Path
from flwr_ha.coordination.embedded import EmbeddedStore, _drop_session
from flwr_ha.coordination.protocol import Create
from flwr_ha.coordination.zookeeper import ZooKeeperStore
kind, place, root, timeout_s, key = sys.argv[1:]
store = (EmbeddedStore(Path(place), session_timeout_s=float(timeout_s)) if kind == "embedded"
         else ZooKeeperStore(place, root, session_timeout_s=float(timeout_s)))
store.start(lambda: None, timeout_s=10.0)
store.transact([Create(key, b"here", is_ephemeral=True)])
print("ready", flush=True)
sys.stdin.read()
"""


class Flaky:
    """Is a store whose next transactions lose their answers, before or after they are applied."""

    def __init__(self, store: Store) -> None:
        self.inner = store
        self.lose_next: list[bool] = []

    @property
    def session_timeout_s(self) -> float:
        return self.inner.session_timeout_s

    @property
    def lease_s(self) -> float:
        return self.inner.lease_s

    def proven_until(self, started_s: float) -> float:
        return self.inner.proven_until(started_s)

    def start(self, on_change: Callable[[], None], *, timeout_s: float) -> None:
        self.inner.start(on_change, timeout_s=timeout_s)

    def get(self, key: str) -> Versioned | None:
        return self.inner.get(key)

    def children(self, key: str) -> tuple[str, ...]:
        return self.inner.children(key)

    def together(self) -> AbstractContextManager[None]:
        return self.inner.together()

    def transact(self, operations: Sequence[Operation]) -> None:
        if not self.lose_next:
            self.inner.transact(operations)
            return
        if self.lose_next.pop(0):
            try:
                self.inner.transact(operations)
            except ConflictError as error:
                raise CoordinationError("the answer was lost") from error
        raise CoordinationError("the answer was lost")

    def close(self) -> None:
        self.inner.close()


class Cluster:
    """Open stores of one kind that share a tree, and take sessions away from them."""

    def __init__(self, kind: str, place: str, exits: ExitStack) -> None:
        self.kind = kind
        self._place = place
        self._root = f"/flwr-ha/{uuid.uuid4().hex}"
        self._tree = MemoryTree()
        self._exits = exits

    def store(self, on_change: Callable[[], None] = lambda: None) -> Flaky:
        """Return a new started store."""
        store: Store
        match self.kind:
            case "memory":
                store = self._tree.store(session_timeout_s=MEMORY_TIMEOUT_S)
            case "embedded":
                store = EmbeddedStore(Path(self._place), session_timeout_s=SESSION_TIMEOUT_S)
            case _:
                store = ZooKeeperStore(self._place, self._root, session_timeout_s=SESSION_TIMEOUT_S)
        store.start(on_change, timeout_s=START_TIMEOUT_S)
        self._exits.callback(store.close)
        return Flaky(store)

    def coordinator(self, replica_id: int, instance: str = "") -> Coordinator:
        """Return the coordinator of a new session."""
        return Coordinator(self.store(), replica_id=replica_id, instance=instance or uuid.uuid4().hex)

    def lose_session(self, store: Store) -> None:
        """End the session of a store as if it had been silent for too long."""
        inner = store.inner if isinstance(store, Flaky) else store
        if isinstance(inner, MemoryStore):
            inner.expire()
        elif isinstance(inner, EmbeddedStore):
            with closing(sqlite3.connect(Path(self._place) / "coordinator.db", timeout=10)) as database, database:
                _drop_session(database, inner._session)  # what a session does that sees another one dead
        elif isinstance(inner, ZooKeeperStore):
            double = KazooClient(hosts=self._place, client_id=inner._client.client_id)
            double.start()
            double.stop()
            double.close()

    @contextmanager
    def holder(self, key: str) -> Iterator[subprocess.Popen[str]]:
        """Run another process that holds an ephemeral entry."""
        arguments = [self.kind, self._place, self._root, str(SESSION_TIMEOUT_S), key]
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()


@pytest.fixture(params=["memory", "embedded", pytest.param("zookeeper", marks=pytest.mark.zookeeper)])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Return an empty cluster of each kind."""
    yield from _cluster(request)


@pytest.fixture(params=["embedded", pytest.param("zookeeper", marks=pytest.mark.zookeeper)])
def process_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Return an empty cluster of each kind that several processes can share."""
    yield from _cluster(request)


def _cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    place = str(request.getfixturevalue("tmp_path"))
    if request.param == "zookeeper":
        ensemble: LocalEnsemble = request.getfixturevalue("ensemble")
        place = ensemble.connect_string
    with ExitStack() as exits:
        yield Cluster(request.param, place, exits)


@pytest.fixture
def make_head() -> Callable[..., Head]:
    """Return a function that makes heads of run 17 with content named by a letter."""

    def make(term: int, server_round: int, letter: str = "a", run_id: str = "17") -> Head:
        return Head(
            run_id=run_id,
            app="test/app",
            num_rounds=10,
            position=Position(term, server_round, "sha256:" + letter * 64),
            model_digest="sha256:" + letter * 64,
            size_bytes=100,
            copies=(0, 1),
            metrics={"loss": 0.5},
        )

    return make


@pytest.fixture
def insist() -> Callable[..., object]:
    """Return a function that repeats a call while the store does not answer, as the agent does."""

    def call(function: Callable[..., object], *arguments: object) -> object:
        deadline_s = time.monotonic() + 10
        while True:
            try:
                return function(*arguments)
            except CoordinationError:
                assert time.monotonic() < deadline_s, "the store did not answer for 10 s"
                threading.Event().wait(0.02)

    return call
