"""Ending what waits for a socket, from any thread."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Abort:
    """Wake the thread that waits for the newest connection, once and for all.

    The thread itself notices by the error that it gets, and asks `is_set`.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._socket: socket.socket | None = None

    @property
    def is_set(self) -> bool:
        """Whether it was called for."""
        return self._event.is_set()

    def set(self) -> None:
        """End what is under way and all that would come later; at once."""
        self._event.set()
        connection = self._socket
        if connection is not None:
            with suppress(OSError):  # closed already
                # The method of a TLS socket would first make it a plain one, under the thread that uses it.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def watch(self, connection: socket.socket) -> None:
        """Learn of a connection before anything waits for it."""
        self._socket = connection
        if self.is_set:
            self.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is called for, `timeout_s` at most, and say whether it was."""
        return self._event.wait(timeout_s)
