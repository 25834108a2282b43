"""The sending end of pushes: one connection to one replica."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Mapping
from io import BufferedReader

from flwr_ha.errors import CheckpointError
from flwr_ha.storage.files import CHUNK_BYTES
from flwr_ha.storage.frames import LENGTH_BYTES, PATH, PROTOCOL, Answer, Head, Kind, answer_bytes, question

_SLOWEST_BYTES_PER_S = 50e6  # of a disk that has to take, or to hash, all that is asked for before it answers
_LONGEST_HEAD_BYTES = 16_384


class AgainError(Exception):
    """The transfer broke for a reason that may pass."""


class UpgradeRefusedError(Exception):
    """The server does not take pushes from us.

    Attributes
    ----------
    status : int
        Its HTTP status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


class Outlet:
    """Push blobs over one connection; any error ends its use.

    Parameters
    ----------
    api : str
        ``host:port`` of the receiver's REST interface.
    secret : str
        Shared secret of the replicas.
    tls : ssl.SSLContext or None
        Context for HTTPS; None for plain HTTP.
    timeout_s : float
        Longest wait for the receiver to take or to send anything, in seconds.
    on_socket : callable
        Gets the socket before anything waits for it, so that another thread can shut it down.

    Raises
    ------
    UpgradeRefusedError
        The secret is wrong, or the other side is no replica of this version.
    """

    def __init__(
        self,
        api: str,
        *,
        secret: str,
        tls: ssl.SSLContext | None,
        timeout_s: float,
        on_socket: Callable[[socket.socket], None],
    ) -> None:
        host, _, port = api.rpartition(":")
        host = host.strip("[]")
        self._timeout_s = timeout_s
        self._socket = socket.create_connection((host, int(port)), timeout_s)
        try:
            on_socket(self._socket)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=host)
                on_socket(self._socket)
            self._upgrade(api, secret)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _upgrade(self, api: str, secret: str) -> None:
        self._socket.sendall(
            f"GET {PATH} HTTP/1.1\r\nHost: {api}\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n"
            f"Authorization: Bearer {secret}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            more = self._socket.recv(_LONGEST_HEAD_BYTES)
            head += more
            if not more or len(head) > _LONGEST_HEAD_BYTES:
                raise AgainError("Server disconnected without sending a response" if not head else "this is no HTTP")
        words = head.split(b"\r\n", 1)[0].split()
        if len(words) < 2 or not words[1].isdigit():
            raise AgainError("this is no HTTP")
        if words[1] != b"101":
            raise UpgradeRefusedError(int(words[1]))

    @property
    def is_gone(self) -> bool:
        """Whether the receiver has hung up, or says something that nobody has asked for, between two questions."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def ask(self, sizes: Mapping[str, int]) -> Answer:
        """Return what the receiver lacks of blobs of these sizes; what it has in full is durable and young then.

        Raises
        ------
        CheckpointError
            The receiver takes nothing, and asking again will not change that.
        AgainError
            It takes nothing for now, or the connection broke.
        """
        self._socket.settimeout(self._timeout_s + sum(sizes.values()) / _SLOWEST_BYTES_PER_S)
        self._socket.sendall(question(sizes))
        answer = self._read_answer()
        self._socket.settimeout(self._timeout_s)
        return answer

    def send(
        self, file: BufferedReader, digest: str, *, offset: int, count: int, total: int, is_wanted: Callable[[], bool]
    ) -> None:
        """Send a piece of a blob.

        Raises
        ------
        CheckpointError
            It is not wanted any more, or the receiver refuses it for good.
        AgainError
            The receiver refuses it for now, or the file has become shorter.
        """
        if self.is_gone:
            self._read_answer()  # raises what it refuses, or that it has hung up
            raise AgainError("it answers what was not asked")
        file.seek(offset)
        before, rest = Head(Kind.PIECE, digest, offset, total, count).to_bytes(), count
        while rest:
            if not is_wanted():
                raise CheckpointError("the transfer was given up")
            data = file.read(min(rest, CHUNK_BYTES))
            if not data:
                raise AgainError(f"{digest} has become shorter")
            if before:
                self._socket.sendall(before)
                before = b""
            self._socket.sendall(data)
            rest -= len(data)

    def _read_answer(self) -> Answer:
        try:
            answer = Answer.from_bytes(self._read(answer_bytes(self._read(LENGTH_BYTES))))
        except ValueError as error:
            raise AgainError(str(error)) from error
        if answer.refusal:
            raise AgainError(answer.refusal) if answer.is_passing else CheckpointError(answer.refusal)
        return answer

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise AgainError("the connection was closed")
            data += more
        return bytes(data)
