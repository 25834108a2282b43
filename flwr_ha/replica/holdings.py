"""What this replica holds: get what is missing, count the lag, collect what is old."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from flwr_ha.coordination.coordinator import Coordinator, View
from flwr_ha.errors import CheckpointError, HaError
from flwr_ha.model import ControlHead, Head
from flwr_ha.storage import checkpoint
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.committed import read_committed, write_committed
from flwr_ha.storage.digests import BlobMissingError
from flwr_ha.superlink import linkstate

log = logging.getLogger(__name__)
COLLECT_EVERY_S = 30.0
MIN_AGE_S = 120.0  # what is on its way to a commit is pinned here, and looked at more often than that on a standby
FETCH_TIMEOUT_S = 30.0
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


class Holdings:
    """Follow the committed heads with the blobs on this replica's disk; used by one thread where nothing else is said.

    Parameters
    ----------
    store : BlobStore
        This replica's blobs.
    storage : Storage
        Where missing ones come from.
    coordinator : Coordinator
        For the commit logs, which say what is old.
    keep_checkpoints : int
        Per run.
    """

    def __init__(self, store: BlobStore, storage: Storage, coordinator: Coordinator, *, keep_checkpoints: int) -> None:
        self._store = store
        self._storage = storage
        self._coordinator = coordinator
        self._keep = keep_checkpoints
        self._wanted_since: dict[str, float] = {}
        self._held: dict[str, Head] = {}
        self._checked: dict[str, str] = {}
        self._collected_s = time.monotonic()
        self._noted: dict[str, Head] = {}
        self._pins: Counter[str] = Counter()
        self._pins_lock = threading.Lock()
        self.lag_rounds = 0

    @property
    def holds(self) -> dict[str, str]:
        """Digest of the newest checkpoint of each run that lies here in full."""
        return {run_id: head.position.digest for run_id, head in list(self._held.items())}

    @property
    def checked(self) -> dict[str, str]:
        """Digest of the newest checkpoint of each run that was looked for here; `holds` is older without it."""
        return dict(self._checked)

    def follow(self, view: View, *, is_leader: bool) -> None:
        """Check each head, pull what has been missing for a while, and collect now and then."""
        now_s = time.monotonic()
        lag = 0
        for run_id, head in view.heads.items():
            if self._is_here(head.position.digest, now_s, may_fetch=not is_leader):
                self._held[run_id] = head
            else:
                held = self._held.get(run_id)
                lag = max(lag, head.position.server_round - (held.position.server_round if held else 0))
        self._checked = {run_id: head.position.digest for run_id, head in view.heads.items()}
        if view.control is not None:
            self._is_here(view.control.digest, now_s, may_fetch=not is_leader, is_control=True)
        self.lag_rounds = lag
        self._note_commits(view)
        if now_s - self._collected_s >= COLLECT_EVERY_S:
            self._collected_s = now_s
            self.collect(view)

    def _note_commits(self, view: View) -> None:
        """Keep the commit log beside the blobs, so that they can be exported with the cluster down."""
        if self._noted == view.heads:
            return
        try:
            logs = {run_id: self._coordinator.commit_log(run_id) for run_id in view.heads}
            write_committed(self._store.root, {**self._orphans(view.heads), **logs})
        except HaError as error:
            log.warning("the commit log is not on this disk: %s", error)
            return
        self._noted = dict(view.heads)

    def _orphans(self, known: Collection[str]) -> dict[str, Sequence[Head]]:
        """Return the commit logs on this disk of runs that the coordinator does not know: it has lost its data.

        What is here may be all that is left of them. Whoever does not want it any more deletes the file.
        """
        try:
            logs = read_committed(self._store.root)
        except CheckpointError as error:  # it is about to be written anew
            log.warning("the commit log on this disk is not used: %s", error)
            return {}
        return {run_id: [Head.from_json(entry) for entry in log] for run_id, log in logs.items() if run_id not in known}

    def _is_here(self, digest: str, now_s: float, *, may_fetch: bool, is_control: bool = False) -> bool:
        if self.missing(digest, is_control=is_control):
            since = self._wanted_since.setdefault(digest, now_s)
            if not may_fetch or now_s - since < PATIENCE_S:
                return False
            try:
                self.ensure(digest, is_control=is_control, timeout_s=FETCH_TIMEOUT_S)
            except HaError as error:
                log.warning("copy of %s cannot be had yet: %s", digest, error)
                return False
        self._wanted_since.pop(digest, None)
        return True

    def missing(self, digest: str, *, is_control: bool) -> tuple[str, ...]:
        """Return the digests that are missing of a checkpoint or a control-plane snapshot, as far as known."""
        if not self._store.has(digest):
            return (digest,)
        return tuple(part for part in self._references(digest, is_control) if not self._store.has(part))

    def _references(self, digest: str, is_control: bool) -> tuple[str, ...]:
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
            for log_entries in self._orphans(view.heads).values():
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
        for run_id, head in heads.items():
            commits = self._coordinator.commit_log(run_id)[-self._keep :]
            keep |= self._with_parts((head, *commits), is_here=is_here)
        if control is not None:
            keep.add(control.digest)
            if is_here(control.digest):
                keep.update(self._references(control.digest, is_control=True))
        return frozenset(keep)

    def _with_parts(self, heads: Sequence[Head], *, is_here: Callable[[str], bool]) -> set[str]:
        digests = {head.position.digest for head in heads}
        parts = [self._references(digest, is_control=False) for digest in digests if is_here(digest)]
        return digests.union(*parts)
