"""The answering side of the blob protocol, as routes of a replica's REST interface.

======================  ====================================================================
``HEAD /blobs/DIGEST``  200 and Content-Length: a verified copy is here, and is not collected soon
``GET /blobs/DIGEST``   the bytes, or what ``Range: bytes=N-`` asks for
``GET /blobs``          426: with ``Upgrade: flwr-ha-blobs`` the connection is taken over before
                        (`flwr_ha.storage.frames`), unless the secret is wrong
======================  ====================================================================

401 answers a wrong secret, 400 what is not a digest. Memory is bounded by a few MiB for each
request; disk and hash work is done in threads.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BufferedReader
from os import fstat

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import is_digest
from flwr_ha.storage.files import CHUNK_BYTES
from flwr_ha.storage.frames import PATH, PROTOCOL

_ANY_DIGEST = "sha256:" + "0" * 64
_Endpoint = Callable[[Request], Awaitable[Response]]


def blob_routes(store: BlobStore, *, authorize: Callable[[Request], bool]) -> list[Route]:
    """Return the routes that serve a store.

    Parameters
    ----------
    store : BlobStore
        What is served.
    authorize : callable
        Whether a request carries the secret; must not block.
    """

    def guarded(endpoint: _Endpoint) -> _Endpoint:
        async def guard(request: Request) -> Response:
            if not authorize(request):
                return _refusal(401, "the secret is wrong", {"WWW-Authenticate": "Bearer"})
            if not is_digest(request.path_params.get("digest", _ANY_DIGEST)):
                return _refusal(400, "this is not a digest")
            try:
                return await endpoint(request)
            except CheckpointError as error:
                return _refusal(500, str(error))

        return guard

    server = _BlobServer(store)
    path = f"{PATH}/{{digest}}"
    return [
        Route(path, guarded(server.head), methods=["HEAD"]),
        Route(path, guarded(server.get), methods=["GET"]),
        Route(PATH, guarded(_only_upgraded), methods=["GET"]),
    ]


async def _only_upgraded(_: Request) -> Response:
    return _refusal(426, f"blobs are pushed in the protocol {PROTOCOL}", {"Connection": "Upgrade", "Upgrade": PROTOCOL})


class _BlobServer:
    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def head(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        if await run_in_threadpool(self._store.is_kept, digest):
            return Response(headers={"Content-Length": str(self._store.size(digest))})
        return Response(status_code=404)

    async def get(self, request: Request) -> Response:
        try:
            file = await run_in_threadpool(self._store.open, request.path_params["digest"])
        except CheckpointCorruptError as error:
            return _refusal(404, str(error))
        size = fstat(file.fileno()).st_size
        asked = re.fullmatch(r"bytes=(\d{1,18})-", request.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked and start >= size:
            file.close()
            return _refusal(416, "there is nothing behind that byte", {"Content-Range": f"bytes */{size}"})
        headers = {"Content-Length": str(size - start), "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        return StreamingResponse(
            _chunks(file, start), 206 if asked else 200, headers, media_type="application/octet-stream"
        )


async def _chunks(file: BufferedReader, start: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(start)
        while chunk := await run_in_threadpool(file.read, CHUNK_BYTES):
            yield chunk


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
