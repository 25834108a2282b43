"""Ending what waits for a socket, from any thread."""

from __future__ import annotations

import socket
import threading

from flwr_ha.tls import hang_up


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
            hang_up(connection)

    def watch(self, connection: socket.socket) -> None:
        """Learn of a connection before anything waits for it."""
        self._socket = connection
        if self.is_set:
            self.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is called for, `timeout_s` at most, and say whether it was."""
        return self._event.wait(timeout_s)
