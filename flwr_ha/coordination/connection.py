"""How kazoo reaches ZooKeeper: bounded in time, over TLS that trusts one authority, as a user."""

from __future__ import annotations

import importlib.util
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from kazoo.client import KazooClient
from kazoo.exceptions import AuthFailedError
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.security import make_acl, make_digest_acl

from flwr_ha.errors import ConfigError
from flwr_ha.settings import ZooKeeperSettings
from flwr_ha.tls import explain, hang_up


class SocketKeeper(SequentialThreadingHandler):  # type: ignore[misc]  # kazoo has no types
    """Bound kazoo's connection attempts in time, and let us drop a connection that has gone silent.

    kazoo sends no ping while requests go out, so with regular requests it would wait for the answers
    of a dead host until TCP gives up, long after the session is lost. TLS is made here, since kazoo
    trusts all public authorities beside the one that it is given.
    """

    def __init__(self, connect_timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._socket: socket.socket | None = None
        self.last_error = ""

    def create_connection(self, *args: Any, **options: Any) -> socket.socket:
        """Connect as kazoo does, but in less time than a whole session."""
        options["timeout"] = min(options.get("timeout", self._connect_timeout_s), self._connect_timeout_s)
        try:
            plain = cast(socket.socket, super().create_connection(*args, **options))
            self._socket = plain if self._tls is None else _secured(plain, self._tls, options)
        except OSError as error:
            self.last_error = explain(error)
            raise
        return self._socket

    def drop_connection(self) -> None:
        """Make kazoo connect to another node; the session stays."""
        current = self._socket
        if current is not None:
            hang_up(current)


def _secured(plain: socket.socket, tls: ssl.SSLContext, options: dict[str, Any]) -> ssl.SSLSocket:
    plain.settimeout(options["timeout"])
    try:
        return tls.wrap_socket(plain, server_hostname=options["hostname"])
    except OSError:
        plain.close()
        raise


class Handshake:
    """Keep what kazoo learns while it connects, and does not say.

    Parameters
    ----------
    client : KazooClient
        Not started yet.
    session_timeout_s : float
        What it asks for, in seconds.
    on_success : callable
        Called with the ``time.monotonic()`` of the beginning, each time a session is open and its user accepted.

    Attributes
    ----------
    session_timeout_s : float
        What ZooKeeper has granted, in seconds; before the first session what is asked for.
    is_refused : bool
        Whether ZooKeeper refused the user at the last attempt. kazoo stops then, and a moment later its state says no
        more than that it is closed.
    """

    def __init__(self, client: KazooClient, session_timeout_s: float, *, on_success: Callable[[float], None]) -> None:
        self.session_timeout_s = session_timeout_s
        self.is_refused = False
        self._on_success = on_success
        self._connect = client._connection._connect
        client._connection._connect = self._connect_and_note

    def _connect_and_note(self, *args: Any) -> tuple[float, float]:
        started_s = time.monotonic()
        try:
            read_timeout_ms, connect_timeout_ms = self._connect(*args)
        except AuthFailedError:
            self.is_refused = True
            raise
        self.is_refused = False
        self._on_success(started_s)
        self.session_timeout_s = read_timeout_ms * 1.5 / 1000  # kazoo's read timeout is two thirds of it
        return read_timeout_ms, connect_timeout_ms


def credentials(security: ZooKeeperSettings, password: str) -> dict[str, Any]:
    """Return kazoo's options; what we create can be read and changed by this user alone."""
    match security.auth:
        case "digest":
            return {
                "auth_data": [("digest", f"{security.user}:{password}")],
                "default_acl": [make_digest_acl(security.user, password, all=True)],
            }
        case "sasl":
            if importlib.util.find_spec("puresasl") is None:
                raise ConfigError('zookeeper.auth = "sasl" needs a package: pip install "flwr-ha[sasl]"')
            return {
                "sasl_options": {"mechanism": "DIGEST-MD5", "username": security.user, "password": password},
                "default_acl": [make_acl("sasl", security.user, all=True)],
            }
        case _:
            return {}
