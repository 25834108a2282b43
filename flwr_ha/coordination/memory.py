"""A store in memory, for tests: several sessions on one tree, with answers that get lost on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from flwr_ha.coordination.protocol import Check, ConflictError, Create, Delete, Operation, Set, Versioned
from flwr_ha.errors import CoordinationError


@dataclass(slots=True)
class Entry:
    """Hold one value of the tree."""

    data: bytes
    version: int = 0
    owner: MemoryStore | None = None


@dataclass(slots=True, eq=False)
class MemoryTree:
    """Keep what the sessions share.

    Attributes
    ----------
    entries : dict of str to Entry
        The values by key.
    sessions : list of MemoryStore
        Stores that were started and not closed.
    lock : RLock
        Held for every operation: they are linearizable.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    sessions: list[MemoryStore] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def store(self, *, session_timeout_s: float = 4.0) -> MemoryStore:
        """Return a new session on this tree; call its `start`."""
        return MemoryStore(self, session_timeout_s=session_timeout_s)

    def apply(self, operations: Sequence[Operation], owner: MemoryStore) -> None:
        """Apply all operations to a copy, then take the copy; see `Store.transact`."""
        entries = dict(self.entries)
        for operation in operations:
            entry = entries.get(operation.key)
            if isinstance(operation, Create):
                if entry is not None:
                    raise ConflictError(f"{operation.key} exists")
                for parent in parents(operation.key):
                    entries.setdefault(parent, Entry(b""))
                entries[operation.key] = Entry(operation.data, owner=owner if operation.is_ephemeral else None)
                continue
            if entry is None or operation.version not in (None, entry.version):
                raise ConflictError(f"{operation.key} is missing or changed")
            match operation:
                case Check():
                    pass
                case Set():
                    entries[operation.key] = Entry(operation.data, entry.version + 1, entry.owner)
                case Delete():
                    if any(key.startswith(f"{operation.key}/") for key in entries):
                        raise ConflictError(f"{operation.key} has children")
                    del entries[operation.key]
        self.entries = entries

    def drop_session(self, owner: MemoryStore) -> None:
        """Remove the ephemeral entries of one session."""
        with self.lock:
            self.entries = {key: entry for key, entry in self.entries.items() if entry.owner is not owner}
        self.notify()

    def notify(self) -> None:
        """Tell every session that something may have changed."""
        with self.lock:
            sessions = tuple(self.sessions)
        for session in sessions:
            session.wake()


def parents(key: str) -> tuple[str, ...]:
    """Return the keys above `key`, topmost first."""
    parts = key.split("/")
    return tuple("/".join(parts[:count]) for count in range(1, len(parts)))


class MemoryStore:
    """Implement `flwr_ha.coordination.protocol.Store` in memory, with failpoints.

    Parameters
    ----------
    tree : MemoryTree
        What it shares with other sessions.
    session_timeout_s : float
        What it reports, in seconds; sessions end by `expire` only.
    """

    def __init__(self, tree: MemoryTree, *, session_timeout_s: float = 4.0) -> None:
        self._tree = tree
        self._session_timeout_s = session_timeout_s
        self._on_change: Callable[[], None] | None = None
        self._lost_answers: list[bool] = []
        self._is_reachable = True

    @property
    def session_timeout_s(self) -> float:
        """Seconds of silence after which a real store would end the session."""
        return self._session_timeout_s

    @property
    def lease_s(self) -> float:
        """Two thirds of the session timeout, in seconds."""
        return self._session_timeout_s * 2 / 3

    def proven_until(self, started_s: float) -> float:
        """Return `started_s` and the lease: the tree is touched by the transaction itself."""
        return started_s + self.lease_s

    def start(self, on_change: Callable[[], None], *, timeout_s: float) -> None:
        """Begin the session; `timeout_s` is not needed here."""
        del timeout_s
        self._require_reachable()
        self._on_change = on_change
        with self._tree.lock:
            self._tree.sessions.append(self)

    def get(self, key: str) -> Versioned | None:
        """Return the newest value of `key`."""
        self._require_reachable()
        with self._tree.lock:
            entry = self._tree.entries.get(key)
        return None if entry is None else Versioned(entry.data, entry.version)

    def children(self, key: str) -> tuple[str, ...]:
        """Return the names below `key`, sorted."""
        self._require_reachable()
        prefix = f"{key}/"
        with self._tree.lock:
            keys = tuple(self._tree.entries)
        below = (known.removeprefix(prefix) for known in keys if known.startswith(prefix))
        return tuple(sorted(name for name in below if "/" not in name))

    def together(self) -> AbstractContextManager[None]:
        """Do nothing: each read is the newest."""
        return nullcontext()

    def transact(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or none."""
        self._require_reachable()
        with self._tree.lock:
            is_lost, is_applied = bool(self._lost_answers), True
            if is_lost:
                is_applied = self._lost_answers.pop(0)
            if is_applied:
                try:
                    self._tree.apply(operations, self)
                except ConflictError:
                    if not is_lost:
                        raise
        if is_lost:
            raise CoordinationError("the answer was lost (failpoint)")
        self._tree.notify()

    def close(self) -> None:
        """End the session."""
        with self._tree.lock:
            if self not in self._tree.sessions:
                return
            self._tree.sessions.remove(self)
        self._tree.drop_session(self)

    def expire(self) -> None:
        """Failpoint: lose the session as if the store had ended it; later calls belong to a new one."""
        self._tree.drop_session(self)

    def lose_answer(self, *, is_applied: bool) -> None:
        """Failpoint: the next transaction's answer is lost, after or before it was applied; calls queue up."""
        self._lost_answers.append(is_applied)

    def set_reachable(self, is_reachable: bool) -> None:
        """Failpoint: while not reachable, every call raises `CoordinationError` and nothing is applied."""
        self._is_reachable = is_reachable
        self.wake()

    def wake(self) -> None:
        """Call the owner of this session."""
        if self._on_change is not None:
            self._on_change()

    def _require_reachable(self) -> None:
        if not self._is_reachable:
            raise CoordinationError("the store does not answer (failpoint)")
