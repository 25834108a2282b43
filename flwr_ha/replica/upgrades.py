"""Connections that ask the web server for another protocol, and leave it for a thread of their own.

uvicorn is made for requests that come and go: megabytes that are pushed through it are copied several times on
their way from the socket to the disk. `Upgrades` stands in front of it, as the class that uvicorn makes for each
connection (its setting ``http``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from flwr_ha.tls import hang_up

AT_ONCE = 64  # connections, each with a thread
_LONGEST_HEAD_BYTES = 16_384
_JOIN_S = 2.0


class Upgrades:
    """Take over connections that begin with a request for an upgrade; all others are uvicorn's.

    Parameters
    ----------
    serve : callable
        Answers the request and then whatever comes, on a blocking socket and in a thread of its own.
    path, protocol : str
        What the request must be for: ``GET path`` with ``Upgrade: protocol``.
    authorize : callable
        Whether the value of the header Authorization is the right one; must not block.
    """

    def __init__(
        self, serve: Callable[[socket.socket], None], *, path: str, protocol: str, authorize: Callable[[str], bool]
    ) -> None:
        self.request_line = f"GET {path} HTTP/1.1\r\n".encode()
        self._serve = serve
        self._protocol = protocol
        self._authorize = authorize
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, socket.socket] = {}
        self._is_closed = False

    def __call__(self, **settings: Any) -> asyncio.Protocol:
        """Return what uvicorn makes for a new connection."""
        return _Door(self, AutoHTTPProtocol(**settings))

    def is_wanted(self, head: bytes) -> bool:
        """Whether the head of a request asks for the protocol, and may have it."""
        lines = head.decode("latin-1").split("\r\n")[1:]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        is_asked = headers.get("upgrade", "").lower() == self._protocol
        return is_asked and self._authorize(headers.get("authorization", "")) and len(self._running) < AT_ONCE

    def start(self, connection: socket.socket) -> None:
        """Serve a connection, which is closed at the end."""
        with self._lock:
            if self._is_closed:
                connection.close()
                return
            connection.setblocking(True)
            thread = threading.Thread(target=self._run, args=(connection,), name="upgraded", daemon=True)
            self._running[thread] = connection
            thread.start()

    def close(self) -> None:
        """End all connections and their threads."""
        with self._lock:
            self._is_closed = True
            running = dict(self._running)
        for connection in running.values():
            hang_up(connection)
        for thread in running:
            thread.join(_JOIN_S)

    def _run(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._serve(connection)
        finally:
            with self._lock:
                del self._running[threading.current_thread()]


class _Door(asyncio.Protocol):
    """Look at the first bytes of a connection and pass it on."""

    def __init__(self, upgrades: Upgrades, web: asyncio.Protocol) -> None:
        self._upgrades = upgrades
        self._web = web
        self._head = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._web.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._head += data
        start = self._upgrades.request_line
        if start.startswith(self._head[: len(start)]):
            end = self._head.find(b"\r\n\r\n") + 4
            if end < 4 and len(self._head) < _LONGEST_HEAD_BYTES:
                return  # more will come
            if end == len(self._head) <= _LONGEST_HEAD_BYTES and self._upgrades.is_wanted(self._head):
                self._take_over()
                return
        self._transport.set_protocol(self._web)
        self._web.data_received(self._head)

    def eof_received(self) -> bool | None:
        return self._web.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._web.connection_lost(error)

    def _take_over(self) -> None:
        self._transport.pause_reading()
        if self._transport.get_extra_info("sslcontext") is not None:
            self._passing = asyncio.get_running_loop().create_task(self._pass_on())  # a task needs somebody to hold it
            return
        descriptor = os.dup(self._transport.get_extra_info("socket").fileno())
        self._transport.abort()  # closes its own descriptor: the connection lives on
        self._upgrades.start(socket.socket(fileno=descriptor))

    async def _pass_on(self) -> None:
        """Let the web server's loop go on with TLS, and give the thread the other end of a pair of sockets."""
        near, far = socket.socketpair()
        # Nobody waits for a sender to agree to the end of TLS; what it sent before it went still reaches the thread.
        inside = _Relay(self._transport, on_lost=self._transport.abort)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: inside, sock=near)
        self._transport.set_protocol(_Relay(transport, on_lost=transport.close, web=self._web))
        self._upgrades.start(far)
        self._transport.resume_reading()


class _Relay(asyncio.Protocol):
    """Pass what comes over one transport on to another, no faster than that takes it."""

    def __init__(self, other: Any, *, on_lost: Callable[[], None], web: asyncio.Protocol | None = None) -> None:
        self._other = other
        self._on_lost = on_lost
        self._web = web

    def data_received(self, data: bytes) -> None:
        self._other.write(data)

    def pause_writing(self) -> None:
        self._other.pause_reading()

    def resume_writing(self) -> None:
        self._other.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
        if self._web is not None:
            self._web.connection_lost(error)
