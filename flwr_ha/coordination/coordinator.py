"""Terms, leases and commits, written once over `Store`.

Why an old leader cannot do harm: each write of a leader is one transaction with two checks. The
entry ``term`` has the version that the leader's own campaign gave it, so no newer campaign has
succeeded; and the ephemeral entry ``leader`` exists, so the session that won the campaign lives
(it is made anew only together with a newer term). The store applies transactions one by one, so
there is no moment between the checks and the write.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence

from flwr_ha.coordination.ledger import Ledger
from flwr_ha.coordination.protocol import Check, ConflictError, Create, Delete, Operation, Set, Store, Versioned
from flwr_ha.coordination.values import (
    HISTORY,
    IDENTITY,
    LEADER,
    PAUSED,
    SWITCHOVER,
    TERM,
    LeaderRecord,
    Leadership,
    Record,
    Switchover,
    View,
    dump,
    history_key,
    load,
    replica_key,
)
from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.model import LeadershipChange, utc_now

__all__ = ["Coordinator", "LeaderRecord", "Leadership", "Record", "Switchover", "View"]

POLL_S = 0.1
CAMPAIGN_ATTEMPTS = 3
KEPT_CHANGES = 1000


class Coordinator(Ledger):
    """Take part in a cluster as one replica: be there, lead, commit. Safe from any thread.

    Where a method names no other error, `CoordinationError` means that the store did not answer:
    call it again later; each of them may be repeated.

    Parameters
    ----------
    store : Store
        A started store; `close` closes it.
    replica_id : int
        Id of this replica.
    instance : str
        Text that differs for each start of a replica.
    """

    def __init__(self, store: Store, *, replica_id: int, instance: str) -> None:
        super().__init__(store)
        self._replica_id = replica_id
        self._instance = instance
        self._publish_lock = threading.Lock()
        self._record: Versioned | None = None  # as it was last written; None: read it before the next write

    def identity(self) -> str:
        """Return a text that the coordinator has kept since it first knew this cluster, and that no other cluster has.

        It tells clusters of one name apart, and a cluster from what it was before it lost its coordinator's data.
        """
        while True:
            found = self._store.get(IDENTITY)
            if found is not None:
                return found.data.decode()
            try:
                self._store.transact([Create(IDENTITY, uuid.uuid4().hex.encode())])
            except ConflictError:
                continue  # another replica was faster

    def join(self, record: Record, *, wait_timeout_s: float) -> None:
        """Publish this replica, waiting until an earlier start of the same id is gone.

        Parameters
        ----------
        record : Record
            What to publish, a JSON object.
        wait_timeout_s : float
            How long to wait, in seconds; an earlier start that was killed is gone after the
            session timeout.

        Raises
        ------
        ConfigError
            The id is in use: tell the user.
        """
        deadline_s = time.monotonic() + wait_timeout_s
        while True:
            try:
                self.publish(record)
                return
            except ConfigError:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(POLL_S)

    def publish(self, record: Record) -> None:
        """Publish this replica's record, anew where a lost session took it away.

        Raises
        ------
        ConfigError
            Another start of the same id is there: this one must end.
        """
        self._write_record(record, ())

    def campaign(self, reason: str) -> Leadership | None:
        """Try to take the next term.

        Parameters
        ----------
        reason : str
            Why the leadership changes, a sentence for people.

        Returns
        -------
        Leadership or None
            None when somebody leads already, or was faster.
        """
        attempt = uuid.uuid4().hex
        error: CoordinationError | None = None
        for _ in range(CAMPAIGN_ATTEMPTS):
            leader = self.leader()
            found = self._store.get(TERM)
            newest, version = (0, -1) if found is None else (int(found.data), found.version)
            if leader is not None and (leader.instance != self._instance or leader.term != newest):
                return None
            if leader is not None and leader.attempt == attempt:
                return Leadership(term=newest, term_version=version, instance=self._instance)
            operations = self._campaign_operations(newest + 1, version, attempt, reason)
            if leader is not None:
                # Left over from a leadership of ours that was given up unheard. Since its term is still
                # the newest, and the transaction checks that it stays so, the entry is not another's.
                operations.insert(1, Delete(LEADER))
            try:
                self._store.transact(operations)
                return Leadership(term=newest + 1, term_version=version + 1, instance=self._instance)
            except ConflictError:
                continue  # somebody was faster, or an earlier attempt was applied: look
            except CoordinationError as unknown:
                error = unknown
        if error is not None:
            raise error
        return None

    def renew(self, leadership: Leadership, record: Record) -> float:
        """Prove that this replica still leads, and publish its record.

        Returns
        -------
        float
            Time of ``time.monotonic()`` until which nobody else can lead; it may lie in the past
            after a pause of this process.

        Raises
        ------
        FencedError
            The leadership is lost: step down, never retry.
        CoordinationError
            No answer: the lease is not longer than before; try again until it ends.
        """
        started_s = time.monotonic()
        self._write_record(record, self._lead_checks(leadership), leadership)
        return self._store.proven_until(started_s)

    def resign(self, leadership: Leadership) -> None:
        """Give the leadership up, so that a standby can take over at once; no matter if it is lost already."""
        try:
            self._store.transact([Check(TERM, leadership.term_version), Delete(LEADER, 0)])
        except ConflictError:
            return

    def disown(self, term: int) -> None:
        """Give up a leadership of this start that the caller does not hold: the answer to its campaign was lost.

        An entry of another replica, of an earlier start or of another term is left alone.
        """
        leader, newest = self.leader(), self._store.get(TERM)
        if leader is None or newest is None or (leader.instance, leader.term) != (self._instance, term):
            return
        if int(newest.data) == term:
            self.resign(Leadership(term=term, term_version=newest.version, instance=self._instance))

    def forget_history(self, term: int) -> None:
        """Remove the leadership changes that are older than the newest `KEPT_CHANGES`, `term` being the last."""
        for name in self._store.children(HISTORY):
            if int(name) <= term - KEPT_CHANGES:
                try:
                    self._store.transact([Delete(f"{HISTORY}/{name}")])
                except ConflictError:
                    continue  # somebody else did it

    def set_paused(self, is_paused: bool) -> None:
        """Switch automatic failover off or on, for the whole cluster."""
        while (self._store.get(PAUSED) is not None) != is_paused:
            try:
                self._store.transact([Create(PAUSED, dump({"at": utc_now()})) if is_paused else Delete(PAUSED)])
            except ConflictError:
                continue  # somebody else did it

    def request_switchover(self, candidate: int | None) -> None:
        """Ask the leader to hand over to `candidate`, or to any healthy standby; replaces an older request."""
        data = dump(Switchover(candidate=candidate, requested_at=utc_now()).to_json())
        while True:
            is_there = self._store.get(SWITCHOVER) is not None
            try:
                self._store.transact([Set(SWITCHOVER, data) if is_there else Create(SWITCHOVER, data)])
                return
            except ConflictError:
                continue  # it came or went meanwhile

    def clear_switchover(self) -> None:
        """Withdraw the request to hand over; no matter if there is none."""
        if self._store.get(SWITCHOVER) is not None:
            try:
                self._store.transact([Delete(SWITCHOVER)])
            except ConflictError:
                return

    def close(self) -> None:
        """End the session: this replica is gone for the others at once. May be called twice."""
        self._store.close()

    def _campaign_operations(self, term: int, version: int, attempt: str, reason: str) -> list[Operation]:
        leader = LeaderRecord(replica_id=self._replica_id, instance=self._instance, term=term, attempt=attempt)
        change = LeadershipChange(term=term, leader=self._replica_id, at=utc_now(), reason=reason)
        take = Create(TERM, b"1") if version < 0 else Set(TERM, str(term).encode(), version)
        operations: list[Operation] = [
            take,
            Create(LEADER, dump(leader.to_json()), is_ephemeral=True),
            Create(history_key(term), dump(change.to_json())),
        ]
        request = self._store.get(SWITCHOVER)
        if request is not None:  # whoever leads now, the request has had its effect
            operations.append(Delete(SWITCHOVER, request.version))
        return operations

    def _write_record(self, record: Record, checks: Sequence[Operation], leadership: Leadership | None = None) -> None:
        key = replica_key(self._replica_id)
        data = dump({**record, "instance": self._instance})
        with self._publish_lock:
            while True:
                old, self._record = self._record or self._read_record(leadership), None
                operation: Operation
                if old is None:
                    operation, version = Create(key, data, is_ephemeral=True), 0
                elif old.data == data:
                    operation, version = Check(key, old.version), old.version  # as good a proof, and wakes nobody
                else:
                    operation, version = Set(key, data, old.version), old.version + 1
                try:
                    self._store.transact([*checks, operation])
                except ConflictError:
                    if leadership is not None:
                        self._require_leading(leadership)
                    continue  # our record went with a lost session, or another start took its place
                self._record = Versioned(data, version)
                return

    def _read_record(self, leadership: Leadership | None) -> Versioned | None:
        """Return our record, None where there is none."""
        found = self._store.get(replica_key(self._replica_id))
        if found is None:
            return None
        other = load(found.data)
        if other["instance"] == self._instance:
            return found
        if leadership is not None:
            self._require_leading(leadership)
        raise ConfigError(
            f"replica {self._replica_id} is already running (instance {other['instance']}): "
            "stop it, or start this one with another --id"
        )
