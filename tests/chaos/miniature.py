"""A replica without its SuperLink, in one small process: it campaigns, takes over, commits rounds, and ends.

Started as ``python -m tests.chaos.miniature JSON`` by the tests of the failpoints. What it does between
an election and the last commit is the product's own code; only the SuperLink process is a stand-in, over a
database that Flower made.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from starlette.applications import Starlette

from flwr_ha import failpoints
from flwr_ha.config import failpoint_from_environment
from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.embedded import EmbeddedStore
from flwr_ha.local.processes import wait_until
from flwr_ha.model import Head, RunStatus
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.duties import Duties, Tools
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import Holdings
from flwr_ha.replica.sessionapi import session_routes
from flwr_ha.serverapp.replica_session import ReplicaSession
from flwr_ha.settings import Endpoint, SessionSettings, TlsSettings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint
from flwr_ha.storage.objectstore import ObjectStorage
from flwr_ha.storage.replication import Peer, Replicator
from flwr_ha.superlink.process import SuperLinkProcess

RUN = "77"
TOKEN = "a token of this process"
SESSION_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Say who this is and how far it goes.

    Attributes
    ----------
    replica_id : int
        Own id.
    folder : str
        Of the whole cluster.
    peers : dict of str to str
        ``host:port`` of the other replicas' blobs, by id.
    secret : str
        Of the replicas.
    rounds : int
        Rounds that the run has at the end.
    storage : str
        URL of an object store; empty: copies on other replicas.
    has_new_node : bool
        Whether a SuperNode registers itself right after the takeover.
    """

    replica_id: int
    folder: str
    peers: dict[str, str]
    secret: str
    rounds: int
    storage: str = ""
    has_new_node: bool = False

    def to_text(self) -> str:
        """Return the command-line argument."""
        return json.dumps(asdict(self))


class FakeSuperLink:
    """Take the place of `SuperLinkProcess` where duties only open its socket."""

    def open_public(self, address: str, timeout_s: float) -> None:
        """Pretend."""


class Host:
    """Answer the session API as a replica does; see `flwr_ha.replica.sessionapi.ServerAppHost`."""

    def __init__(self, tools: Tools, duties: Duties) -> None:
        self._tools = tools
        self._duties = duties

    def session_token(self) -> str:
        """Return the token."""
        return TOKEN

    def open_session(self, run_id: str) -> dict[str, Any]:
        """Return the committed head."""
        head = self._tools.coordinator.head(run_id)
        return {
            "term": self._duties.leadership.term,
            "replica": self._tools.replica_id,
            "blobs": str(self._tools.store.root.absolute()),
            "head": None if head is None else head.to_json(),
            "previous": None,
        }

    def offer(self, digests: Sequence[str]) -> None:
        """Begin to copy."""
        self._tools.storage.offer(digests)

    def commit(self, run_id: str, body: dict[str, Any]) -> Head:
        """Commit."""
        return self._duties.commit(run_id, body, lambda: None)

    def report(self, status: RunStatus) -> None:
        """Ignore."""

    def note(self, run_id: str, body: dict[str, Any]) -> None:
        """Ignore."""

    def repair(self, digest: str) -> None:
        """Fetch."""
        self._tools.storage.fetch([digest], timeout_s=10.0)


def model_after(server_round: int) -> np.ndarray[Any, Any]:
    """Return the model of a round, large enough to be a part of its own."""
    return np.random.default_rng(server_round).normal(size=20_000)


def checkpoint_of(server_round: int, rounds: int) -> Checkpoint:
    """Return the checkpoint that ends a round."""
    arrays = {"model": model_after(server_round)}
    return Checkpoint(run_id=RUN, server_round=server_round, num_rounds=rounds, arrays=arrays)


@contextmanager
def _tools(job: Job) -> Iterator[Tools]:
    folder = Path(job.folder) / f"replica-{job.replica_id}"
    blobs = BlobStore(folder / "store")
    store = EmbeddedStore(Path(job.folder) / "coordinator", session_timeout_s=SESSION_S)
    store.start(lambda: None, timeout_s=10.0)
    coordinator = Coordinator(store, replica_id=job.replica_id, instance=f"{job.replica_id}-{time.monotonic_ns()}")
    try:
        with _storage(job, blobs) as storage:
            yield Tools(
                replica_id=job.replica_id,
                needed_copies=0 if job.storage else 1,
                store=blobs,
                storage=storage,
                holdings=Holdings(blobs, storage, coordinator, keep_checkpoints=3),
                coordinator=coordinator,
                events=EventLog(folder / "events.jsonl", replica_id=job.replica_id),
            )
    finally:
        store.close()


def _storage(job: Job, blobs: BlobStore) -> Replicator | ObjectStorage:
    if job.storage:
        return ObjectStorage(job.storage, blobs)
    peers = [Peer(int(replica_id), address) for replica_id, address in job.peers.items()]
    return Replicator(blobs, peers, secret=job.secret, timeout_s=2.0, grace_s=0.5)


def run(job: Job) -> None:
    """Lead until the run has all of its rounds."""
    database = Path(job.folder) / f"replica-{job.replica_id}" / "state.db"
    with _tools(job) as tools:
        leadership = wait_until(lambda: tools.coordinator.campaign("a test"), timeout_s=30.0, what="the election")
        failpoints.reach("takeover.elected")
        duties = Duties(tools, leadership, cast(SuperLinkProcess, FakeSuperLink()), database)
        duties.take_over("127.0.0.1:1", ())
        if job.has_new_node:
            _register_node(database)
        assert duties.replicate_control(), "the control plane was not committed"
        with ApiServer(Endpoint("127.0.0.1", 0), tls=TlsSettings()) as server:
            server.start(Starlette(routes=session_routes(Host(tools, duties))))
            _train(job, f"http://127.0.0.1:{server.port}")


def _register_node(database: Path) -> None:
    """Let Flower's own code register a node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
    state: Any = get_objectstore_linkstate_factories(str(database), get_federation_manager(is_simulation=False))[
        1
    ].state()
    assert state.activate_node(state.create_node("aid", "name", b"a key", 30.0), 30.0)


def _train(job: Job, url: str) -> None:
    session = ReplicaSession(SessionSettings(url, TOKEN), run_id=RUN, app="a/b")
    head = session.head()
    done = -1
    if head is not None:
        done = head.position.server_round
        loaded = session.load(head)
        assert np.array_equal(loaded.arrays["model"], model_after(done)), "the head is not what was committed"
    for server_round in range(done + 1, job.rounds + 1):
        session.commit(checkpoint_of(server_round, job.rounds), {"round": server_round})
    session.close()


if __name__ == "__main__":
    failpoints.arm(failpoint_from_environment())
    run(Job(**json.loads(sys.argv[1])))
