"""The asking side of the blob protocol: one other replica, over HTTP."""

from __future__ import annotations

import re
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.abort import Abort
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import CHUNK_BYTES, FINISH_BYTES
from flwr_ha.storage.outlet import AgainError
from flwr_ha.storage.uploads import OffsetError, Upload
from flwr_ha.tls import explain

_ATTEMPTS = 3  # in a row without progress
BACKOFF_S = 0.1
_REFUSALS = {
    401: "refuses the secret",
    403: "refuses the secret",
    404: "has no good copy",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Name another replica.

    Attributes
    ----------
    id : int
        Its id.
    api : str
        ``host:port`` of its REST interface.
    """

    id: int
    api: str

    def __str__(self) -> str:
        return f"replica {self.id} ({self.api})"


class PeerClient:
    """Get blobs from one peer, over one connection that is kept.

    One thread at a time uses it; only `abort` may be called from any other.

    Parameters
    ----------
    peer : Peer
        The other replica.
    secret : str
        Shared secret of the replicas.
    tls : ssl.SSLContext or None
        Context for HTTPS; None for plain HTTP.
    timeout_s : float
        Longest wait for the peer to take or to send anything, in seconds.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        secret: str,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.peer = peer
        self._abort = Abort()
        self._http = httpx.Client(
            base_url=f"{'https' if tls else 'http'}://{peer.api}",
            headers={"Authorization": f"Bearer {secret}", "Accept-Encoding": "identity"},
            verify=tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # the default loads every public authority
            timeout=timeout_s,
            trust_env=False,  # a proxy meant for browsing is no way to a replica
        )
        self._extensions = {"trace": self._note_socket}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def abort(self) -> None:
        """End what is under way, and all that would come later, with a `CheckpointError`; at once."""
        self._abort.set()

    def has(self, digest: str) -> bool:
        """Whether the peer holds a good copy; raise `CheckpointError` if it does not say."""
        try:
            response = self._http.head(_path(digest), extensions=self._extensions)
            if response.status_code not in (200, 404):
                raise self._refusal(response)
            return response.status_code == 200
        except (httpx.HTTPError, AgainError) as error:
            raise self._failure(error) from error

    def pull(self, store: BlobStore, digests: Sequence[str]) -> dict[str, str]:
        """Put the peer's copies into `store`, verified and durable; goes on where an earlier pull has stopped.

        Returns
        -------
        dict of str to str
            Of what the peer sent other bytes, and a sentence about each: ask another one. All else is there.

        Raises
        ------
        CheckpointError
            The peer is not reached, or has no copy of one of them, or the own disk refuses it. The message says why.
        """
        spoiled: dict[str, str] = {}
        patience = Patience(self._abort)
        rest = deque(digests)
        while rest:
            patience.note(len(digests) - len(rest))
            bad, again = self._pull_some(store, rest)
            spoiled |= bad
            rest.extend(again)
            if again and not patience.has_more():
                raise self._failure(AgainError("what has arrived is changed by somebody else"))
        return spoiled

    def _pull_some(self, store: BlobStore, rest: deque[str]) -> tuple[dict[str, str], list[str]]:
        """Pull the first ones of `rest`; return what the peer has sent other bytes of, and what to pull once more."""
        offsets: dict[str, int] = {}
        uploads: list[Upload] = []
        pending_bytes = 0
        while rest and pending_bytes < FINISH_BYTES:
            upload, offsets[upload.digest] = self._received(store, rest.popleft())
            uploads.append(upload)
            pending_bytes += upload.total_bytes
        problems = store.finish_good(uploads)
        spoiled = {
            digest: f"{self.peer}: {problem}"
            for digest, problem in problems.items()
            # With another offset the beginning, which came from elsewhere, may have been wrong.
            if isinstance(problem, CheckpointCorruptError) and offsets[digest] == 0
        }
        return spoiled, [digest for digest in problems if digest not in spoiled]

    def _received(self, store: BlobStore, digest: str) -> tuple[Upload, int]:
        """Return an upload that has all bytes, not verified, and where the bytes of the last answer begin."""
        patience = Patience(self._abort)
        while True:
            offset = store.partial_bytes(digest)
            patience.note(offset)
            try:
                return self._receive_from(store, digest, offset), offset
            except (httpx.HTTPError, AgainError, OffsetError) as error:
                if not patience.has_more():
                    raise self._failure(error) from error

    def _receive_from(self, store: BlobStore, digest: str, offset: int) -> Upload:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._http.stream("GET", _path(digest), headers=headers, extensions=self._extensions) as response:
            if response.status_code not in (200, 206, 416):
                response.read()
                raise self._refusal(response)
            upload = store.receive(digest, _total_bytes(response))
            if response.status_code != 416:  # 416: all is here already, but unfinished
                for chunk in response.iter_raw(CHUNK_BYTES):
                    upload.append(offset, chunk)
                    offset += len(chunk)
        return upload

    def _refusal(self, response: httpx.Response) -> Exception:
        if response.status_code in _REFUSALS:
            meaning = _REFUSALS[response.status_code]
            return CheckpointError(f"{self.peer} {meaning} (HTTP status {response.status_code})")
        return AgainError(f"HTTP status {response.status_code} {response.text[:200]}".strip())

    def _failure(self, error: Exception) -> CheckpointError:
        reason = "the transfer was given up" if self._abort.is_set else explain(error)
        return CheckpointError(f"{self.peer}: {reason}")

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._abort.watch(info["return_value"].get_extra_info("socket"))


class Patience:
    """Allow a few attempts in a row without progress, with a wait that an abort ends."""

    def __init__(self, abort: Abort) -> None:
        self._abort = abort
        self._furthest = -1
        self._failures = 0

    def note(self, offset: int) -> bool:
        """Learn how far the transfer is, and say whether that is further than before."""
        is_further = offset > self._furthest
        if is_further:
            self._furthest, self._failures = offset, 0
        return is_further

    def has_more(self) -> bool:
        """Count a failure, wait, and say whether to try again."""
        self._failures += 1
        return self._failures < _ATTEMPTS and not self._abort.wait(BACKOFF_S * self._failures)


def _number(headers: Mapping[str, str], name: str) -> int:
    try:
        return int(headers[name])
    except (KeyError, ValueError) as error:
        raise AgainError(f"the answer has no good {name}") from error


def _total_bytes(response: httpx.Response) -> int:
    if response.status_code == 200:
        return _number(response.headers, "Content-Length")
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    if match is None:
        raise AgainError("the answer has no good Content-Range")
    return int(match[1])


def _path(digest: str) -> str:
    return f"/blobs/{digest}"  # alone, a digest would look like a URL of scheme sha256
