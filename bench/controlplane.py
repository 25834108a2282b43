"""The control plane with many nodes: what a takeover carries over, and what one registration waits for."""

from __future__ import annotations

import sqlite3
import statistics
import time
from contextlib import closing
from pathlib import Path

from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

from bench.result import Figure, Scale
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.superlink import linkstate

SIZES = (100, 1_000, 10_000)


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Measure all sizes, the smallest first."""
    carried: dict[int, float] = {}
    acknowledged: dict[int, float] = {}
    for nodes in SIZES:
        carried[nodes], acknowledged[nodes] = _measure(folder / str(nodes), nodes, scale.pick(2, 5))
    figures = [Figure(name="10,000 nodes carried over", value=carried[SIZES[-1]], unit="s", goal=2.0)]
    for nodes in SIZES[1:]:
        growth = nodes / SIZES[0]
        for what, seconds in (("carried over", carried), ("a registration made safe", acknowledged)):
            figures.append(
                Figure(
                    name=f"{nodes:,} nodes: {what}", value=seconds[nodes], unit="s", against=seconds[SIZES[0]],
                    ratio=seconds[nodes] / seconds[SIZES[0]] / growth, goal=1.0,
                )
            )  # fmt: skip
    return figures


def _measure(folder: Path, nodes: int, times: int) -> tuple[float, float]:
    folder.mkdir()
    store = BlobStore(folder / "store")
    old = folder / "old.db"
    _make_database(old, nodes)
    carried, acknowledged = [], []
    for number in range(times):
        _touch(old, number)
        start_s = time.perf_counter()
        plane = linkstate.export(old, store.put)
        store.put(plane.snapshot)
        acknowledged.append(time.perf_counter() - start_s)
        new = folder / f"new-{number}.db"
        _make_database(new, 0)
        start_s = time.perf_counter()
        linkstate.restore(new, plane.snapshot, store.read, now_s=time.time())
        carried.append(time.perf_counter() - start_s)
    return statistics.median(carried), statistics.median(acknowledged)


def _make_database(file: Path, nodes: int) -> None:
    """Make a database as Flower does, with one node of Flower's, and copies of its row."""
    manager = get_federation_manager(is_simulation=False)
    state = get_objectstore_linkstate_factories(str(file), manager)[1].state()
    if nodes:
        node_id = state.create_node("bench", "name", b"key", 30.0)
        state.activate_node(node_id, 30.0)
    state._engine.dispose()
    if not nodes:
        return
    with closing(sqlite3.connect(file)) as connection, connection:
        cursor = connection.execute("SELECT * FROM node")
        names = [column[0] for column in cursor.description]
        row = dict(zip(names, cursor.fetchone(), strict=True))
        rows = [
            tuple({**row, "node_id": 10**12 + index, "public_key": f"key {index}".encode()}[name] for name in names)
            for index in range(nodes - 1)
        ]
        marks = ", ".join("?" * len(names))
        connection.executemany(f"INSERT INTO node ({', '.join(names)}) VALUES ({marks})", rows)


def _touch(file: Path, number: int) -> None:
    """Change something, so that the snapshot is another one."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE node SET owner_name = ? WHERE node_id = 1000000000001", (f"owner {number}",))
