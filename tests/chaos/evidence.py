"""What is left after faults: event logs, commit logs, records of training; read, not judged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from flwr_ha.coordination.reader import ClusterReader
from flwr_ha.model import Head, LeadershipChange
from flwr_ha.replica.main import make_store
from flwr_ha.settings import Settings

Event = Mapping[str, Any]
READ_TIMEOUT_S = 30.0


class Cluster(Protocol):
    """Have replicas with disks, and a coordinator; on one host or on several."""

    @property
    def settings(self) -> Settings:
        """As an operator has them."""
        ...

    @property
    def replicas(self) -> Mapping[int, object]:
        """Whatever runs, by replica id."""
        ...


Training = tuple[str, str, int]
"""Run, partition and round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Tell of one beginning of a training.

    Attributes
    ----------
    node : str
        Flower's id of the node; another one for each start of a SuperNode.
    began_s, ended_s : float
        Of this machine's ``time.monotonic()``; infinite where it did not end.
    """

    node: str
    began_s: float
    ended_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKill:
    """Tell that the SuperNode of a partition was killed, and when; by ``time.monotonic()``."""

    partition: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Hold what is known of a cluster at the end.

    Attributes
    ----------
    events : tuple of Event
        Of all replicas and all of their lives; in order for each replica.
    history : tuple of LeadershipChange
        As the coordinator has it, newest last.
    commits : mapping of str to tuple of Head
        Commit log of each run.
    rounds : mapping of str to int
        Rounds that each run was to have by the end.
    unreadable : mapping of str to str
        Digests of committed checkpoints that nobody could read, and why.
    trainings : mapping of Training to tuple of Attempt
        When the client of a run and partition began to train a round, oldest first.
    kills : tuple of NodeKill
        SuperNodes that were killed, with what they had done.
    min_nodes : mapping of str to int
        Threshold of each run that has one.
    final_models : mapping of str to str
        Digest of the last model of each run.
    expected_models : mapping of str to str
        The digest that it should have, where that is known.
    """

    events: tuple[Event, ...] = ()
    history: tuple[LeadershipChange, ...] = ()
    commits: Mapping[str, tuple[Head, ...]] = field(default_factory=dict)
    rounds: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    trainings: Mapping[Training, tuple[Attempt, ...]] = field(default_factory=dict)
    kills: tuple[NodeKill, ...] = ()
    min_nodes: Mapping[str, int] = field(default_factory=dict)
    final_models: Mapping[str, str] = field(default_factory=dict)
    expected_models: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def reader(cluster: Cluster) -> Iterator[ClusterReader]:
    """Read the facts of the cluster over a connection of our own."""
    store = make_store(cluster.settings)
    store.start(lambda: None, timeout_s=READ_TIMEOUT_S)
    try:
        yield ClusterReader(store)
    finally:
        store.close()


def events_of(cluster: Cluster, replica_id: int | None = None) -> tuple[Event, ...]:
    """Return what the replicas, or one of them, wrote into their event logs in all of their lives."""
    wanted = cluster.replicas if replica_id is None else (replica_id,)
    folders = [cluster.settings.replica_dir(each) for each in wanted]
    return tuple(event for folder in folders for event in _events_in(folder))


def _events_in(folder: Path) -> Iterator[Event]:
    for name in ("events.jsonl.1", "events.jsonl"):
        file = folder / name
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # cut short by a kill


def trainings_in(folder: Path) -> dict[Training, tuple[Attempt, ...]]:
    """Return what the clients of `tests/apps/numpy_app` noted of their trainings."""
    found: dict[Training, tuple[Attempt, ...]] = {}
    for file in sorted(folder.glob("run-*/partition-*")):
        for line in file.read_text(encoding="utf-8").splitlines():
            kind, server_round, node, at_s = line.split()
            key = (file.parent.name.removeprefix("run-"), file.name, int(server_round))
            attempts = found.get(key, ())
            if kind == "begin":
                found[key] = (*attempts, Attempt(node=node, began_s=float(at_s)))
            elif kind == "train":
                last = max(index for index, attempt in enumerate(attempts) if attempt.node == node)
                ended = replace(attempts[last], ended_s=float(at_s))
                found[key] = (*attempts[:last], ended, *attempts[last + 1 :])
    return found
