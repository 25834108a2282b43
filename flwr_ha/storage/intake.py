"""The receiving end of pushes: a thread takes blobs from one connection and puts them into the store."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Mapping

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import CHUNK_BYTES, is_disk_full
from flwr_ha.storage.frames import ACCEPTED, HEAD_BYTES, Answer, Head, Kind, names, names_bytes
from flwr_ha.storage.uploads import LengthError, OffsetError, Upload

_STALL_S = 60  # a sender that is silent for so long has to connect anew
_logger = logging.getLogger(__name__)


class Intake:
    """Take the blobs that come over one connection.

    Memory is bounded by a few megabytes, whatever is sent.

    Parameters
    ----------
    store : BlobStore
        Where they go.
    max_bytes : int
        Largest blob that is taken.
    """

    def __init__(self, store: BlobStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._refusal: Answer | None = None

    def serve(self, connection: socket.socket) -> None:
        """Answer until the sender hangs up, is silent for a minute, or sends what cannot be understood."""
        # With a time-out of Python's the socket does not block, and the kernel does not fill the buffer in one call.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALL_S, 0))
        try:
            connection.sendall(ACCEPTED)
            while head := self._read(connection, HEAD_BYTES):
                self._take(connection, Head.from_bytes(head))
        except (OSError, ValueError) as error:
            _logger.debug("a sender of blobs is gone: %r", error)

    def _take(self, connection: socket.socket, head: Head) -> None:
        if head.kind is Kind.PIECE:
            self._take_piece(connection, head)
        else:
            asked = names(self._read(connection, names_bytes(head.count)))
            connection.sendall((self._refusal or self._answer(asked)).to_bytes())

    def _take_piece(self, connection: socket.socket, head: Head) -> None:
        """Write a piece as it comes; what does not fit is dropped, and the next answer says what is lacking."""
        offset, end = head.offset, head.offset + head.count
        upload = self._upload_of(connection, head)
        while offset < end:
            count = connection.recv_into(self._buffer, min(end - offset, CHUNK_BYTES), socket.MSG_WAITALL)
            if count == 0:
                raise ConnectionError("the sender has hung up in the middle of a piece")
            try:
                if upload is not None:
                    upload.append(offset, self._buffer[:count])
            except (OffsetError, LengthError):  # somebody else sends the same blob
                upload = None
            except CheckpointError as error:
                upload = None
                self._refuse(connection, _explained(error))
            offset += count

    def _upload_of(self, connection: socket.socket, head: Head) -> Upload | None:
        """Return where a piece goes; None: nowhere, and the sender was told."""
        if self._refusal is None and head.total > self._max_bytes:
            refusal = f"does not take blobs of this size: {self._max_bytes} bytes at most"
            self._refuse(connection, Answer(refusal=refusal))
        if self._refusal is not None:
            return None
        try:
            return self._store.receive(head.digest, head.total)
        except CheckpointError as error:
            self._refuse(connection, _explained(error))
            return None

    def _refuse(self, connection: socket.socket, answer: Answer) -> None:
        """Tell a sender that has much more to send that it is in vain."""
        self._refusal = answer
        connection.sendall(answer.to_bytes())

    def _answer(self, asked: Mapping[str, int]) -> Answer:
        """Make blobs of what is here in full, keep them all young, and say what is lacking."""
        try:
            missing = [digest for digest in asked if not self._store.is_kept(digest)]
            complete = [digest for digest in missing if self._store.partial_bytes(digest) >= asked[digest]]
            problems = self._store.finish_good(self._store.receive(digest, asked[digest]) for digest in complete)
            lacking = {digest: self._store.partial_bytes(digest) for digest in missing if not self._store.has(digest)}
        except CheckpointError as error:
            return _explained(error)
        spoiled = {digest: str(each) for digest, each in problems.items() if isinstance(each, CheckpointCorruptError)}
        return Answer(lacking, spoiled)

    def _read(self, connection: socket.socket, count: int) -> bytes:
        """Return so many bytes; none where the sender has hung up before the first one."""
        data = bytearray()
        while len(data) < count:
            more = connection.recv(count - len(data), socket.MSG_WAITALL)
            if not more:
                if data:
                    raise ConnectionError("the sender has hung up in the middle of a frame")
                break
            data += more
        return bytes(data)


def _explained(error: CheckpointError) -> Answer:
    if is_disk_full(error):
        return Answer(refusal="has a full disk")
    return Answer(refusal=str(error), is_passing=True)
