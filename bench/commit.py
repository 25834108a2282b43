"""Commit of a model to three replicas on one machine, and what is sent of a model that has hardly changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench import bare
from bench.listening import listening
from bench.result import Figure, Scale, interleaved, median_ratio
from flwr_ha.local.processes import Program
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save
from flwr_ha.storage.peer import Peer
from flwr_ha.storage.replication import Replicator

SECRET = "bench"  # of three processes that live for a minute on loopback
LAYERS = 8
MANY_LAYERS = 200  # as models for pictures and language have


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Commit models of 100 MB and of 1 GB turn about with plain copies."""
    small, large = scale.pick(20, 100), scale.pick(100, 1000)
    return [
        *_commit(folder / "small", small, times=scale.pick(2, 5)),
        *_commit(folder / "large", large, times=scale.pick(1, 3)),
        *_many_arrays(folder / "many", small, times=scale.pick(2, 5)),
    ]


def _commit(folder: Path, megabytes: int, *, times: int) -> list[Figure]:
    with _replicas(folder) as (store, replicator, servers), bare.receivers(folder, len(servers)) as sockets:
        model = _model(megabytes, LAYERS)
        counting: list[float] = []

        def commit() -> float:
            seconds, counts_s = _protected(model, store, replicator)
            counting.append(counts_s)
            _empty(folder)
            return seconds

        ours, plain, least = interleaved(
            times, commit, lambda: _copies(folder / "plain", model), lambda: bare.commit(folder, model, sockets)
        )
        _protected(model, store, replicator)
        before = _stored_bytes(folder)
        model["layer0"] += 1.0
        _protected(model, store, replicator, is_changed=False)
        share = (_stored_bytes(folder) - before) / before
        agent_bytes = max(_peak_bytes(program) for program in servers)
    name = f"commit of {megabytes} MB to three replicas"
    against = statistics.median(plain)
    return [
        Figure(
            name=name, value=statistics.median(ours), unit="s", against=against,
            ratio=median_ratio(ours, plain), goal=1.0,
        ),
        Figure(
            name=f"{name}: until a majority has it and it counts", value=statistics.median(counting), unit="s",
            against=against, ratio=median_ratio(counting, plain), goal=1.0,
        ),
        Figure(
            name=f"{name}: the same with bare sockets", value=statistics.median(least), unit="s",
            against=against, ratio=median_ratio(least, plain),
        ),
        Figure(name=f"{name}: memory of the replica that takes it", value=agent_bytes / 1e6, unit="MB", goal=64 + 32),
        Figure(name=f"{name}: stored when 1 of 8 arrays has changed", value=share, unit="models", goal=0.126),
    ]  # fmt: skip


def _many_arrays(folder: Path, megabytes: int, *, times: int) -> list[Figure]:
    """Commit a model of many arrays, each a file; none is deleted, as ext4 makes new ones slowly just after that."""
    with _replicas(folder) as (store, replicator, _):
        model = _model(megabytes, MANY_LAYERS)
        ours, plain = interleaved(
            times, lambda: _protected(model, store, replicator)[0], lambda: _copies(folder / "plain", model)
        )
    return [
        Figure(
            name=f"commit of {megabytes} MB in {MANY_LAYERS} arrays", value=statistics.median(ours), unit="s",
            against=statistics.median(plain), ratio=median_ratio(ours, plain),
        )
    ]  # fmt: skip


def _model(megabytes: int, layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size = megabytes * 1_000_000 // (4 * layers)
    return {f"layer{k}": rng.standard_normal(size, dtype=np.float32) for k in range(layers)}


@contextmanager
def _replicas(folder: Path) -> Iterator[tuple[BlobStore, Replicator, list[Program]]]:
    """Be the leader of two standbys."""
    with ExitStack() as stack:
        store = BlobStore(folder / "own")
        servers = [stack.enter_context(_server(folder, number)) for number in (1, 2)]
        replicator = stack.enter_context(Replicator(store, [peer for peer, _ in servers], secret=SECRET))
        yield store, replicator, [program for _, program in servers]


def _protected(
    model: dict[str, np.ndarray], store: BlobStore, replicator: Replicator, *, is_changed: bool = True
) -> tuple[float, float]:
    """Bring a checkpoint to all three replicas, as the leader does.

    Returns
    -------
    tuple of (float, float)
        Seconds until all have it, and until a majority has it.
    """
    for array in model.values() if is_changed else ():
        np.add(array, 1.0, out=array)
    start_s = time.perf_counter()
    checkpoint = Checkpoint(run_id="1", server_round=1, num_rounds=1, arrays=model)
    saved = save(checkpoint, store, on_part=lambda digest: replicator.offer([digest]))
    digests = [*saved.parts, saved.digest]
    replicator.protect(digests, needed=1, timeout_s=600.0)
    counts_s = time.perf_counter() - start_s
    replicator.protect(digests, needed=2, timeout_s=600.0)
    return time.perf_counter() - start_s, counts_s


@contextmanager
def _server(folder: Path, number: int) -> Iterator[tuple[Peer, Program]]:
    with listening("bench.blobprocess", folder, number, str(folder / f"peer-{number}"), SECRET) as (port, program):
        yield Peer(number, f"127.0.0.1:{port}"), program


def _copies(folder: Path, model: dict[str, np.ndarray]) -> float:
    """Hash the bytes once, and write three copies, each to the disk before the next."""
    start_s = time.perf_counter()
    sha = hashlib.sha256()
    for array in model.values():
        sha.update(array.data)
    for copy in range(3):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{sha.hexdigest()}-{copy}").open("wb", buffering=0) as file:
            for array in model.values():
                rest = memoryview(array).cast("B")
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start_s
    shutil.rmtree(folder)
    return seconds


def _empty(folder: Path) -> None:
    for blobs in folder.glob("*/blobs"):
        for file in blobs.iterdir():
            file.unlink()


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/blobs/*"))


def _peak_bytes(program: Program) -> int:
    for line in Path(f"/proc/{program.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell the memory of a process")
