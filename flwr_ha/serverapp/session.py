"""The seam to what keeps a run's rounds: a replica, a local folder, or nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr_ha.model import Head, Metrics, Position, RunStatus, utc_now

if TYPE_CHECKING:
    from flwr_ha.storage.checkpoint import Checkpoint

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it


class Session(Protocol):
    """Keep the rounds of one training."""

    @property
    def run_id(self) -> str:
        """Name of the training, the same in each of its lives; sampling is seeded with it."""
        ...

    @property
    def is_once_per_run(self) -> bool:
        """Whether a run can hold one training only."""
        ...

    @property
    def scratch_folder(self) -> Path | None:
        """Folder with room for replies that wait; None: the system's folder for temporary files."""
        ...

    def head(self) -> Head | None:
        """Return what is committed, or None where nothing is; a replica also says its term.

        Raises
        ------
        FencedError
            This process belongs to an older term: end at once.
        """
        ...

    def load(self, head: Head) -> Checkpoint:
        """Return a committed checkpoint; a corrupt local copy is replaced by a peer's first.

        Raises
        ------
        CheckpointError
            There is no good copy; the message names the previous checkpoint that is kept.
        FencedError
            This process belongs to an older term: end at once.
        """
        ...

    def commit(self, checkpoint: Checkpoint, metrics: Metrics) -> Head:
        """Make a round count; returns only when it does.

        Raises
        ------
        FencedError
            A newer term exists: nothing was committed, end at once.
        CheckpointError
            It can never be committed as it is.
        """
        ...

    def report(self, status: RunStatus) -> None:
        """Show what the run does; what cannot be shown is dropped. Raises FencedError as `commit` does."""
        ...

    def record(self, kind: str, message: str, **fields: Any) -> None:
        """Add an entry to the event log; what cannot be added is dropped."""
        ...

    def close(self) -> None:
        """Give connections and locks back."""
        ...


class NullSession:
    """Keep nothing: plain Flower, with the threshold and the repeated rounds."""

    is_once_per_run = False
    scratch_folder = None

    def __init__(self, *, run_id: str, app: str) -> None:
        self.run_id = run_id
        self._app = app

    def head(self) -> Head | None:
        """Return None: there is never anything."""
        return None

    def load(self, head: Head) -> Checkpoint:
        """Never called: `head` returns None."""
        raise AssertionError(f"nothing is kept, but {head} was asked for")

    def commit(self, checkpoint: Checkpoint, metrics: Metrics) -> Head:
        """Return a head without a digest."""
        return Head(
            run_id=self.run_id,
            app=self._app,
            num_rounds=checkpoint.num_rounds,
            position=Position(term=1, server_round=checkpoint.server_round, digest=""),
            model_digest="",
            size_bytes=0,
            committed_at=utc_now(),
            metrics=metrics,
        )

    def report(self, status: RunStatus) -> None:
        """Drop it: nobody asks."""

    def record(self, kind: str, message: str, **fields: Any) -> None:
        """Drop it: the log has it."""

    def close(self) -> None:
        """Do nothing."""


def open_session(*, run_id: str, app: str, name: str, checkpoint_dir: Path | None) -> Session:
    """Return the session of this process.

    A replica that runs this ServerApp comes first, then the folder, if one is given.

    Parameters
    ----------
    run_id : str
        Flower's run id, unsigned decimal.
    app : str
        ``publisher/name``; may be empty in a simulation.
    name : str
        Tells trainings of one app apart in `checkpoint_dir`.
    checkpoint_dir : Path or None
        Folder for checkpoints outside of a replica.
    """
    from flwr_ha import failpoints
    from flwr_ha.config import failpoint_from_environment, session_from_environment

    if (settings := session_from_environment()) is not None:
        failpoints.arm(failpoint_from_environment())
        from flwr_ha.serverapp.replica_session import ReplicaSession

        return ReplicaSession(settings, run_id=run_id, app=app)
    if checkpoint_dir is not None:
        from flwr_ha.serverapp.local_session import LocalSession

        return LocalSession(checkpoint_dir, run_id=run_id, app=app, name=name)
    return NullSession(run_id=run_id, app=app)
