"""Frozen values that the layers exchange; all of them turn into JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

REPLAYED = "flwr-ha.replayed"
"""Name of the record that marks a reply which a client took from its cache."""

Metrics = Mapping[str, float | int | Sequence[float] | Sequence[int]]


def utc_now() -> str:
    """Return the wall-clock time as shown to people: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Role(StrEnum):
    """Say what a replica is for its cluster."""

    LEADER = "leader"
    STANDBY = "standby"


class ReplicaState(StrEnum):
    """Say how a replica fares."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"
    UNREACHABLE = "unreachable"


class RunState(StrEnum):
    """Say what a run does at the moment."""

    WAITING = "waiting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_final(self) -> bool:
        """Whether nothing may wake the run any more."""
        return self in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Name one checkpoint in the order of commits.

    Attributes
    ----------
    term : int
        Leadership number under which it was committed, counts from 1.
    server_round : int
        Round that it ends, counts from 1; 0 is the initial model.
    digest : str
        ``sha256:`` and 64 hexadecimal digits of the checkpoint's main blob.
    """

    term: int
    server_round: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Describe the newest commit of a run, or one entry of its commit log.

    Attributes
    ----------
    run_id : str
        Flower's run id, unsigned decimal.
    app : str
        ``publisher/name`` of the app.
    num_rounds : int
        Rounds that the run is to have.
    position : Position
        What is committed.
    model_digest : str
        ``sha256:…`` over names, dtypes, shapes and bytes of the arrays alone.
    size_bytes : int
        Size of the checkpoint, main blob and parts.
    copies : tuple of int
        Ids of the replicas known to hold it when it was committed.
    committed_at : str
        UTC time.
    metrics : Metrics
        Metrics of that round, for people.
    """

    run_id: str
    app: str
    num_rounds: int
    position: Position
    model_digest: str
    size_bytes: int
    copies: tuple[int, ...] = ()
    committed_at: str = ""
    metrics: Metrics = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored and shown."""
        return {
            "run_id": self.run_id,
            "app": self.app,
            "num_rounds": self.num_rounds,
            "server_round": self.position.server_round,
            "term": self.position.term,
            "digest": self.position.digest,
            "model_digest": self.model_digest,
            "bytes": self.size_bytes,
            "copies": list(self.copies),
            "committed_at": self.committed_at,
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Head:
        """Return the head that ``to_json`` described."""
        return cls(
            run_id=value["run_id"],
            app=value["app"],
            num_rounds=value["num_rounds"],
            position=Position(value["term"], value["server_round"], value["digest"]),
            model_digest=value["model_digest"],
            size_bytes=value["bytes"],
            copies=tuple(value["copies"]),
            committed_at=value["committed_at"],
            metrics=value["metrics"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlHead:
    """Name the committed snapshot of Flower's control plane (nodes, runs, apps).

    Attributes
    ----------
    term : int
        Leadership number under which it was committed.
    serial : int
        Counts the snapshots of the cluster from 1.
    digest : str
        The snapshot's blob.
    copies : tuple of int
        Ids of the replicas that hold it.
    """

    term: int
    serial: int
    digest: str
    copies: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored."""
        return {"term": self.term, "serial": self.serial, "digest": self.digest, "copies": list(self.copies)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ControlHead:
        """Return the head that ``to_json`` described."""
        return cls(term=value["term"], serial=value["serial"], digest=value["digest"], copies=tuple(value["copies"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Say what a run does right now; it is lost with its leader, unlike the head.

    Attributes
    ----------
    run_id : str
        Flower's run id, unsigned decimal.
    app : str
        ``publisher/name`` of the app.
    state : RunState
        What it does.
    reason : str
        Why, in a sentence for people; may be empty.
    num_rounds : int
        Rounds that the run is to have; 0 when it does not say.
    nodes_online : int
        SuperNodes that are online.
    min_nodes : int
        Threshold; 0 when it has none.
    """

    run_id: str
    app: str
    state: RunState
    reason: str = ""
    num_rounds: int = 0
    nodes_online: int = 0
    min_nodes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is published."""
        return {
            "run_id": self.run_id,
            "app": self.app,
            "state": self.state.value,
            "reason": self.reason,
            "num_rounds": self.num_rounds,
            "nodes_online": self.nodes_online,
            "min_nodes": self.min_nodes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunStatus:
        """Return the status that ``to_json`` described."""
        return cls(**{**value, "state": RunState(value["state"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadershipChange:
    """Record who led from when, and why the leadership changed.

    Attributes
    ----------
    term : int
        Leadership number, counts from 1.
    leader : int
        Id of the replica that took it.
    at : str
        UTC time.
    reason : str
        A sentence for people.
    """

    term: int
    leader: int
    at: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored and shown."""
        return {"term": self.term, "leader": self.leader, "at": self.at, "reason": self.reason}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LeadershipChange:
        """Return the change that ``to_json`` described."""
        return cls(**value)
