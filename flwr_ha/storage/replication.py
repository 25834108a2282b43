"""Copies of blobs on other replicas: enough of them before a commit, the rest soon after."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Self

from flwr_ha.errors import CheckpointError, NoMajorityError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import BlobLostError
from flwr_ha.storage.lanes import Job, Lane, OnPush
from flwr_ha.storage.peer import Peer, PeerClient
from flwr_ha.storage.pushing import Pusher

__all__ = ["Peer", "PeerClient", "Replicator"]

_SMALL_BYTES = 1 << 20
_JOIN_S = 2.0


class Replicator:
    """Copy blobs to the other replicas and fetch them from there.

    Each peer has two lanes, threads of their own: a large checkpoint on its way does not hold up
    a small snapshot, and a slow peer holds up nobody.

    Parameters
    ----------
    store : BlobStore
        The own copies.
    peers : Sequence of Peer, or callable that returns it
        The other replicas; a callable is asked at each call, `set_peers` changes the others.
    secret : str
        Shared secret of the replicas.
    tls : ssl.SSLContext or None
        Context for HTTPS; None for plain HTTP.
    timeout_s : float
        Longest wait for a peer to take or to send anything, in seconds.
    grace_s : float
        How long pushes to the slower peers go on after `protect` has returned, in seconds.
    """

    def __init__(
        self,
        store: BlobStore,
        peers: Sequence[Peer] | Callable[[], Sequence[Peer]],
        *,
        secret: str,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 5.0,
        grace_s: float = 30.0,
    ) -> None:
        self._store = store
        self._peers = peers
        self._secret = secret
        self._tls = tls
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self.on_push: OnPush = lambda peer, sent_bytes, seconds: None
        self._changed = threading.Condition()
        self._lanes: dict[tuple[Peer, str], Lane] = {}
        self._retired: list[Lane] = []
        self._fetching: set[PeerClient] = set()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def set_peers(self, peers: Sequence[Peer]) -> None:
        """Change who the other replicas are; what is under way to the ones that left ends."""
        with self._changed:
            self._peers = tuple(peers)
            self._retire_lanes(self._current_peers())

    def close(self) -> None:
        """End all pushes, their threads and all fetches, from any thread; may be called twice."""
        with self._changed:
            self._is_closed = True
            _abort(self._fetching)
            self._retire_lanes(())
            retired, self._retired = self._retired, []
        deadline_s = time.monotonic() + _JOIN_S
        for lane in retired:
            lane.join(max(deadline_s - time.monotonic(), 0.0))

    def protect(self, digests: Sequence[str], *, needed: int, timeout_s: float) -> tuple[int, ...]:
        """Return the ids of the peers that hold all the blobs, as soon as there are enough.

        Pushes to the other peers go on for `grace_s`, so that all healthy replicas get all copies.

        Parameters
        ----------
        digests : Sequence of str
            Blobs in the own store.
        needed : int
            Peers that must hold all of them; the own copy does not count.
        timeout_s : float
            Longest wait, in seconds.

        Raises
        ------
        NoMajorityError
            Too few do, and which and why: nothing is committed, try again later.
        CheckpointCorruptError
            The own copy is missing or bad: fetch it, or save again.
        """
        deadline_s = time.monotonic() + timeout_s
        job = Job(tuple(dict.fromkeys(digests)))
        is_small = sum(self._store.size(digest) for digest in job.digests) <= _SMALL_BYTES
        with self._changed:
            lanes = self._lanes_now("small" if is_small else "large")
            for lane in lanes:
                lane.add(job)
            while len(job.held) < needed:
                pending = [lane for lane in lanes if lane.peer.id not in job.held | job.failed.keys()]
                spare = len(job.held) + len(pending) - needed
                if spare == 0:
                    for lane in pending:
                        lane.make_way(job)
                if spare < 0 or not self._changed.wait(max(deadline_s - time.monotonic(), 0.0)):
                    break
            job.give_up_at_s = time.monotonic() + self._grace_s
            for lane in lanes:
                lane.leave(job)
            if len(job.held) < needed:
                raise job.fault or self._too_few(job, lanes, needed, timeout_s)
            return tuple(sorted(job.held))

    def offer(self, digests: Sequence[str]) -> None:
        """Begin to push blobs for which `protect` will be called soon; does not wait.

        Parameters
        ----------
        digests : Sequence of str
            Blobs in the own store. What no `protect` asks for within `grace_s` is given up.
        """
        give_up_at_s = time.monotonic() + self._grace_s
        with self._changed:
            for lane in self._lanes_now("large"):
                for digest in digests:
                    lane.offer(Job((digest,), give_up_at_s=give_up_at_s, is_offer=True))

    def fetch(self, digests: Sequence[str], *, timeout_s: float) -> None:
        """Put good copies of the blobs into the own store, from any peer that has them.

        Parameters
        ----------
        digests : Sequence of str
            What is needed; good copies that are there already are kept.
        timeout_s : float
            Longest time for all, in seconds.

        Raises
        ------
        BlobLostError
            All peers have answered, and none has a good copy of one of them.
        CheckpointError
            No good copy was found in time, but a peer that did not answer may have one: try again.
        """
        missing = [digest for digest in dict.fromkeys(digests) if not self._store.is_good(digest)]
        if not missing:
            return
        with self._changed:
            if self._is_closed:
                raise CheckpointError("nothing is fetched any more: the replica ends")
            clients = [self._client(peer) for peer in self._current_peers()]
            self._fetching.update(clients)
        timer = threading.Timer(timeout_s, _abort, (clients,))
        timer.name = "replication-fetch-deadline"
        timer.start()
        try:
            self._fetch(missing, clients)
        finally:
            timer.cancel()
            timer.join()
            with self._changed:
                self._fetching.difference_update(clients)
            for client in clients:
                client.close()

    def _fetch(self, missing: list[str], clients: Sequence[PeerClient]) -> None:
        """Pull from the peers in the order in which they say what they have: a dead one delays nothing."""
        problems: list[str] = []
        silent: list[str] = []
        with ThreadPoolExecutor(max(len(clients), 1), thread_name_prefix="replication-fetch") as pool:
            try:
                asked = {pool.submit(_held_by, client, tuple(missing)): client for client in clients}
                for answer in as_completed(asked):
                    self._pull(missing, asked[answer], answer, problems, silent)
                    if not missing:
                        return
            finally:
                _abort(clients)  # nobody waits for peers that have not answered
        reasons = "; ".join(sorted(problems + silent)) or "there are no other replicas"
        message = f"no good copy of {', '.join(missing)} was found: {reasons}"
        raise CheckpointError(message) if silent else BlobLostError(missing[0], message)

    def _pull(
        self,
        missing: list[str],
        client: PeerClient,
        answer: Future[frozenset[str]],
        problems: list[str],
        silent: list[str],
    ) -> None:
        """Pull what a peer has and take it off `missing`; add what it lacks, or that it did not answer."""
        try:
            held = answer.result()
            problems += [f"{client.peer} has no good copy of {digest}" for digest in missing if digest not in held]
            problems += client.pull(self._store, [digest for digest in missing if digest in held]).values()
        except CheckpointError as error:
            silent.append(str(error))
        missing[:] = [digest for digest in missing if not self._store.is_good(digest)]

    def _too_few(self, job: Job, lanes: Sequence[Lane], needed: int, timeout_s: float) -> NoMajorityError:
        reasons = [
            job.failed.get(lane.peer.id, f"{lane.peer}: not done within {timeout_s:g} s")
            for lane in lanes
            if lane.peer.id not in job.held
        ]
        return NoMajorityError(
            f"{len(job.held)} of {needed} needed copies on other replicas were made: "
            + ("; ".join(reasons) or f"there are {len(lanes)} other replicas")
        )

    def _current_peers(self) -> tuple[Peer, ...]:
        return tuple(self._peers() if callable(self._peers) else self._peers)

    def _lanes_now(self, kind: str) -> list[Lane]:
        peers = () if self._is_closed else self._current_peers()
        self._retire_lanes(peers)
        lanes = []
        for peer in peers:
            lane = self._lanes.get((peer, kind))
            if lane is None:
                lane = Lane(
                    peer,
                    f"replication-{peer.id}-{kind}",
                    store=self._store,
                    connect=self._pusher,
                    changed=self._changed,
                    on_push=self.on_push,
                )
                self._lanes[peer, kind] = lane
            lanes.append(lane)
        return lanes

    def _retire_lanes(self, peers: Sequence[Peer]) -> None:
        for key in [key for key in self._lanes if key[0] not in peers]:
            lane = self._lanes.pop(key)
            lane.close()
            self._retired.append(lane)

    def _pusher(self, peer: Peer) -> Pusher:
        return Pusher(peer, secret=self._secret, tls=self._tls, timeout_s=self._timeout_s)

    def _client(self, peer: Peer) -> PeerClient:
        return PeerClient(peer, secret=self._secret, tls=self._tls, timeout_s=self._timeout_s)


def _held_by(client: PeerClient, digests: Sequence[str]) -> frozenset[str]:
    return frozenset(digest for digest in digests if client.has(digest))


def _abort(clients: Iterable[PeerClient]) -> None:
    for client in clients:
        client.abort()
