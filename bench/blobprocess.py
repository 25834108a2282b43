"""What a standby does with a checkpoint, in a process of its own: it takes blobs, as the replica's API does."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from bench.listening import announce
from flwr_ha.replica.apiserver import bind
from flwr_ha.settings import Endpoint
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.blobserver import blob_routes


def main() -> None:
    """Serve a store until killed."""
    port_file, root, secret = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    routes = blob_routes(
        BlobStore(root),
        authorize=lambda request: request.headers.get("authorization") == f"Bearer {secret}",
        max_bytes=1 << 40,
    )
    listener = bind(Endpoint("127.0.0.1", 0), setting="bench")
    announce(listener, port_file)
    config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off", ws="none")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
