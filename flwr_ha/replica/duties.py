"""What a leader does: take over, keep the control plane safe, commit rounds."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.errors import CheckpointCorruptError, CheckpointError, HaError, NoMajorityError
from flwr_ha.failpoints import reach
from flwr_ha.model import Head, Position
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import Holdings, Storage
from flwr_ha.replica.metrics import Meter, NoMeter
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import BlobLostError
from flwr_ha.storage.pushing import RECENT_S
from flwr_ha.superlink import linkstate
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.procfs import ChildRecord, kill_stale_child, listens_on
from flwr_ha.superlink.snapshot import unfinished_runs

log = logging.getLogger(__name__)
FETCH_TIMEOUT_S = 600.0
OPEN_TIMEOUT_S = 3.0
STALE_AFTER_S = 0.3  # the lease of an earlier leader has ended, so its SuperLink closes now or is frozen
LOGS_EVERY_S = 10.0
SLOWEST_BYTES_PER_S = 2e6  # a link to a standby that is slower than this counts as down
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
    store, storage, holdings, coordinator, events, meter
        The parts of this replica.
    """

    replica_id: int
    needed_copies: int
    store: BlobStore
    storage: Storage
    holdings: Holdings
    coordinator: Coordinator
    events: EventLog
    meter: Meter = field(default_factory=NoMeter)


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
        self._trouble = ""
        self._known_fabs: dict[str, str] = {}
        self._log_mark = 0
        self._log_mark_s = float("-inf")
        self._safe_seen: object = None
        self._marked_seen: object = None
        self._commit_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def take_over(self, address: str, stale: Sequence[ChildRecord]) -> None:
        """Get the bytes, carry the control plane over, open the public socket.

        Parameters
        ----------
        address : str
            Public address, ``host:port``.
        stale : sequence of ChildRecord
            SuperLinks of earlier terms that may still hold this address on this machine.

        Raises
        ------
        HaError
            This replica cannot serve now: give the leadership up, so that another one can try.
        """
        tools = self._tools
        control = tools.coordinator.control_head()
        if control is not None:
            tools.holdings.ensure(control.digest, is_control=True, timeout_s=FETCH_TIMEOUT_S)
            reach("takeover.after-fetch")
            snapshot = tools.store.read(control.digest)
            heads = tools.coordinator.heads()
            self._ensure_checkpoints(heads, unfinished_runs(snapshot))
            reach("takeover.after-checkpoints")
            linkstate.restore(
                self._database, snapshot, tools.store.read, now_s=time.time(), note=self._takeover_note(heads)
            )
            self._control_digest = control.digest
            reach("takeover.after-restore")
        tools.events.add("carried-over", "nodes, runs and apps are in the own SuperLink", term=self.leadership.term)
        self._open_public(address, stale)
        reach("takeover.after-open")

    def _takeover_note(self, heads: Mapping[str, Head]) -> Callable[[str], str]:
        """Return what the log of an unfinished run says: a ServerApp without HighlyAvailable begins anew."""
        who = f"replica {self._tools.replica_id} leads in term {self.leadership.term}"

        def note(run_id: str) -> str:
            if run_id in heads:
                return f"{who}: the ServerApp starts again after round {heads[run_id].position.server_round}"
            return f"{who}: no round of this run is committed, the ServerApp starts from its round 1"

        return note

    def _open_public(self, address: str, stale: Sequence[ChildRecord]) -> None:
        """Listen; end what holds the port if it is a frozen SuperLink of an earlier term.

        One that runs closes its socket when its lease ends. One that is frozen cannot, and on a machine
        that all replicas share it would keep every successor from serving.
        """
        try:
            self._superlink.open_public(address, timeout_s=STALE_AFTER_S)
        except HaError:
            leader = self._tools.coordinator.leader()
            if leader is None or leader.term != self.leadership.term:  # what listens may serve a newer term by now
                raise
            port = int(address.rpartition(":")[2])
            holders = [record for record in stale if listens_on(record.pid, port)]  # a healthy standby does not
            ended = [record for record in holders if kill_stale_child(record, OPEN_TIMEOUT_S)]
            if ended:
                pids = ", ".join(str(record.pid) for record in ended)
                self._tools.events.add("fenced", f"the frozen SuperLink of an earlier term was ended (process {pids})")
            self._superlink.open_public(address, timeout_s=OPEN_TIMEOUT_S)

    def _ensure_checkpoints(self, heads: Mapping[str, Head], unfinished: frozenset[str]) -> None:
        """Have what the unfinished runs go on with; copies of ended ones can be had later, and may be many."""
        for run_id in unfinished & heads.keys():
            try:
                self._tools.holdings.ensure(heads[run_id].position.digest, is_control=False, timeout_s=FETCH_TIMEOUT_S)
            except BlobLostError as error:
                # Waiting would not bring it back, and the other runs can go on: this one's ServerApp will say so.
                self._tools.events.add("error", f"the checkpoint of run {run_id} is lost: {error}", run_id=run_id)

    def replicate_control(self, *, is_asked: bool = False, seen: object = None) -> bool:
        """Commit the control plane as it is now; return whether it is safe on a majority.

        Parameters
        ----------
        is_asked : bool
            Whether an answer waits for it. It is also called now and then for what changes by itself; the logs
            come along when an answer waits, after a round, and every few seconds.
        seen : object, optional
            Stands for all that was in the database at some moment before this call: as long as it is equal, nobody
            has written. What is safe already is not read again then. None: not known.
        """
        tools = self._tools
        with self._control_lock:
            if is_asked:
                self._log_mark_s = float("-inf")
            elif seen is not None and seen == self._safe_seen and not self._is_log_due(seen):
                return True
            try:
                control = linkstate.export(
                    self._database, tools.store.put, logs_until=self._logs_until(seen), known_fabs=self._known_fabs
                )
                digest = tools.store.put(control.snapshot)
                reach("control.after-export")
                if digest == self._control_digest:
                    self._safe_seen = seen
                    return True
                copies = tools.storage.protect(
                    [*control.blobs, digest], needed=tools.needed_copies, timeout_s=PROTECT_CONTROL_TIMEOUT_S
                )
                reach("control.after-protect")
                tools.coordinator.commit_control(self.leadership, digest, (tools.replica_id, *copies))
                reach("control.after-transaction")
            except HaError as error:
                self._known_fabs.clear()  # what no committed picture names is collected: put it again next time
                if str(error) != self._trouble:  # it is tried twice a second: say it once
                    tools.events.add("not-committed", f"control plane: {error}", term=self.leadership.term)
                self._trouble = str(error)
                return False
            self._control_digest, self._trouble, self._safe_seen = digest, "", seen
            return True

    def _logs_until(self, seen: object) -> int:
        """Move the mark up to which logs are carried now and then: each move is a commit of its own."""
        now_s = time.monotonic()
        if now_s - self._log_mark_s >= LOGS_EVERY_S:
            self._log_mark, self._log_mark_s = linkstate.log_mark(self._database), now_s
            self._marked_seen = seen
        return self._log_mark

    def _is_log_due(self, seen: object) -> bool:
        """Whether there may be lines behind the mark, and it is time to move it."""
        return seen != self._marked_seen and time.monotonic() - self._log_mark_s >= LOGS_EVERY_S

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
        CheckpointCorruptError
            The blobs have changed since they were written: write them again.
        """
        tools, start_s = self._tools, time.monotonic()
        with self._commit_locks[run_id]:
            done = tools.coordinator.head(run_id)
            if done is not None and done.position.digest == body["digest"]:
                return done
            reach("commit.begin")
            with tools.holdings.pinned(digests := [*body["parts"], body["digest"]]):
                copies = self._protect(run_id, digests)
                copied_s = time.monotonic()
                reach("commit.after-protect")
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
                reach("commit.before-transaction")
                head = tools.coordinator.commit(self.leadership, head)
                reach("commit.after-transaction")
        self._log_mark_s = float("-inf")  # the log of the round comes along with the next picture
        tools.events.add(
            "commit",
            f"round {head.position.server_round} of run {run_id} is on replicas {', '.join(map(str, head.copies))}",
            run_id=run_id,
            server_round=head.position.server_round,
            term=head.position.term,
            digest=head.position.digest,
            model_digest=head.model_digest,
            seconds=round(time.monotonic() - start_s, 6),
            copy_seconds=round(copied_s - start_s, 6),
        )
        reach("commit.before-answer")
        return head

    def _protect(self, run_id: str, digests: list[str]) -> tuple[int, ...]:
        try:
            size_bytes = sum(self._tools.store.size(digest) for digest in digests)
            timeout_s = PROTECT_TIMEOUT_S + size_bytes / SLOWEST_BYTES_PER_S
            while True:
                start_s = time.monotonic()
                copies = self._tools.storage.protect(digests, needed=self._tools.needed_copies, timeout_s=timeout_s)
                if time.monotonic() - start_s < RECENT_S:
                    return copies
                # While the last replica was filled the first one may have collected what nothing names: look again.
        except CheckpointCorruptError:
            raise
        except CheckpointError as error:  # an object store that does not answer is as good as no majority
            self._tools.events.add("not-committed", f"run {run_id}: {error}", run_id=run_id)
            raise NoMajorityError(str(error)) from error
