"""The seam to what keeps the cluster's small, linearizable facts.

A `Store` is a tree of versioned values with transactions and ephemeral entries: the part of
ZooKeeper that is needed, no more. `flwr_ha.coordination.coordinator` builds terms, leases and
commits on it once, so that every store gives the same guarantees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from flwr_ha.errors import HaError


class ConflictError(HaError):
    """The store refused a transaction as a whole: a check failed and nothing was applied.

    Read again, then decide.
    """


@dataclass(frozen=True, slots=True)
class Versioned:
    """Hold a value as it was read.

    Attributes
    ----------
    data : bytes
        The value.
    version : int
        Counts the changes of this entry from 0; starts again when it is deleted and created.
    """

    data: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Check:
    """Refuse the transaction unless `key` exists with this version."""

    key: str
    version: int


@dataclass(frozen=True, slots=True)
class Create:
    """Create `key`; refuse the transaction if it exists. Missing parents are made before it.

    An ephemeral entry goes when the session of its creator ends.
    """

    key: str
    data: bytes
    is_ephemeral: bool = False


@dataclass(frozen=True, slots=True)
class Set:
    """Change `key`; refuse the transaction if it is missing, or not of `version` where one is given."""

    key: str
    data: bytes
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete `key`; refuse the transaction if it is missing, or not of `version` where one is given."""

    key: str
    version: int | None = None


Operation = Check | Create | Set | Delete


class Store(Protocol):
    """Keep a tree of small values that all replicas see in the same order.

    Keys are relative, parts joined by ``/`` (``runs/17/rounds/0000000003``). All calls are safe
    from any thread, and bounded in time: they raise `CoordinationError` when the store does not
    answer; for `transact` the outcome is then unknown.
    """

    @property
    def session_timeout_s(self) -> float:
        """Seconds of silence after which the store ends this session (as negotiated)."""
        ...

    @property
    def lease_s(self) -> float:
        """Seconds for which a transaction proves the session alive at most, counted from before its start.

        It is shorter than `session_timeout_s` by a margin that covers what the store's own clock
        and hops may add; the implementation states the argument.
        """
        ...

    def proven_until(self, started_s: float) -> float:
        """Return until when a successful transaction proves the session alive.

        Parameters
        ----------
        started_s : float
            ``time.monotonic()`` from before the transaction; ask only after its success.

        Returns
        -------
        float
            A time of ``time.monotonic()``, at most ``started_s + lease_s``; it may lie in the past,
            when a store cannot tell from this one transaction that its session is safe.
        """
        ...

    def start(self, on_change: Callable[[], None], *, timeout_s: float) -> None:
        """Connect.

        Parameters
        ----------
        on_change : callable
            Called from any thread, often and also without need, when something that was read may
            have changed or the session was lost. It must only wake somebody.
        timeout_s : float
            How long to try, in seconds.

        Raises
        ------
        CoordinationError
            The store did not answer in time. The message names its address.
        """
        ...

    def get(self, key: str) -> Versioned | None:
        """Return the newest value of `key`, or None where it does not exist."""
        ...

    def children(self, key: str) -> tuple[str, ...]:
        """Return the names (not the paths) below `key`, sorted; empty where it does not exist."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Let this thread's reads within be as new as the first of them, in their order, which costs less.

        What is read later is never older than what was read before.
        """
        ...

    def transact(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or none.

        Raises
        ------
        ConflictError
            A check failed: nothing was applied.
        CoordinationError
            No answer: applied or not, read again and decide.
        """
        ...

    def close(self) -> None:
        """End the session: ephemeral entries go at once. May be called twice."""
        ...
