"""The public socket of a SuperLink: it opens and closes with the leadership, and by itself when the lease runs out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable

from flwr_ha.superlink.lease import Lease

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.025
_BACKLOG = 2048


def listening_sockets(address: str) -> list[socket.socket]:
    """Return listening sockets on all addresses that a ``host:port`` stands for.

    Parameters
    ----------
    address : str
        ``host:port``; IPv6 hosts in brackets.

    Returns
    -------
    list of socket.socket
        At least one, listening. They know that they speak TCP: only then asyncio sends small packets at once, and an
        answer in two pieces is not 40 ms late.

    Raises
    ------
    OSError
        The port is taken (``EADDRINUSE``: try again), or the host is not one of this machine.
    """
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, bind_to in dict.fromkeys(found):
            # A name may have an IPv6 address on a machine without IPv6.
            with contextlib.ExitStack() as undo:
                try:
                    listener = undo.enter_context(socket.socket(family, kind, protocol))
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    listener.bind(bind_to)
                    listener.listen(_BACKLOG)
                except OSError as error:
                    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                        continue
                    raise
                undo.pop_all()
                sockets.append(listener)
    except OSError:
        for listener in sockets:
            listener.close()
        raise
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, f"{address} is not an address of this machine")
    return sockets


class PublicListener:
    """Open and close the public socket; a watchdog thread closes it when the lease runs out.

    Parameters
    ----------
    lease : Lease
        Says whether the replica leads.
    make_protocol : callable
        Returns a new protocol for a connection.
    connections : callable
        Returns the transports of all open connections that came in on a public socket.
    on_closed : callable
        Called in the event loop with the reason when the watchdog has closed the socket.
    tls : ssl.SSLContext, optional
        Certificates for the public socket.
    """

    def __init__(
        self,
        *,
        lease: Lease,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Callable[[], Iterable[asyncio.Transport]],
        on_closed: Callable[[str], None],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._lease = lease
        self._make_protocol = make_protocol
        self._connections = connections
        self._on_closed = on_closed
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._stopped = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="lease-watchdog", daemon=True)
        self._watchdog.start()

    async def open(self, address: str) -> None:
        """Listen on the public address.

        Parameters
        ----------
        address : str
            ``host:port``.

        Raises
        ------
        OSError
            The address cannot be listened on; ``EADDRINUSE`` may pass.
        """
        self.close()
        sockets = listening_sockets(address)
        for listener in sockets:
            listener.setblocking(False)
            self._servers.append(await self._loop.create_server(self._make_protocol, sock=listener, ssl=self._tls))
        self._sockets = sockets

    def close(self) -> None:
        """Stop listening and abort the public connections; does nothing when closed."""
        servers, self._servers, self._sockets = self._servers, [], []
        for server in servers:
            server.close()
        for transport in list(self._connections()):
            transport.abort()

    def stop(self) -> None:
        """Close the socket and end the watchdog."""
        self.close()
        self._stopped.set()
        self._watchdog.join()

    def _watch(self) -> None:
        asked_for: list[socket.socket] | None = None
        while not self._stopped.wait(_WATCH_INTERVAL_S):
            sockets = self._sockets
            if not sockets or self._lease.is_valid:
                continue
            if asked_for is not sockets:
                asked_for = sockets
                self._loop.call_soon_threadsafe(self._run_out, sockets)
                continue
            # The event loop is busy: have the kernel refuse connections. The ones already open do no harm, each
            # request looks at the lease first.
            for listener in sockets:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)

    def _run_out(self, sockets: list[socket.socket]) -> None:
        if self._sockets is not sockets:
            return  # closed meanwhile, perhaps opened again under a new lease
        why = "the lease ran out before it was renewed"
        logger.warning("the public socket is closed: %s", why)
        self.close()
        self._on_closed(why)
