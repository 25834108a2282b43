"""Serve the REST API from a thread of its own."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from flwr_ha.errors import ConfigError
from flwr_ha.replica.upgrades import Upgrades
from flwr_ha.settings import Endpoint, TlsSettings

START_TIMEOUT_S = 10.0


class ApiServer:
    """Run uvicorn in a thread; bound at once, so that a taken port is known before anything starts.

    Parameters
    ----------
    endpoint : Endpoint
        Where to listen.
    tls : TlsSettings
        Certificate of the server, where there is one.

    Raises
    ------
    ConfigError
        The port is taken, or the address is not of this machine.
    """

    def __init__(self, endpoint: Endpoint, *, tls: TlsSettings) -> None:
        self._tls = tls
        self._socket = bind(endpoint, setting="api")
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._upgrades: Upgrades | None = None

    def start(self, app: ASGIApp, *, upgrades: Upgrades | None = None) -> None:
        """Begin to answer; `upgrades` are ended with the server."""
        self._upgrades = upgrades
        config = uvicorn.Config(
            app,
            http=cast(Any, upgrades) or "auto",  # any callable will do, uvicorn's annotation asks for a class
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",  # nothing here speaks WebSocket, and its library need not be loaded
            timeout_graceful_shutdown=1,
            ssl_certfile=self._tls.cert,
            ssl_keyfile=self._tls.key,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="api", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it is bound to, also where 0 was asked for."""
        port: int = self._socket.getsockname()[1]
        return port

    def is_alive(self) -> bool:
        """Whether the thread serves."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._upgrades is not None:
            self._upgrades.close()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=START_TIMEOUT_S)
        self._socket.close()


def bind(endpoint: Endpoint, *, setting: str) -> socket.socket:
    """Return a socket bound to the endpoint; ConfigError names the setting where that fails."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    # Without the protocol asyncio does not set TCP_NODELAY, and an answer in two pieces may be 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((endpoint.host, endpoint.port))
        listener.listen(512)  # a second process could else bind the same port and only fail later
    except OSError as error:
        listener.close()
        raise ConfigError(f"{setting} = {endpoint} cannot be listened on: {error.strerror or error}") from error
    return listener
