"""The asking side of the blob protocol: one other replica, over HTTP."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from types import TracebackType
from typing import Any, Self

import httpx

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import CHUNK_BYTES
from flwr_ha.storage.uploads import OffsetError
from flwr_ha.tls import explain

_ATTEMPTS = 3  # in a row without progress
_BACKOFF_S = 0.1
_PIECE_BYTES = 256 * 1024  # what goes to the socket at once
_REFUSALS = {
    401: "refuses the secret",
    403: "refuses the secret",
    404: "has no good copy",
    413: "does not take blobs of this size",
    507: "has a full disk",
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


class _AgainError(Exception):
    """The transfer broke for a reason that may pass."""


class _OtherBytesError(_AgainError):
    """The peer got other bytes: they changed on the way, or the own copy is no good."""


class PeerClient:
    """Send blobs to one peer and get blobs from it, over one connection that is kept.

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
        Bytes in one request; many MiB keep the round trips few, and memory does not grow with it.
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
        self.sent_bytes = 0  # of blobs, over the life of this client
        self._chunk_bytes = chunk_bytes
        self._aborted = threading.Event()
        self._sockets: list[socket.socket] = []
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

    @property
    def is_aborted(self) -> bool:
        """Whether `abort` was called; the client is of no use then."""
        return self._aborted.is_set()

    def abort(self) -> None:
        """End what is under way, and all that would come later, with a `CheckpointError`; at once."""
        self._aborted.set()
        for connection in list(self._sockets):
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it

    def has(self, digest: str) -> bool:
        """Whether the peer holds a good copy; raise `CheckpointError` if it does not say."""
        try:
            return self._received(digest) is None
        except (httpx.HTTPError, _AgainError) as error:
            raise self._failure(error) from error

    def push(
        self,
        store: BlobStore,
        digest: str,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the peer hold a verified copy; goes on where an earlier push has stopped.

        Parameters
        ----------
        store : BlobStore
            Where the own copy is.
        digest : str
            The blob.
        is_wanted : callable
            Asked between pieces; False ends the push with a `CheckpointError`.
        between_chunks : callable
            Called before each request that carries bytes; may use this client.

        Raises
        ------
        BlobMissingError, BlobCorruptError
            The copy in `store` is no good: fetch it.
        CheckpointError
            The peer is not reached, or refuses it. The message says why.
        """
        patience = _Patience(self._aborted)
        with store.open_to_send(digest) as file:
            while True:
                try:
                    offset = self._received(digest)
                    while offset is not None:
                        patience.note(offset)
                        between_chunks()
                        offset = self._send(file, digest, offset, is_wanted)
                    return
                except (httpx.HTTPError, _AgainError, OffsetError) as error:
                    if isinstance(error, _OtherBytesError) and store.has(digest):
                        store.verify(digest, is_forced=True)
                    if not patience.has_more():
                        raise self._failure(error) from error

    def pull(self, store: BlobStore, digest: str) -> None:
        """Put the peer's copy into `store`, verified; goes on where an earlier pull has stopped.

        Raises
        ------
        CheckpointCorruptError
            The peer sent other bytes: ask another one.
        CheckpointError
            The peer is not reached, or has no copy, or the own disk refuses it. The message says why.
        """
        patience = _Patience(self._aborted)
        while True:
            offset = store.partial_bytes(digest)
            patience.note(offset)
            try:
                self._pull_from(store, digest, offset)
                return
            except CheckpointCorruptError as error:
                if offset == 0:  # else the beginning, from elsewhere, may have been wrong
                    raise self._failure(error, kind=CheckpointCorruptError) from error
            except (httpx.HTTPError, _AgainError, OffsetError) as error:
                if not patience.has_more():
                    raise self._failure(error) from error

    def _received(self, digest: str) -> int | None:
        """Ask how much of a blob the peer has; None is all of it."""
        response = self._http.head(_path(digest), extensions=self._extensions)
        if response.status_code == 200:
            return None
        if response.status_code == 404 and "Upload-Offset" in response.headers:
            return _number(response.headers, "Upload-Offset")
        raise self._refusal(response)

    def _send(self, file: BufferedReader, digest: str, offset: int, is_wanted: Callable[[], bool]) -> int | None:
        """Send one chunk and return where to go on, None at the end."""
        size = file.seek(0, 2)
        count = min(self._chunk_bytes, max(size - offset, 0))
        file.seek(offset)
        response = self._http.patch(
            _path(digest),
            content=self._pieces(file, count, is_wanted),
            headers={"Content-Length": str(count), "Upload-Offset": str(offset), "Upload-Length": str(size)},
            extensions=self._extensions,
        )
        if response.status_code == 200:
            return None
        if response.status_code == 202:
            return _number(response.headers, "Upload-Offset")
        if response.status_code == 409:
            raise OffsetError(_number(response.headers, "Upload-Offset"))
        raise self._refusal(response)

    def _pieces(self, file: BufferedReader, count: int, is_wanted: Callable[[], bool]) -> Iterator[bytes]:
        while count:
            if self.is_aborted or not is_wanted():
                raise CheckpointError(f"{self.peer}: the transfer was given up")
            piece = file.read(min(count, _PIECE_BYTES))
            count -= len(piece)
            self.sent_bytes += len(piece)
            yield piece

    def _pull_from(self, store: BlobStore, digest: str, offset: int) -> None:
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
        store.finish([upload])

    def _refusal(self, response: httpx.Response) -> Exception:
        status = response.status_code
        if status in _REFUSALS:
            return CheckpointError(f"{self.peer} {_REFUSALS[status]} (HTTP status {status})")
        if status == 422:
            return _OtherBytesError("it received other bytes")
        return _AgainError(f"HTTP status {status} {response.text[:200]}".strip())

    def _failure(self, error: Exception, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
        reason = "the transfer was given up" if self.is_aborted else explain(error)
        return kind(f"{self.peer}: {reason}")

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            self._sockets = [connection]
            if self.is_aborted:
                self.abort()


class _Patience:
    """Allow a few attempts in a row without progress, with a wait that an abort ends."""

    def __init__(self, aborted: threading.Event) -> None:
        self._aborted = aborted
        self._furthest = -1
        self._failures = 0

    def note(self, offset: int) -> None:
        """Learn how far the transfer is."""
        if offset > self._furthest:
            self._furthest, self._failures = offset, 0

    def has_more(self) -> bool:
        """Count a failure, wait, and say whether to try again."""
        self._failures += 1
        return self._failures < _ATTEMPTS and not self._aborted.wait(_BACKOFF_S * self._failures)


def _number(headers: Mapping[str, str], name: str) -> int:
    try:
        return int(headers[name])
    except (KeyError, ValueError) as error:
        raise _AgainError(f"the answer has no good {name}") from error


def _total_bytes(response: httpx.Response) -> int:
    if response.status_code == 200:
        return _number(response.headers, "Content-Length")
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    if match is None:
        raise _AgainError("the answer has no good Content-Range")
    return int(match[1])


def _path(digest: str) -> str:
    return f"/blobs/{digest}"  # alone, a digest would look like a URL of scheme sha256
