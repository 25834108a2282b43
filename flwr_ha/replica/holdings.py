"""What this replica holds: get what is missing, count the lag, collect what is old."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from flwr_ha.coordination.coordinator import Coordinator, View
from flwr_ha.errors import CheckpointError, HaError
from flwr_ha.model import ControlHead, Head, Position
from flwr_ha.replica.commitlogs import KEPT, CommitLogs
from flwr_ha.replica.restarts import growing_pause_s
from flwr_ha.storage import checkpoint
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.committed import committed_runs, read_committed, write_committed
from flwr_ha.storage.digests import BlobMissingError
from flwr_ha.superlink import linkstate

log = logging.getLogger(__name__)
COLLECT_EVERY_S = 30.0
MIN_AGE_S = 120.0  # what is on its way to a commit is pinned here, and looked at more often than that on a standby
FETCH_TIMEOUT_S = 30.0
_REMEMBERED = 1024
LONGEST_PAUSE_S = 10.0
SHOWN_RUNS = 50  # their copies are published in the coordinator, which is no place for all runs of the past
PATIENCE_S = 1.0  # the leader's push is under way: do not pull the same bytes beside it


class Storage(Protocol):
    """Keep blobs beyond this replica's disk: on the other replicas, or in an object store."""

    def protect(self, digests: Sequence[str], *, needed: int, timeout_s: float) -> tuple[int, ...]:
        """Put the blobs on `needed` others and return their ids; NoMajorityError where that fails."""
        ...

    def offer(self, digests: Sequence[str]) -> None:
        """Learn of blobs that `protect` will be called for soon; does not wait."""
        ...

    def fetch(self, digests: Sequence[str], *, timeout_s: float) -> None:
        """Get missing or corrupt blobs back; CheckpointError where no good copy is to be had."""
        ...

    def close(self) -> None:
        """Make whoever waits for blobs fail soon: the replica ends."""
        ...


@dataclass(slots=True)
class _Wanted:
    """Say when a copy that is missing is asked for, and how often that was in vain."""

    due_s: float  # monotonic
    failures: int = 0


