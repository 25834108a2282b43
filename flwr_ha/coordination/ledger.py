"""The commits of a leader: each round of a run, and each snapshot of the control plane, exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from flwr_ha.coordination.protocol import Check, ConflictError, Create, Operation, Set, Store
from flwr_ha.coordination.reader import ClusterReader
from flwr_ha.coordination.values import CONTROL, LEADER, TERM, Leadership, dump, head_key, load, round_key
from flwr_ha.errors import CheckpointError, CoordinationError, FencedError
from flwr_ha.model import ControlHead, Head, utc_now

MAX_HEAD_BYTES = 400_000
"""Head and log entry go in one transaction; ZooKeeper takes 1 MiB."""
RETRY_PAUSE_S = 0.05
CommitT = TypeVar("CommitT", Head, ControlHead)


class Ledger(ClusterReader):
    """Commit under a leadership; see `flwr_ha.coordination.coordinator` for why an old leader cannot."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._control_lock = threading.Lock()

    def commit(self, leadership: Leadership, head: Head) -> Head:
        """Commit one round; repeating the same commit is harmless.

        Parameters
        ----------
        leadership : Leadership
            Under which the round was trained.
        head : Head
            What to commit; its term is that of the leadership, its round the one after the
            committed one (0 or 1 for the first commit of a run).

        Returns
        -------
        Head
            As committed, by this call or before it.

        Raises
        ------
        FencedError
            The leadership is lost: step down, never retry.
        CheckpointError
            The round is not the next one, is committed with other content, or its metrics are too
            large: an error of the caller.
        CoordinationError
            No answer within a lease: the outcome is unknown. Call again while the lease holds.
        """
        if head.position.term != leadership.term:
            raise FencedError(f"term {head.position.term} is fenced off by term {leadership.term}")
        head = head if head.committed_at else replace(head, committed_at=utc_now())
        data = dump(head.to_json())
        if len(data) > MAX_HEAD_BYTES:
            raise CheckpointError(
                f"the metrics of round {head.position.server_round} take {len(data)} bytes, "
                f"{MAX_HEAD_BYTES} are allowed: return fewer of them"
            )
        return self._until_known(leadership, lambda: self._commit_once(leadership, head, data))

    def commit_control(self, leadership: Leadership, digest: str, copies: Sequence[int]) -> ControlHead:
        """Commit a snapshot of the control plane; repeating the newest one is harmless.

        Parameters
        ----------
        leadership : Leadership
            Under which the snapshot was taken.
        digest : str
            The snapshot's blob.
        copies : sequence of int
            Ids of the replicas that hold it.

        Returns
        -------
        ControlHead
            As committed; its serial is one more than the one before.

        Raises
        ------
        FencedError
            The leadership is lost: step down, never retry.
        CoordinationError
            No answer within a lease: the outcome is unknown. Call again while the lease holds.
        """
        with self._control_lock:  # a repeated attempt must not overwrite a newer snapshot of another thread
            return self._until_known(leadership, lambda: self._commit_control_once(leadership, digest, tuple(copies)))

    def _commit_once(self, leadership: Leadership, head: Head, data: bytes) -> Head:
        wanted = head.position
        found = self._store.get(head_key(head.run_id))
        current = None if found is None else Head.from_json(load(found.data))
        committed = self._committed_at(current, head)
        if committed is not None and committed.position.digest == wanted.digest:
            return committed
        allowed = (0, 1) if current is None else (current.position.server_round + 1,)
        if wanted.server_round not in allowed:
            self._require_leading(leadership)  # else it is no error of the caller
        if committed is not None:
            raise CheckpointError(
                f"round {wanted.server_round} of run {head.run_id} is committed with other content "
                f"({committed.position.digest}, not {wanted.digest})"
            )
        if wanted.server_round not in allowed:
            raise CheckpointError(
                f"round {wanted.server_round} of run {head.run_id} cannot be committed, "
                f"round {allowed[-1]} is the next one"
            )
        key = head_key(head.run_id)
        operations: list[Operation] = [
            *self._lead_checks(leadership),
            Create(key, data) if found is None else Set(key, data, found.version),
        ]
        if wanted.server_round > 0:
            operations.append(Create(round_key(head.run_id, wanted.server_round), data))
        self._store.transact(operations)
        return head

    def _committed_at(self, current: Head | None, head: Head) -> Head | None:
        """Return what is committed for the round of `head`."""
        wanted = head.position.server_round
        if current is None or wanted > current.position.server_round:
            return None
        if wanted == current.position.server_round:
            return current
        return self.committed_round(head.run_id, wanted)

    def _commit_control_once(self, leadership: Leadership, digest: str, copies: tuple[int, ...]) -> ControlHead:
        found = self._store.get(CONTROL)
        current = None if found is None else ControlHead.from_json(load(found.data))
        if current is not None and (current.term, current.digest) == (leadership.term, digest):
            return current
        serial = 1 if current is None else current.serial + 1
        head = ControlHead(term=leadership.term, serial=serial, digest=digest, copies=copies)
        data = dump(head.to_json())
        write = Create(CONTROL, data) if found is None else Set(CONTROL, data, found.version)
        self._store.transact([*self._lead_checks(leadership), write])
        return head

    def _until_known(self, leadership: Leadership, commit_once: Callable[[], CommitT]) -> CommitT:
        """Repeat a commit, which reads first, until its outcome is known or a lease has passed."""
        deadline_s = time.monotonic() + self._store.lease_s
        error = CoordinationError("the entry changes faster than it can be written")
        while True:
            try:
                try:
                    return commit_once()
                except ConflictError:  # something changed since it was read: read again
                    self._require_leading(leadership)
            except CoordinationError as unknown:
                error = unknown
                time.sleep(RETRY_PAUSE_S)
            if time.monotonic() >= deadline_s:
                raise error

    def _lead_checks(self, leadership: Leadership) -> tuple[Operation, ...]:
        return (Check(TERM, leadership.term_version), Check(LEADER, 0))

    def _require_leading(self, leadership: Leadership) -> None:
        """Raise FencedError unless the leadership still holds."""
        leader = self.leader()
        found = self._store.get(TERM)
        term = 0 if found is None else int(found.data)
        if term != leadership.term:
            raise FencedError(f"term {leadership.term} is fenced off by term {term}")
        if leader is None or leader.term != leadership.term:
            raise FencedError(f"term {leadership.term} has ended, its leader entry is gone")
