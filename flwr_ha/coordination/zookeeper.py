"""The store on Apache ZooKeeper; beside `connection` the only module that imports kazoo."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import (
    AuthFailedError,
    BadVersionError,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    RolledBackError,
    RuntimeInconsistency,
)
from kazoo.handlers.threading import KazooTimeoutError

from flwr_ha.coordination.connection import Handshake, SocketKeeper, credentials
from flwr_ha.coordination.proof import SessionProof
from flwr_ha.coordination.protocol import Check, ConflictError, Create, Delete, Operation, Set, Versioned
from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.settings import ZooKeeperSettings
from flwr_ha.tls import client_context

LOGGER = logging.getLogger(__name__)

CONFLICTS = (BadVersionError, NodeExistsError, NoNodeError, NotEmptyError)
REFUSALS = (*CONFLICTS, RolledBackError, RuntimeInconsistency)
KEEP_ALIVE = 1 / 12
CALL_LIMIT = 1 / 3


class ZooKeeperStore:
    """Implement `flwr_ha.coordination.protocol.Store` on a ZooKeeper ensemble.

    Each read is sent behind a ``sync``, so that a node that lags behind catches up first; of reads `together` the
    first one is, since what a session reads never goes back, not even on a connection to another node. ZooKeeper
    applies the commits of other sessions beside a ``sync``, so that a read may still miss what was
    answered a moment before (seen on busy nodes); it cannot miss what was answered before a write of
    its own session. Hence a new leader, whose election is a write, sees every commit of the terms
    before. A lost session is replaced by a new one; its ephemeral entries are gone then.
    Every call ends within a third of the session timeout, and a connection on which one was not
    answered in that time is dropped for one to another node, while the session still lives.

    Parameters
    ----------
    hosts : str
        ``host:port,host:port``, optionally followed by ``/path`` that all keys are put below.
    root : str
        Path of this cluster's keys, such as ``/flwr-ha/mnist``.
    session_timeout_s : float
        Session timeout to ask for, in seconds; ZooKeeper may grant another one.
    security : ZooKeeperSettings
        TLS and user.
    password : str
        Of that user.

    Raises
    ------
    ConfigError
        `hosts` or a file for TLS cannot be read, or a package for SASL is missing.
    """

    def __init__(
        self,
        hosts: str,
        root: str,
        *,
        session_timeout_s: float,
        security: ZooKeeperSettings | None = None,
        password: str = "",
    ) -> None:
        security = security or ZooKeeperSettings()
        self._hosts, _, prefix = hosts.partition("/")
        self._root = (f"/{prefix}" if prefix else "") + root.rstrip("/")
        self._proof = SessionProof()
        self._made_parents: set[str] = set()
        self._on_change: Callable[[], None] = lambda: None
        self._batch = _Batch()
        self._stop = threading.Event()
        self._keep_alive = threading.Thread(target=self._run_keep_alive, name="zookeeper-keep-alive", daemon=True)
        tls = None if security.ca is None else client_context(security.ca, security.cert, security.key)
        self._handler = SocketKeeper(session_timeout_s / 6, tls)
        try:
            self._client = KazooClient(
                hosts=self._hosts,
                timeout=session_timeout_s,
                handler=self._handler,
                connection_retry={"max_tries": -1, "delay": 0.05, "backoff": 2, "max_delay": session_timeout_s / 8},
                logger=logging.getLogger("kazoo.client"),
                **credentials(security, password),
            )
        except ValueError as error:
            raise ConfigError(f"the ZooKeeper hosts {hosts!r} are not host:port,host:port: {error}") from error
        self._handshake = Handshake(self._client, session_timeout_s, on_success=self._proof.note_connecting)

    @property
    def session_timeout_s(self) -> float:
        """Seconds of silence after which ZooKeeper ends the session, as negotiated."""
        return self._handshake.session_timeout_s

    @property
    def lease_s(self) -> float:
        """Two thirds of the negotiated session timeout, in seconds; see `SessionProof`."""
        return self.session_timeout_s * 2 / 3

    def proven_until(self, started_s: float) -> float:
        """Return until when a successful transaction proves the session alive; see `SessionProof`."""
        return min(self._proof.until(started_s, self.session_timeout_s), started_s + self.lease_s)

    def start(self, on_change: Callable[[], None], *, timeout_s: float) -> None:
        """Connect and make the root; see `Store.start`.

        Raises
        ------
        CoordinationError
            No node answered in time, or ZooKeeper refused the credentials; the message names it.
        """
        self._on_change = on_change
        self._client.add_listener(self._on_state)
        try:
            self._client.start(timeout=timeout_s)
            self._call(lambda: self._client.ensure_path_async(self._root or "/"))
            # With a user's entries a stranger is refused here, not in the middle of an election.
            self._call(lambda: self._client.get_children_async(self._root or "/"))
        except _CredentialsError:
            self.close()
            raise
        except (KazooTimeoutError, CoordinationError) as error:
            self.close()
            if self._handshake.is_refused:
                raise _CredentialsError(f"ZooKeeper at {self._hosts} refused the user or the password") from error
            reason = f": {self._handler.last_error}" if self._handler.last_error else ""
            raise CoordinationError(
                f"ZooKeeper at {self._hosts} did not answer within {timeout_s:g} s{reason}"
            ) from error
        self._keep_alive.start()

    def get(self, key: str) -> Versioned | None:
        """Return the newest value of `key`, and watch it."""
        path = self._path(key)
        try:
            data, stat = self._read(lambda: self._client.get_async(path, watch=self._on_event))
        except NoNodeError:
            if self._read(lambda: self._client.exists_async(path, watch=self._on_event)) is None:
                return None
            return self.get(key)  # it was created just now
        return Versioned(data, stat.version)

    def children(self, key: str) -> tuple[str, ...]:
        """Return the names below `key`, sorted, and watch them."""
        path = self._path(key)
        try:
            names = self._read(lambda: self._client.get_children_async(path, watch=self._on_event))
        except NoNodeError:
            if self._read(lambda: self._client.exists_async(path, watch=self._on_event)) is None:
                return ()
            return self.children(key)
        return tuple(sorted(names))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send one ``sync`` for the reads of this thread within."""
        self._batch.is_open = True
        try:
            yield
        finally:
            self._batch.is_open = self._batch.is_synced = False

    def transact(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or none; never repeated by itself."""
        for operation in operations:
            if isinstance(operation, Create):
                self._make_parents(operation.key)
        request = self._client.transaction()
        for operation in operations:
            path = self._path(operation.key)
            match operation:
                case Check(version=version):
                    request.check(path, version)
                case Create(data=data, is_ephemeral=is_ephemeral):
                    request.create(path, data, ephemeral=is_ephemeral)
                case Set(data=data, version=version):
                    request.set_data(path, data, -1 if version is None else version)
                case Delete(version=version):
                    request.delete(path, -1 if version is None else version)
        results = self._call(request.commit_async)
        refused = [
            (operation, result)
            for operation, result in zip(operations, results, strict=True)
            if isinstance(result, Exception)
        ]
        if refused:
            self._made_parents.clear()  # one of them may have been deleted
            _raise_refusal(refused)

    def close(self) -> None:
        """End the session; may be called twice."""
        self._stop.set()
        if self._keep_alive.is_alive():
            self._keep_alive.join()
        self._client.remove_listener(self._on_state)
        with suppress(KazooException, OSError):
            self._client.stop()
            self._client.close()

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _make_parents(self, key: str) -> None:
        parent = self._path(key).rpartition("/")[0]
        if parent not in self._made_parents:
            self._call(lambda: self._client.ensure_path_async(parent))
            self._made_parents.add(parent)

    def _read(self, request: Callable[[], Any]) -> Any:
        """Answer a read behind a ``sync``: both are sent at once, ZooKeeper keeps their order."""
        if self._batch.is_synced:
            return self._call(request)
        try:
            answer = self._call(lambda: (self._client.sync_async(self._root or "/"), request())[1])
        except NoNodeError:
            self._batch.is_synced = self._batch.is_open
            raise
        self._batch.is_synced = self._batch.is_open
        return answer

    def _call(self, request: Callable[[], Any]) -> Any:
        """Send a request and wait for its answer; NoNodeError and the like pass through."""
        started_s = time.monotonic()
        try:
            answer = request().get(timeout=self.session_timeout_s * CALL_LIMIT)
        except CONFLICTS:
            self._note_answer(started_s)
            raise
        except KazooTimeoutError as error:
            self._handler.drop_connection()
            raise CoordinationError(f"ZooKeeper at {self._hosts} did not answer") from error
        except (AuthFailedError, NoAuthError) as error:
            raise _CredentialsError(
                f"ZooKeeper at {self._hosts} refused the user: {type(error).__name__}, see zookeeper.auth"
            ) from error
        except (KazooException, OSError) as error:
            raise CoordinationError(f"ZooKeeper at {self._hosts} did not answer: {error!r}") from error
        self._note_answer(started_s)
        return answer

    def _note_answer(self, started_s: float) -> None:
        self._proof.note(started_s, time.monotonic(), self.session_timeout_s)

    def _run_keep_alive(self) -> None:
        while not self._stop.wait(self.session_timeout_s * KEEP_ALIVE):
            with suppress(CoordinationError, KazooException):
                self._call(lambda: self._client.exists_async(self._root or "/"))
            self._revive()

    def _revive(self) -> None:
        """Start kazoo again where its thread has ended: by an error that it did not foresee, or refused credentials."""
        if self._client._connection.connection_stopped.is_set() and not self._stop.is_set():
            LOGGER.warning("kazoo has given up, it is started again")
            with suppress(KazooException, OSError):
                self._client.start_async()

    def _on_event(self, _event: Any) -> None:
        self._on_change()

    def _on_state(self, state: Any) -> None:
        LOGGER.debug("the connection to ZooKeeper is %s", state)
        self._on_change()


class _Batch(threading.local):
    """Tell whether this thread reads together, and whether a read of it was answered behind a ``sync``."""

    is_open = False
    is_synced = False


class _CredentialsError(CoordinationError):
    """ZooKeeper does not know this user, or its entries belong to another one."""


def _raise_refusal(refused: Sequence[tuple[Operation, Exception]]) -> None:
    for operation, error in refused:
        if isinstance(error, CONFLICTS):
            raise ConflictError(f"{operation.key}: {type(error).__name__}")
    if all(isinstance(error, REFUSALS) for _, error in refused):
        raise ConflictError("ZooKeeper rolled the transaction back")
    operation, error = next(each for each in refused if not isinstance(each[1], REFUSALS))
    raise CoordinationError(f"ZooKeeper refused {operation.key}: {error!r}")
