"""A ServerApp without Flower: it commits rounds through a leader's session API, as fast as it is told.

A real ServerApp costs seconds to start and a round of real SuperNodes takes seconds more. What the faults
test, the way from a checkpoint to a commit and from a takeover to the next round, is the same here.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flwr_ha.config import session_from_environment
from flwr_ha.errors import CheckpointError, FencedError, HaError
from flwr_ha.local.cluster import SUPERLINK, LocalCluster
from flwr_ha.model import RunState, RunStatus
from flwr_ha.serverapp.replica_session import ReplicaSession
from flwr_ha.settings import SessionSettings
from flwr_ha.storage.checkpoint import Checkpoint

APP = "flwr-ha-tests/committer"


class LifeOverError(HaError):
    """The SuperLink that this ServerApp belongs to has ended: a real one would have ended with it."""


def session_of(cluster: LocalCluster, replica_id: int) -> SessionSettings | None:
    """Return what a ServerApp of this replica would find in its environment; None while it has no SuperLink."""
    pid = cluster.replicas[replica_id].find(SUPERLINK)
    return None if pid is None else _session_of_process(pid)


def _session_of_process(pid: int) -> SessionSettings | None:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return session_from_environment(dict(pair.decode().split("=", 1) for pair in pairs if b"=" in pair))


def model_after(server_round: int, *, size: int) -> NDArray[np.float64]:
    """Return the model that a run must have after a round, `(size,) float64`; the same in every life."""
    model = np.zeros(size)
    for each in range(1, server_round + 1):
        model = _next_model(model, each)
    return model


def _next_model(model: NDArray[np.float64], server_round: int) -> NDArray[np.float64]:
    return 0.9 * model + np.random.default_rng(server_round).normal(size=model.size)


class Committer:
    """Commit the rounds of one run, one life after the other.

    Parameters
    ----------
    cluster : LocalCluster
        Where.
    run_id : str
        An unsigned decimal that no run of Flower has.
    num_rounds : int
        Rounds that the run is to have.
    size : int
        Numbers in the model.
    pause_s : float
        Seconds that a round takes.
    """

    def __init__(
        self, cluster: LocalCluster, run_id: str, *, num_rounds: int, size: int = 1000, pause_s: float = 0.05
    ) -> None:
        self.run_id = run_id
        self.num_rounds = num_rounds
        self.errors: list[str] = []
        self.refusals: list[str] = []
        self.resumed: list[tuple[int, int]] = []
        self._cluster = cluster
        self._size = size
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"committer-{run_id}", daemon=True)
        self.round = 0

    def __enter__(self) -> Committer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Commit nothing more; may be called twice."""
        self._stop.set()
        self._thread.join(timeout=30.0)
        assert not self._thread.is_alive(), "the committer does not end"

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are committed."""
        return self.round >= self.num_rounds

    def _run(self) -> None:
        while not self._stop.is_set() and not self.is_finished:
            leader = self._cluster.leader()
            pid = None if leader is None else self._cluster.replicas[leader].find(SUPERLINK)
            if pid is not None:
                # A ServerApp of a frozen replica may wait for an answer for minutes. Like a real one it is
                # not waited for: what it does later, as an orphan of an old term, must do no harm.
                life = threading.Thread(target=self._live, args=(pid,), name=f"life-{pid}", daemon=True)
                life.start()
                while life.is_alive() and _session_of_process(pid) is not None and not self._stop.is_set():
                    life.join(0.05)
            self._stop.wait(0.1)

    def _live(self, pid: int) -> None:
        """Live one life: until the SuperLink process ends, or this ServerApp is refused."""
        settings = _session_of_process(pid)
        if settings is None:
            return
        session = ReplicaSession(settings, run_id=self.run_id, app=APP, sleep=lambda s: self._sleep(s, pid))
        try:
            self._train(session)
        except FencedError as error:
            self.refusals.append(str(error))
        except LifeOverError:
            pass
        except CheckpointError as error:
            self.errors.append(str(error))
            self._stop.set()
        finally:
            session.close()

    def _sleep(self, seconds: float, pid: int) -> None:
        self._stop.wait(seconds)
        if self._stop.is_set() or _session_of_process(pid) is None:
            raise LifeOverError

    def _train(self, session: ReplicaSession) -> None:
        head = session.head()
        done, model = 0, np.zeros(self._size)
        if head is None:
            self._commit(session, 0, model)
        else:
            done = head.position.server_round
            model = session.load(head).arrays["model"]
            if not np.array_equal(model, model_after(done, size=self._size)):
                raise CheckpointError(f"round {done} was loaded with another content than it was committed with")
            self.resumed.append((head.position.term, done))
        for server_round in range(done + 1, self.num_rounds + 1):
            if self._stop.wait(self._pause_s):
                return
            model = _next_model(model, server_round)
            self._commit(session, server_round, model)
            self.round = max(self.round, server_round)

    def _commit(self, session: ReplicaSession, server_round: int, model: NDArray[np.float64]) -> None:
        checkpoint = Checkpoint(
            run_id=self.run_id, server_round=server_round, num_rounds=self.num_rounds, arrays={"model": model}
        )
        session.report(
            RunStatus(run_id=self.run_id, app=APP, state=RunState.TRAINING, num_rounds=self.num_rounds, min_nodes=1)
        )
        session.commit(checkpoint, {"round": server_round})
