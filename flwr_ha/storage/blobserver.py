"""The answering side of the blob protocol, as routes of a replica's REST interface.

========================  ====================================================================
``HEAD /blobs/DIGEST``    200 and Content-Length: a verified copy is here; 404 and Upload-Offset:
                          so many bytes have arrived
``PATCH /blobs/DIGEST``   with Upload-Offset and Upload-Length: bytes from there on. 200 complete
                          and verified, 202 and Upload-Offset: more, please; 409 and Upload-Offset:
                          go on there; 413 too big; 422 the whole is not DIGEST, start again;
                          507 disk full
``GET /blobs/DIGEST``     the bytes, or what ``Range: bytes=N-`` asks for
========================  ====================================================================

401 answers a wrong secret, 400 what cannot be understood. Memory is bounded by a few MiB for each
request; disk and hash work is done in threads.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from io import BufferedReader
from os import fstat

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import is_digest
from flwr_ha.storage.files import CHUNK_BYTES, is_disk_full
from flwr_ha.storage.uploads import LengthError, OffsetError, Upload

_STALL_S = 60.0  # a sender that is silent for so long has to start a new request
_Endpoint = Callable[[Request], Awaitable[Response]]


def blob_routes(store: BlobStore, *, authorize: Callable[[Request], bool], max_bytes: int) -> list[Route]:
    """Return the routes that serve a store.

    Parameters
    ----------
    store : BlobStore
        What is served.
    authorize : callable
        Whether a request carries the secret; must not block.
    max_bytes : int
        Largest blob that is taken.
    """

    def guarded(endpoint: _Endpoint) -> _Endpoint:
        async def guard(request: Request) -> Response:
            if not authorize(request):
                return _refusal(401, "the secret is wrong", {"WWW-Authenticate": "Bearer"})
            if not is_digest(request.path_params["digest"]):
                return _refusal(400, "this is not a digest")
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except TimeoutError:
                return _refusal(408, f"nothing came for {_STALL_S:g} s")
            except CheckpointError as error:
                return _refusal(507 if is_disk_full(error) else 500, str(error))

        return guard

    server = _BlobServer(store, max_bytes)
    path = "/blobs/{digest}"
    return [
        Route(path, guarded(server.head), methods=["HEAD"]),
        Route(path, guarded(server.get), methods=["GET"]),
        Route(path, guarded(server.patch), methods=["PATCH"]),
    ]


class _ExcessError(CheckpointError):
    """The sender says one length and sends more."""


class _BlobServer:
    def __init__(self, store: BlobStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def head(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        if await run_in_threadpool(self._store.is_kept, digest):
            return Response(headers={"Content-Length": str(self._store.size(digest))})
        return Response(status_code=404, headers={"Upload-Offset": str(self._store.partial_bytes(digest))})

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

    async def patch(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        try:
            offset, total = (int(request.headers[name]) for name in ("Upload-Offset", "Upload-Length"))
        except (KeyError, ValueError):
            return _refusal(400, "Upload-Offset and Upload-Length must be numbers")
        if not 0 <= offset <= total:
            return _refusal(400, "Upload-Offset is not within Upload-Length")
        body = _Body(request)
        try:
            if total > self._max_bytes:
                return _refusal(413, f"blobs have {self._max_bytes} bytes at most here")
            if await run_in_threadpool(self._store.refresh, digest):
                return Response(status_code=200)
            return await self._receive(body, self._store.receive(digest, total), offset)
        finally:
            await body.drain()

    async def _receive(self, body: _Body, upload: Upload, offset: int) -> Response:
        try:
            offset = await _append_body(body, upload, offset)
            if offset < upload.total_bytes:
                return Response(status_code=202, headers={"Upload-Offset": str(offset)})
            await run_in_threadpool(self._store.finish, [upload])
        except _ExcessError as error:
            return _refusal(400, str(error))
        except OffsetError as error:
            if await run_in_threadpool(self._store.is_good, upload.digest):  # somebody else has completed it
                return Response(status_code=200)
            return _refusal(409, str(error), {"Upload-Offset": str(error.offset)})
        except LengthError as error:
            return _refusal(400, str(error))
        except CheckpointCorruptError as error:
            return _refusal(422, str(error))
        return Response(status_code=200)


async def _append_body(body: _Body, upload: Upload, offset: int) -> int:
    """Write the body, one batch in a thread while the next one comes in; return the new offset."""
    writing: asyncio.Future[None] | None = None
    try:
        while batch := await body.read_batch():
            if offset + len(batch) > upload.total_bytes:
                raise _ExcessError(f"more than the announced {upload.total_bytes} bytes arrive")
            if writing is not None:
                await writing
            writing = asyncio.ensure_future(run_in_threadpool(upload.append, offset, batch))
            offset += len(batch)
    finally:
        if writing is not None:
            await writing
    return offset


class _Body:
    """Read the body of a request in batches."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._is_ended = False

    async def read_batch(self) -> bytearray:
        """Return about 1 MiB, less at the end, nothing after it; raise `ClientDisconnect` when cut off.

        What had come before the cut is returned first: the sender need not send it again.
        """
        batch = bytearray()
        while not self._is_ended and len(batch) < CHUNK_BYTES:
            async with asyncio.timeout(_STALL_S):
                message = await self._receive()
            if message["type"] == "http.disconnect":
                if batch:
                    break
                self._is_ended = True
                raise ClientDisconnect
            batch += message.get("body", b"")
            self._is_ended = not message.get("more_body", False)
        return batch

    async def drain(self) -> None:
        """Read what is left and drop it: an answer before the end of the request may get lost."""
        with suppress(ClientDisconnect, TimeoutError):
            while await self.read_batch():
                pass


async def _chunks(file: BufferedReader, start: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(start)
        while chunk := await run_in_threadpool(file.read, CHUNK_BYTES):
            yield chunk


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
