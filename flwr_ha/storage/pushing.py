"""Pushes of blobs to one other replica that outlive broken connections."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.abort import Abort
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.frames import Answer
from flwr_ha.storage.outlet import AgainError, Outlet, UpgradeRefusedError
from flwr_ha.storage.peer import Patience, Peer
from flwr_ha.tls import explain

RECENT_S = 30.0  # much less than the age at which blobs that nothing names are collected


@dataclass(frozen=True, slots=True)
class _Push:
    """Say what is to be pushed."""

    store: BlobStore
    sizes: Mapping[str, int]
    is_wanted: Callable[[], bool]
    is_settled: bool
    patience: Patience


class Pusher:
    """Send blobs to one peer, over one connection that is kept.

    One thread at a time uses it; only `abort` may be called from any other.

    Parameters
    ----------
    peer : Peer
        The other replica.
    secret : str
        Shared secret of the replicas.
    tls : ssl.SSLContext or None
        Context for HTTPS; None for plain HTTP.
    chunk_bytes : int
        Bytes that are sent before the peer's refusal is noticed.
    timeout_s : float
        Longest wait for the peer to take or to send anything, in seconds.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        secret: str,
        tls: ssl.SSLContext | None = None,
        chunk_bytes: int = 16 << 20,
        timeout_s: float = 5.0,
    ) -> None:
        self.peer = peer
        self.sent_bytes = 0  # over the life of this object
        self._secret = secret
        self._tls = tls
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._abort = Abort()
        self._outlet: Outlet | None = None
        self._young: dict[str, int] = {}  # on the peer, which would collect them if nobody asked
        self._asked_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._outlet is not None:
            self._outlet.close()
            self._outlet = None

    @property
    def is_aborted(self) -> bool:
        """Whether `abort` was called; the object is of no use then."""
        return self._abort.is_set

    def abort(self) -> None:
        """End what is under way, and all that would come later, with a `CheckpointError`; at once."""
        self._abort.set()

    def push(
        self,
        store: BlobStore,
        digests: Sequence[str],
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        is_settled: bool = True,
    ) -> None:
        """Make the peer hold verified copies; goes on where an earlier push has stopped.

        Parameters
        ----------
        store : BlobStore
            Where the own copies are.
        digests : Sequence of str
            The blobs.
        is_wanted : callable
            Asked between pieces; False ends the push with a `CheckpointError`.
        is_settled : bool
            Return when the copies are verified and durable; False: when they are on their way, for a settled push
            that comes soon.

        Raises
        ------
        BlobMissingError, BlobCorruptError
            A copy in `store` is no good: fetch it.
        CheckpointError
            The peer is not reached, or refuses it. The message says why.
        """
        sizes = {digest: store.size_to_send(digest) for digest in digests}
        job = _Push(store, sizes, is_wanted, is_settled, Patience(self._abort))
        while True:
            try:
                self._push(job, self._connected())
                return
            except (OSError, AgainError) as error:
                self.close()
                if not job.patience.has_more():
                    raise self._failure(error) from error
            except UpgradeRefusedError as error:
                raise CheckpointError(f"{self.peer} {_meaning(error.status)} (HTTP status {error.status})") from error
            except CheckpointCorruptError:
                raise
            except CheckpointError as error:
                self.close()
                raise self._failure(error) from error

    def _push(self, job: _Push, outlet: Outlet) -> None:
        is_sent = False
        while True:
            asked_s = time.monotonic()
            answer = self._ask(outlet, job.sizes)
            self._look_at(answer, job.store)
            if not answer.lacking and time.monotonic() - asked_s < RECENT_S:
                self._young.clear()
                return
            kept_bytes = sum(size for digest, size in job.sizes.items() if digest not in answer.lacking)
            is_further = job.patience.note(kept_bytes + sum(answer.lacking.values()))
            if is_sent and answer.lacking and not is_further:
                raise AgainError("it does not get further")
            self._young |= {digest: size for digest, size in job.sizes.items() if digest not in answer.lacking}
            for digest, offset in answer.lacking.items():
                self._send(job, outlet, digest, offset)
            if not job.is_settled:
                return
            is_sent = True

    def _send(self, job: _Push, outlet: Outlet, digest: str, offset: int) -> None:
        """Send the rest of a blob; the peer is asked now and then for what it already has, which keeps that young."""
        total = job.sizes[digest]
        with job.store.open_to_send(digest) as file:
            while offset < total:
                if time.monotonic() - self._asked_s >= RECENT_S:
                    self._ask(outlet, self._young)
                count = min(total - offset, self._chunk_bytes)
                outlet.send(
                    file,
                    digest,
                    offset=offset,
                    count=count,
                    total=total,
                    is_wanted=lambda: job.is_wanted() and not self.is_aborted,
                )
                offset += count
                self.sent_bytes += count
        self._young[digest] = total

    def _ask(self, outlet: Outlet, sizes: Mapping[str, int]) -> Answer:
        self._asked_s = time.monotonic()
        answer = outlet.ask(sizes)
        if not answer.lacking.keys() <= sizes.keys():
            raise AgainError("it lacks blobs that it was not asked for")
        return answer

    def _look_at(self, answer: Answer, store: BlobStore) -> None:
        """Where other bytes have arrived, look whether the own copy is good."""
        for digest, problem in answer.spoiled.items():
            if store.has(digest):
                store.verify(digest, is_forced=True)
            raise AgainError(problem)

    def _connected(self) -> Outlet:
        if self._outlet is not None and self._outlet.is_gone:
            self.close()
        if self._outlet is None:
            self._outlet = Outlet(
                self.peer.api,
                secret=self._secret,
                tls=self._tls,
                timeout_s=self._timeout_s,
                on_socket=self._abort.watch,
            )
        return self._outlet

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.peer}: {'the transfer was given up' if self.is_aborted else explain(error)}")


def _meaning(status: int) -> str:
    if status in (401, 403):
        return "refuses the secret"
    return "takes no pushes: it is of another version, or has too many connections"
