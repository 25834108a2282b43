"""Hostile bytes towards what reads them: the checkpoint reader and the blob protocol."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from flwr_ha.errors import CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.blobserver import blob_routes
from flwr_ha.storage.checkpoint import Checkpoint, load, references, save
from flwr_ha.storage.frames import Head, Kind, question
from flwr_ha.storage.intake import Intake

MAX_BYTES = 4096
MEMORY_BYTES = 32 * 1024**2
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BlobStore:
    """Return a store."""
    return BlobStore(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def main_blob(store: BlobStore) -> bytes:
    """Return the main blob of a checkpoint with small and large arrays."""
    checkpoint = Checkpoint(
        run_id="17",
        server_round=3,
        num_rounds=8,
        arrays={"small": np.arange(10, dtype=np.float32), "large": np.zeros(100_000, np.float64)},
        strategy_arrays={"momentum": np.ones(5)},
        state={"lr": 0.1, "names": ["a", "b"]},
        history={"loss": {"1": 0.5}},
    )
    return store.read(save(checkpoint, store).digest)


def read(store: BlobStore, blob: bytes) -> None:
    """Read a blob as a checkpoint: it is one, or it is refused, and little memory is taken."""
    digest = store.put(blob)
    tracemalloc.start()
    try:
        for act in (load, references):
            with contextlib.suppress(CheckpointError):
                act(digest, store)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


@FUZZ
@given(data=st.data())
def test_damaged_checkpoint_is_read_or_refused(store: BlobStore, main_blob: bytes, data: st.DataObject) -> None:
    """Bytes changed, left out or added anywhere, under a digest that fits."""
    blob = bytearray(main_blob)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(blob) - 1))
        blob[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        blob = blob or bytearray(b"x")
    read(store, bytes(blob))


@FUZZ
@given(data=st.data())
def test_hostile_header_is_read_or_refused(store: BlobStore, main_blob: bytes, data: st.DataObject) -> None:
    """Any JSON in place of any value of the header, with the length put right: lengths and shapes that lie, too."""
    size = int.from_bytes(main_blob[:8], "little")
    header = json.loads(main_blob[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        table = header
        while True:
            key = data.draw(st.sampled_from(sorted(table)))
            if isinstance(table[key], dict) and table[key] and data.draw(st.booleans()):
                table = table[key]
                continue
            break
        huge = st.sampled_from([[0, 2**62], [2**40], 2**63, -1, [0, -5], "sha256:../../etc/passwd"])
        table[key] = data.draw(values | huge)
    text = json.dumps(header).encode()
    read(store, len(text).to_bytes(8, "little") + text + main_blob[8 + size :])


@FUZZ
@given(blob=st.binary(max_size=300))
def test_any_bytes_are_no_checkpoint(store: BlobStore, blob: bytes) -> None:
    """Nothing short of a checkpoint is one."""
    with pytest.raises(CheckpointError):
        load(store.put(blob), store)


@FUZZ
@given(
    method=st.sampled_from(["HEAD", "GET"]),
    span=st.sampled_from(["", "bytes=0-", "bytes=5-", "bytes=-5", "bytes=1-0", "bytes=99999999999999999999-", "x"]),
    content=st.none() | st.binary(max_size=100),
)
def test_any_blob_request_has_an_answer(
    tmp_path_factory: pytest.TempPathFactory, method: str, span: str, content: bytes | None
) -> None:
    """Ranges that lie: refused in words."""
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    digest = "sha256:" + "0" * 64 if content is None else store.put(content)
    answer = asyncio.run(_ask(store, method, digest, {"Range": span.encode()} if span else {}))
    assert answer.status_code in (200, 206, 404, 416)
    assert "Traceback" not in answer.text


BLOBS = [b"", b"one", b"another blob", bytes(MAX_BYTES + 1)]
DIGESTS = ["sha256:" + hashlib.sha256(blob).hexdigest() for blob in BLOBS]
whole = st.integers(0, 20) | st.just(MAX_BYTES + 1) | st.just(2**64 - 1)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Draw a piece or a question: most fit a blob, others lie about sizes and offsets, or are no frame at all."""
    number = draw(st.integers(0, len(BLOBS) - 1))
    match draw(st.sampled_from(["whole", "piece", "question", "noise"])):
        case "whole":
            blob = BLOBS[number]
            return Head(Kind.PIECE, DIGESTS[number], 0, len(blob), len(blob)).to_bytes() + blob
        case "piece":
            data = draw(st.binary(max_size=30))
            return Head(Kind.PIECE, DIGESTS[number], draw(whole), draw(whole), len(data)).to_bytes() + data
        case "question":
            sizes = draw(st.dictionaries(st.sampled_from(DIGESTS), whole))
            return question(sizes)
        case _:
            return draw(st.binary(max_size=100))


@FUZZ
@given(stream=st.lists(frames(), max_size=12))
def test_whatever_is_pushed_only_blobs_are_stored(
    tmp_path_factory: pytest.TempPathFactory, stream: list[bytes]
) -> None:
    """Offsets, sizes and frames that lie end the connection or are dropped; what is stored is what its digest says."""
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as pool:
        far.settimeout(10.0)
        served = pool.submit(_serve_and_hang_up, Intake(store, max_bytes=MAX_BYTES), near)
        with suppress(BrokenPipeError, ConnectionResetError):
            far.sendall(b"".join(stream))
            far.shutdown(socket.SHUT_WR)
        while far.recv(1 << 16):
            pass
        served.result(10.0)
    assert set(store.digests()) <= set(DIGESTS[:3])
    for digest in store.digests():
        assert store.read(digest) == BLOBS[DIGESTS.index(digest)]


def _serve_and_hang_up(intake: Intake, connection: socket.socket) -> None:
    intake.serve(connection)
    connection.shutdown(socket.SHUT_RDWR)


async def _ask(store: BlobStore, method: str, digest: str, headers: dict[str, bytes]) -> httpx.Response:
    app = Starlette(routes=blob_routes(store, authorize=lambda _: True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
        return await client.request(method, f"/blobs/{digest}", headers=headers)
