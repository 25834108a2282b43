"""One peer's share of the pushes: a thread that never holds up the others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.peer import Peer
from flwr_ha.storage.pushing import Pusher

_OFFERS = 4096
_TOGETHER_BYTES = 16 << 20  # small offers go together, as a peer is asked what it lacks for each push
_logger = logging.getLogger(__name__)
OnPush = Callable[[int, int, float], None]


@dataclass(slots=True, eq=False)
class Job:
    """Follow one `Replicator.protect`; read and changed under the lanes' condition only.

    Attributes
    ----------
    digests : tuple of str
        What each peer shall hold.
    held : set of int
        Peers that hold all of it.
    failed : dict of int to str
        Peers that do not, and why.
    fault : CheckpointCorruptError or None
        The own copy was found to be no good.
    give_up_at_s : float or None
        Monotonic time after which nobody wants it any more; None while `protect` waits.
    part_of : Job or None
        A later job that needs the same: this one is wanted for as long as that one is.
    is_offer : bool
        It is enough that the blobs are on their way: a later job will ask for them.
    """

    digests: tuple[str, ...]
    held: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    fault: CheckpointCorruptError | None = None
    give_up_at_s: float | None = None
    part_of: Job | None = None
    is_offer: bool = False

    @property
    def is_stale(self) -> bool:
        """Whether nobody wants it any more."""
        if self.part_of is not None:
            return self.part_of.is_stale
        return self.give_up_at_s is not None and time.monotonic() > self.give_up_at_s

    def is_within(self, other: Job) -> bool:
        """Whether the other job needs all of this one."""
        return set(self.digests) <= set(other.digests)


class Lane:
    """Push jobs to one peer, one after the other, in a thread of its own.

    Jobs that a caller waits for come first, in order; then offers, single blobs of which a job will
    come. One job that nobody waits for any more may wait behind them, the newest: a slow peer gets some
    checkpoints whole instead of all of them late.

    Parameters
    ----------
    peer : Peer
        Where to.
    name : str
        Name of the thread.
    store : BlobStore
        Where from.
    connect : callable
        Makes what pushes.
    changed : threading.Condition
        Shared by all lanes; guards lanes and jobs and is notified when a job goes on.
    on_push : callable
        Gets the peer's id, the bytes sent and the seconds of each copy that arrived.
    """

    def __init__(
        self,
        peer: Peer,
        name: str,
        *,
        store: BlobStore,
        connect: Callable[[Peer], Pusher],
        changed: threading.Condition,
        on_push: OnPush,
    ) -> None:
        self.peer = peer
        self._store = store
        self._connect = connect
        self._changed = changed
        self._on_push = on_push
        self._wanted: deque[Job] = deque()
        self._offers: deque[Job] = deque(maxlen=_OFFERS)
        self._leftover: Job | None = None
        self._running: Job | None = None
        self._pusher = connect(peer)
        self._is_closed = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Queue a job that a caller waits for; the condition is held."""
        self._wanted.append(job)
        self._offers = deque((offer for offer in self._offers if not offer.is_within(job)), maxlen=_OFFERS)
        running = self._running
        if running is not None and running.give_up_at_s is not None and running.is_within(job):
            running.part_of = job
        self._changed.notify_all()

    def offer(self, job: Job) -> None:
        """Queue what a job will need that comes soon; the condition is held."""
        self._offers.append(job)
        self._changed.notify_all()

    def leave(self, job: Job) -> None:
        """Put a job that nobody waits for any more behind the others; the condition is held."""
        if job in self._wanted:
            self._wanted.remove(job)
            self._leftover = job

    def make_way(self, job: Job) -> None:
        """End a push that nobody waits for, because this job cannot do without the peer; the condition is held."""
        running = self._running
        if running is not None and running.give_up_at_s is not None and not running.is_within(job):
            running.give_up_at_s = 0.0
            self._pusher.abort()

    def close(self) -> None:
        """End the thread soon; the condition is held."""
        self._is_closed = True
        self._pusher.abort()
        self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end; the condition is not held."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._wait_for_job()) is not None:
            reason = self._push(job)
            with self._changed:
                self._running = None
                if reason:
                    job.failed[self.peer.id] = reason
                    self._offers.clear()  # a peer that is not there is not asked for each of them
                else:
                    job.held.add(self.peer.id)
                self._changed.notify_all()
            self._report(reason)
        self._pusher.close()

    def _wait_for_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._wanted or self._offers or self._leftover)
            if self._is_closed:
                return None
            if self._wanted:
                self._running = self._wanted.popleft()
            elif self._offers:
                self._running = self._next_offers()
            else:
                self._running, self._leftover = self._leftover, None
            if self._pusher.is_aborted:
                self._pusher.close()
                self._pusher = self._connect(self.peer)
            return self._running

    def _next_offers(self) -> Job:
        """Return one job for the next offers, which give up with the first of them."""
        first = self._offers.popleft()
        digests, size_bytes = list(first.digests), sum(map(self._size, first.digests))
        while self._offers and size_bytes < _TOGETHER_BYTES:
            more = self._offers.popleft().digests
            digests += more
            size_bytes += sum(map(self._size, more))
        return Job(tuple(dict.fromkeys(digests)), give_up_at_s=first.give_up_at_s, is_offer=True)

    def _size(self, digest: str) -> int:
        try:
            return self._store.size_to_send(digest)
        except CheckpointError:
            return 0  # the push will say what is wrong

    def _push(self, job: Job) -> str:
        """Push what the peer lacks; return why it failed, or nothing."""
        start_s, before = time.monotonic(), self._pusher.sent_bytes
        try:
            self._pusher.push(self._store, job.digests, is_wanted=lambda: not job.is_stale, is_settled=not job.is_offer)
        except CheckpointCorruptError as error:
            job.fault = error
            return str(error)
        except CheckpointError as error:
            return str(error)
        if sent_bytes := self._pusher.sent_bytes - before:
            self._on_push(self.peer.id, sent_bytes, time.monotonic() - start_s)
        return ""

    def _report(self, reason: str) -> None:
        if reason and not self._is_failing and not self._is_closed:
            _logger.warning("a checkpoint was not copied: %s", reason)
        elif self._is_failing and not reason:
            _logger.info("checkpoints are copied to %s again", self.peer)
        self._is_failing = bool(reason)
