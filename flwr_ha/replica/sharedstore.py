"""Keep the store that all replicas share free of what nobody needs: the leader's task, and nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr_ha.errors import FencedError, HaError
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import Holdings
from flwr_ha.replica.periodic import Periodic
from flwr_ha.storage.objectstore import ObjectStorage

log = logging.getLogger(__name__)
COLLECT_EVERY_S = 600.0
STORE_TIMEOUT_S = 600.0


class SharedStoreCollector(Periodic):
    """Collect every ten minutes as long as this replica leads.

    Parameters
    ----------
    storage : ObjectStorage
        The shared store, below a prefix that no other cluster uses.
    holdings : Holdings
        Knows what is needed.
    identity : str
        Of the cluster to which the prefix belongs.
    read_identity : callable
        Returns that of the cluster which the coordinator knows now.
    is_leader : callable
        Whether this replica leads and its lease has not run out.
    events : EventLog
        Where a collection is told.
    """

    def __init__(
        self,
        storage: ObjectStorage,
        holdings: Holdings,
        *,
        identity: str,
        read_identity: Callable[[], str],
        is_leader: Callable[[], bool],
        events: EventLog,
    ) -> None:
        super().__init__("shared-store-collector", first_s=COLLECT_EVERY_S, every_s=COLLECT_EVERY_S)
        self._storage = storage
        self._holdings = holdings
        self._identity = identity
        self._read_identity = read_identity
        self._is_leader = is_leader
        self._events = events

    def act(self) -> None:
        """Collect once."""
        self.collect()

    def collect(self) -> tuple[str, ...]:
        """Remove what is old and not needed, if this replica leads; return the digests of what was removed."""
        if not self._is_leader():
            return ()
        try:
            gone = self._storage.collect(self._needed, may_remove=self._may_remove, timeout_s=STORE_TIMEOUT_S)
        except HaError as error:
            log.warning("the shared store is not collected this time: %s", error)
            return ()
        if gone:
            self._events.add("collected", f"{len(gone)} blobs that nobody needs were removed from the shared store")
        return gone

    def _needed(self) -> frozenset[str]:
        """Return what this cluster needs; FencedError where the coordinator has forgotten it, with all its runs."""
        needed = self._holdings.needed()
        if self._read_identity() != self._identity:
            raise FencedError("the coordinator's data is not that of the cluster to which the stored blobs belong")
        return needed

    def _may_remove(self) -> bool:
        return self._is_leader() and not self._stop.is_set()
