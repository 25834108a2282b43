"""What a replica's REST interface has for the other replicas: blobs to be asked for, fetched and pushed."""

from __future__ import annotations

import socket

from starlette.routing import Route

from flwr_ha.replica.api import is_authorized, is_secret
from flwr_ha.replica.upgrades import Upgrades
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.blobserver import blob_routes
from flwr_ha.storage.frames import PATH, PROTOCOL
from flwr_ha.storage.intake import Intake


def blob_api(store: BlobStore, *, secret: str, max_bytes: int) -> tuple[list[Route], Upgrades]:
    """Return the routes of a store, and what takes pushes to it out of the web server.

    Parameters
    ----------
    store : BlobStore
        What is served.
    secret : str
        Shared secret of the replicas, which all requests must carry.
    max_bytes : int
        Largest blob that is taken.
    """

    def take(connection: socket.socket) -> None:
        Intake(store, max_bytes=max_bytes).serve(connection)

    upgrades = Upgrades(take, path=PATH, protocol=PROTOCOL, authorize=lambda given: is_secret(given, secret))
    return blob_routes(store, authorize=lambda request: is_authorized(request, secret)), upgrades
