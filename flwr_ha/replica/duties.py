"""What a leader does: take over, keep the control plane safe, commit rounds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.errors import CheckpointError, HaError, NoMajorityError
from flwr_ha.model import Head, Position
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import Holdings, Storage
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.superlink import linkstate
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.snapshot import unfinished_runs

log = logging.getLogger(__name__)
FETCH_TIMEOUT_S = 600.0
OPEN_TIMEOUT_S = 5.0
PROTECT_CONTROL_TIMEOUT_S = 10.0
PROTECT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Hold what the duties of one replica need.

    Attributes
    ----------
    replica_id : int
        Own id.
    needed_copies : int
        Copies on other replicas without which nothing is committed.
    store, storage, holdings, coordinator, events
        The parts of this replica.
    """

    replica_id: int
    needed_copies: int
    store: BlobStore
    storage: Storage
    holdings: Holdings
    coordinator: Coordinator
    events: EventLog


class Duties:
    """Carry out one leadership; made anew for each term.

    Parameters
    ----------
    tools : Tools
        The parts of this replica.
    leadership : Leadership
        Term under which everything is committed.
    superlink : SuperLinkProcess
        The warm SuperLink that serves this term.
    database : Path
        Its database.
    """

    def __init__(self, tools: Tools, leadership: Leadership, superlink: SuperLinkProcess, database: Path) -> None:
        self.leadership = leadership
        self._tools = tools
        self._superlink = superlink
        self._database = database
        self._control_lock = threading.Lock()
        self._control_digest = ""
        self._commit_lock = threading.Lock()

    def take_over(self, address: str) -> None:
        """Get the bytes, carry the control plane over, open the public socket.

        Raises
        ------
        HaError
            This replica cannot serve now: give the leadership up, so that another one can try.
        """
        tools = self._tools
        control = tools.coordinator.control_head()
        if control is not None:
            tools.holdings.ensure(control.digest, is_control=True, timeout_s=FETCH_TIMEOUT_S)
            snapshot = tools.store.read(control.digest)
            self._ensure_checkpoints(unfinished_runs(snapshot))
            linkstate.restore(self._database, snapshot, tools.store.read, now_s=time.time())
            self._control_digest = control.digest
        self._superlink.open_public(address, timeout_s=OPEN_TIMEOUT_S)

    def _ensure_checkpoints(self, unfinished: frozenset[str]) -> None:
        for run_id, head in self._tools.coordinator.heads().items():
            try:
                self._tools.holdings.ensure(head.position.digest, is_control=False, timeout_s=FETCH_TIMEOUT_S)
            except CheckpointError as error:
                if run_id in unfinished:
                    raise
                self._tools.events.add("copy-missing", f"checkpoint of the ended run {run_id} is not here: {error}")

    def replicate_control(self) -> bool:
        """Commit the control plane as it is now; return whether it is safe on a majority.

        Called before a change is acknowledged, and now and then for what changes by itself.
        """
        tools = self._tools
        with self._control_lock:
            try:
                control = linkstate.export(self._database, tools.store.put)
                digest = tools.store.put(control.snapshot)
                if digest == self._control_digest:
                    return True
                copies = tools.storage.protect(
                    [*control.blobs, digest], needed=tools.needed_copies, timeout_s=PROTECT_CONTROL_TIMEOUT_S
                )
                tools.coordinator.commit_control(self.leadership, digest, (tools.replica_id, *copies))
            except HaError as error:
                tools.events.add("not-committed", f"control plane: {error}", term=self.leadership.term)
                return False
            self._control_digest = digest
            return True

    def commit(self, run_id: str, body: Mapping[str, Any], check: Callable[[], None]) -> Head:
        """Make a round count.

        Parameters
        ----------
        run_id : str
            Flower's run id.
        body : mapping
            The session protocol's commit: server_round, digest, parts, model_digest, bytes, …
        check : callable
            Raises FencedError where the leadership has been given up meanwhile.

        Returns
        -------
        Head
            As committed.

        Raises
        ------
        FencedError
            A newer term exists: the ServerApp must end.
        NoMajorityError, CoordinationError
            Not committed: try again.
        """
        tools = self._tools
        with self._commit_lock:
            done = tools.coordinator.head(run_id)
            if done is not None and done.position.digest == body["digest"]:
                return done
            digests = [*body["parts"], body["digest"]]
            absent = [digest for digest in digests if not tools.store.has(digest)]
            if absent:
                raise CheckpointError(f"{absent[0]} was not written to {tools.store.root}")
            copies = self._protect(run_id, digests)
            check()
            head = Head(
                run_id=run_id,
                app=body["app"],
                num_rounds=body["num_rounds"],
                position=Position(self.leadership.term, body["server_round"], body["digest"]),
                model_digest=body["model_digest"],
                size_bytes=body["bytes"],
                copies=tuple(sorted((tools.replica_id, *copies))),
                metrics=body["metrics"],
            )
            head = tools.coordinator.commit(self.leadership, head)
        tools.events.add(
            "commit",
            f"round {head.position.server_round} of run {run_id} is on replicas {', '.join(map(str, head.copies))}",
            run_id=run_id,
            server_round=head.position.server_round,
            term=head.position.term,
            digest=head.position.digest,
            model_digest=head.model_digest,
        )
        return head

    def _protect(self, run_id: str, digests: list[str]) -> tuple[int, ...]:
        try:
            return self._tools.storage.protect(digests, needed=self._tools.needed_copies, timeout_s=PROTECT_TIMEOUT_S)
        except NoMajorityError as error:
            self._tools.events.add("not-committed", f"run {run_id}: {error}", run_id=run_id)
            raise