class Holdings:
    """Follow the committed heads with the blobs on this replica's disk; used by one thread where nothing else is said.

    Parameters
    ----------
    store : BlobStore
        This replica's blobs.
    storage : Storage
        Where missing ones come from.
    coordinator : Coordinator
        What is committed.
    keep_checkpoints : int
        Per run.
    """

    def __init__(self, store: BlobStore, storage: Storage, coordinator: Coordinator, *, keep_checkpoints: int) -> None:
        self._store = store
        self._storage = storage
        self._coordinator = coordinator
        self._keep = keep_checkpoints
        self._wanted: dict[str, _Wanted] = {}
        self._held: dict[str, Head] = {}
        self._checked: dict[str, str] = {}
        self._collected_s = time.monotonic()
        self._noted: dict[str, Position] | None = None
        self._parts = lru_cache(_REMEMBERED)(self._read_parts)
        self._pins: Counter[str] = Counter()
        self._pins_lock = threading.Lock()
        self.lag_rounds = 0
        self.logs = CommitLogs(coordinator)

    @property
    def holds(self) -> dict[str, str]:
        """Digest of the newest checkpoint that lies here in full, of each run that is shown."""
        held = self._held
        return {run_id: held[run_id].position.digest for run_id in self._checked if run_id in held}

    @property
    def checked(self) -> dict[str, str]:
        """Digest of the newest checkpoint that was looked for here, of the `SHOWN_RUNS` runs that went on last.

        `holds` is older where it is not the same.
        """
        return dict(self._checked)

    def follow(self, view: View, *, is_leader: bool) -> None:
        """Check each head, pull what has been missing for a while, and collect now and then.

        A standby hashes what it would have to go on with: after a start that takes long, and an election must
        not wait for it.
        """
        held, lag = dict(self._held), 0
        for run_id, head in view.heads.items():
            is_ended = head.position.server_round >= head.num_rounds
            if self._is_here(head.position.digest, is_verified=not is_leader and not is_ended):
                held[run_id] = head
            else:
                before = held.get(run_id)
                if before is not None and before.position == head.position:  # it was here, and is gone
                    del held[run_id]
                    before = None
                lag = max(lag, head.position.server_round - (before.position.server_round if before else 0))
        self._held = held
        shown = sorted(view.heads.values(), key=lambda head: head.committed_at)[-SHOWN_RUNS:]
        self._checked = {head.run_id: head.position.digest for head in shown}
        if view.control is not None:
            self._is_here(view.control.digest, is_verified=not is_leader, is_control=True)
        wanted = {head.position.digest for head in view.heads.values()} | {view.control.digest if view.control else ""}
        self._wanted = {digest: each for digest, each in self._wanted.items() if digest in wanted}
        self.lag_rounds = lag
        now_s = time.monotonic()
        self._note_commits(view)
        if now_s - self._collected_s >= COLLECT_EVERY_S:
            self._collected_s = now_s
            self.collect(view)

    def _note_commits(self, view: View) -> None:
        """Keep the commit logs beside the blobs, so that they can be exported with the cluster down."""
        try:
            noted = self._noted = self._noted if self._noted is not None else self._noted_before(view.heads)
            news = {
                run_id: head
                for run_id, head in view.heads.items()
                if noted.get(run_id) != head.position and self.logs.is_read(run_id)
            }
            if news:
                logs = {run_id: self.logs.newest(head, KEPT) for run_id, head in news.items()}
                write_committed(self._store.root, logs)
                noted.update({run_id: head.position for run_id, head in news.items()})
        except HaError as error:
            log.warning("the commit log is not on this disk: %s", error)

    def _noted_before(self, runs: Collection[str]) -> dict[str, Position]:
        """Return how far the commit logs on this disk are: a start does not write all of them anew."""
        ends = {run_id: self._noted_log(run_id)[-1:] for run_id in committed_runs(self._store.root) & set(runs)}
        return {run_id: end[0].position for run_id, end in ends.items() if end}

    def _noted_log(self, run_id: str) -> Sequence[Head]:
        try:
            return [Head.from_json(entry) for entry in read_committed(self._store.root, run_id)]
        except CheckpointError as error:  # a run that the coordinator knows has it written anew
            log.warning("a commit log on this disk is not used: %s", error)
            return ()

    def _orphans(self, known: Collection[str]) -> Iterator[Sequence[Head]]:
        """Yield the commit logs on this disk of runs that the coordinator does not know: it has lost its data.

        What is here may be all that is left of them. Whoever does not want it any more deletes the file.
        """
        for run_id in sorted(committed_runs(self._store.root) - set(known)):
            yield self._noted_log(run_id)

    def _is_here(self, digest: str, *, is_verified: bool, is_control: bool = False) -> bool:
        if not self._is_complete(digest, is_verified=is_verified, is_control=is_control):
            wanted = self._wanted.setdefault(digest, _Wanted(time.monotonic() + PATIENCE_S))
            if time.monotonic() < wanted.due_s:
                return False
            try:
                self.ensure(digest, is_control=is_control, timeout_s=FETCH_TIMEOUT_S)
            except HaError as error:
                level = logging.DEBUG if wanted.failures else logging.WARNING  # told once
                log.log(level, "copy of %s cannot be had yet: %s", digest, error)
                pause_s = growing_pause_s(wanted.failures, first_s=PATIENCE_S, factor=2.0, longest_s=LONGEST_PAUSE_S)
                wanted.due_s, wanted.failures = time.monotonic() + pause_s, wanted.failures + 1
                return False
        self._wanted.pop(digest, None)
        return True

    def _is_complete(self, digest: str, *, is_verified: bool, is_control: bool) -> bool:
        """Whether a checkpoint or a control-plane snapshot is here with all its parts, hashed once where wanted."""
        is_here = self._store.is_good if is_verified else self._store.has
        return self._store.has(digest) and all(map(is_here, self._references(digest, is_control)))

    def _references(self, digest: str, is_control: bool) -> tuple[str, ...]:
        """Return what a blob refers to; a file that has not changed is read once, as this is asked twice a second."""
        try:
            changed_ns = self._store.path(digest).stat().st_mtime_ns
        except OSError:
            changed_ns = 0  # reading it says what is wrong
        return self._parts(digest, is_control, changed_ns)

    def _read_parts(self, digest: str, is_control: bool, _changed_ns: int) -> tuple[str, ...]:
        if is_control:
            return linkstate.references(self._store.read(digest))
        return checkpoint.references(digest, self._store)

    def ensure(self, digest: str, *, is_control: bool, timeout_s: float) -> None:
        """Have the main blob and all its parts here, verified; CheckpointError where that cannot be."""
        self._storage.fetch([digest], timeout_s=timeout_s)
        parts = self._references(digest, is_control)
        if parts:
            self._storage.fetch(parts, timeout_s=timeout_s)

    @contextmanager
    def pinned(self, digests: Sequence[str]) -> Iterator[None]:
        """Keep blobs that nothing names yet, however long their copies take; from any thread.

        Raises
        ------
        BlobMissingError
            One of them is not here: write it again.
        """
        with self._pins_lock:
            self._pins.update(digests)
        try:
            for digest in digests:  # `collect` may have listed it before it was pinned, but looks at its age again
                if not self._store.touch(digest):
                    raise BlobMissingError(digest, f"{digest} is not in {self._store.root}")
            yield
        finally:
            with self._pins_lock:
                self._pins -= Counter(digests)

    def collect(self, view: View) -> None:
        """Delete blobs that no kept checkpoint and no current control plane names."""
        try:
            keep = set(self._kept(view.heads, view.control, is_here=self._store.has))
            for log_entries in self._orphans(view.heads):
                keep.update(self._with_parts(log_entries[-self._keep :], is_here=self._store.has))
        except HaError as error:
            log.warning("nothing is collected this time: %s", error)
            return
        with self._pins_lock:
            keep.update(self._pins)
        self._store.collect(keep, min_age_s=MIN_AGE_S)

    def needed(self) -> frozenset[str]:
        """Return what the cluster needs as of now, in full; from any thread.

        Raises
        ------
        HaError
            The coordinator does not answer, or a checkpoint cannot be read to see what it refers to.
        """

        def is_here(digest: str) -> bool:
            self._storage.fetch([digest], timeout_s=FETCH_TIMEOUT_S)
            return True

        return self._kept(self._coordinator.heads(), self._coordinator.control_head(), is_here=is_here)

    def _kept(
        self, heads: Mapping[str, Head], control: ControlHead | None, *, is_here: Callable[[str], bool]
    ) -> frozenset[str]:
        """Return the newest checkpoints of each run and the control plane, and what those refer to that are here."""
        keep: set[str] = set()
        for head in heads.values():
            keep |= self._with_parts((head, *self.logs.newest(head, self._keep)), is_here=is_here)
        if control is not None:
            keep.add(control.digest)
            if is_here(control.digest):
                keep.update(self._references(control.digest, is_control=True))
        return frozenset(keep)

    def _with_parts(self, heads: Sequence[Head], *, is_here: Callable[[str], bool]) -> set[str]:
        digests = {head.position.digest for head in heads}
        parts = [self._references(digest, is_control=False) for digest in digests if is_here(digest)]
        return digests.union(*parts)
