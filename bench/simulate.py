"""A plan on paper with numbers: what breaks first with up to 100,000 nodes and models of 10 GB.

Run as ``python -m bench.simulate``. One round is simulated: all nodes are told at once, come in the order in which
they are ready, and wait in the queues of what they share: the request threads and the network of their SuperLink,
then the disks and networks of the replicas that take the checkpoint, then the ServerApp that adds the replies up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

CHUNK_BYTES = 5 * 1024**2  # Flower's ArrayChunk
HEARTBEAT_S, POLL_S = 30.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Hold what one machine can do, and how many there are.

    Attributes
    ----------
    requests_per_s : float
        Small requests of one SuperLink, a Python process on SQLite; an assumption.
    network_bytes_per_s : float
        Of one SuperLink's machine, each way.
    disk_bytes_per_s : float
        Written and fsynced by one replica; an assumption.
    average_bytes_per_s : float
        Replies added up by one ServerApp (measured: `bench.aggregation`).
    shards : int
        SuperLinks, each with its share of the nodes.
    has_parking : bool
        Whether idle SuperNodes wait at the SuperLink instead of asking every 3 s.
    is_hierarchical : bool
        Whether each shard adds its replies up itself, so that one model for each shard goes on.
    has_object_store : bool
        Whether models go to and from an object store instead of through the SuperLink and the replicas.
    """

    requests_per_s: float = 400.0
    network_bytes_per_s: float = 1.25e9
    disk_bytes_per_s: float = 1e9
    average_bytes_per_s: float = 8e9
    shards: int = 1
    has_parking: bool = True
    is_hierarchical: bool = False
    has_object_store: bool = False


def simulate(site: Site, nodes: int, model_bytes: float, *, train_s: float = 60.0) -> dict[str, float]:
    """Return the seconds of one round's parts, and the load of a SuperLink between rounds.

    Parameters
    ----------
    site : Site
        The machines.
    nodes : int
        SuperNodes, all of which train.
    model_bytes : float
        Size of the model and of each reply.
    train_s : float
        Median of the time that a client trains; log-normal, a third of it spread.
    """
    rng = np.random.default_rng(0)
    mine = math.ceil(nodes / site.shards)
    chunks = max(1, math.ceil(model_bytes / CHUNK_BYTES))
    idle_load = mine * (1 / HEARTBEAT_S + (0.06 if site.has_parking else 1 / POLL_S)) / site.requests_per_s
    free = max(1.0 - mine / HEARTBEAT_S / site.requests_per_s, 0.0)
    if free == 0.0:
        return {"idle load": idle_load, "round": math.inf}
    come = np.zeros(mine) if site.has_parking else rng.uniform(0.0, POLL_S, mine)
    through_link = 0.0 if site.has_object_store else model_bytes
    service_s = (3 if site.has_object_store else 3 + chunks) / (site.requests_per_s * free)
    told = _queue(np.sort(come), max(service_s, through_link / site.network_bytes_per_s))
    ready = np.sort(told + train_s * rng.lognormal(0.0, 0.3, mine))
    replied = _queue(ready, max(service_s, through_link / site.network_bytes_per_s))
    summands = mine if site.is_hierarchical else nodes
    average_s = (summands + (site.shards if site.is_hierarchical else 0)) * model_bytes / site.average_bytes_per_s
    commit_s = model_bytes / min(site.disk_bytes_per_s, site.network_bytes_per_s)
    parts = {
        "idle load": idle_load,
        "told": float(told[-1]),
        "replied": float(replied[-1] - told[-1]),
        "average": average_s,
        "commit": commit_s,
    }
    return {**parts, "round": float(replied[-1]) + average_s + commit_s}


def _queue(arrivals: np.ndarray, service_s: float) -> np.ndarray:
    """Return when each of sorted arrivals has been served by one server, first come first served."""
    index = np.arange(len(arrivals))
    begun = np.maximum.accumulate(arrivals - index * service_s) + index * service_s
    return begun + service_s


def main() -> None:
    """Print rounds of ever larger sites, and of the changes that would be made."""
    base = Site()
    sharded = replace(base, shards=50, is_hierarchical=True)
    rows = [
        ("as it is", base, 100, 5e6),
        ("as it is", base, 1_000, 5e6),
        ("Flower's polling", replace(base, has_parking=False), 10_000, 5e6),
        ("as it is", base, 10_000, 5e6),
        ("as it is", base, 100_000, 5e6),
        ("as it is", base, 100, 10e9),
        ("50 SuperLinks", replace(base, shards=50), 100_000, 5e6),
        ("50 SuperLinks that add up themselves", sharded, 100_000, 5e6),
        ("… with an object store", replace(sharded, has_object_store=True), 100_000, 5e6),
        ("… with an object store", replace(sharded, has_object_store=True), 100_000, 10e9),
    ]
    columns = ("idle load", "told", "replied", "average", "commit", "round")
    table = Table("what", "nodes", "model", *columns, title="one round: seconds, load as a share of a SuperLink")
    for name, site, nodes, model_bytes in rows:
        parts = simulate(site, nodes, model_bytes)
        cells = [f"{parts[column]:,.3g}" if column in parts else "–" for column in columns]
        table.add_row(name, f"{nodes:,}", f"{model_bytes / 1e6:,.0f} MB", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
