"""What a standby does with a checkpoint, in a process of its own: it takes blobs, as the replica's API does."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from starlette.applications import Starlette

from bench.listening import announce
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.settings import Endpoint, TlsSettings
from flwr_ha.storage.blobs import BlobStore


def main() -> None:
    """Serve a store until killed."""
    port_file, root, secret = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    routes, upgrades = blob_api(BlobStore(root), secret=secret, max_bytes=1 << 40)
    with ApiServer(Endpoint("127.0.0.1", 0), tls=TlsSettings()) as server:
        server.start(Starlette(routes=routes), upgrades=upgrades)
        announce(server.port, port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()
