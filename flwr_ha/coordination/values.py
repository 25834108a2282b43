"""What the coordinator keeps: its values, and the keys under which they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr_ha.model import ControlHead, Head

Record = Mapping[str, Any]
"""What a replica publishes about itself: a JSON object."""

IDENTITY = "identity"
TERM = "term"
LEADER = "leader"
REPLICAS = "replicas"
RUNS = "runs"
ROUNDS = "rounds"
CONTROL = "control"
PAUSED = "paused"
SWITCHOVER = "switchover"
HISTORY = "history"


def replica_key(replica_id: int) -> str:
    """Return where the replica publishes its record."""
    return f"{REPLICAS}/{replica_id}"


def head_key(run_id: str) -> str:
    """Return where the head of the run is."""
    return f"{RUNS}/{run_id}"


def rounds_key(run_id: str) -> str:
    """Return what the commit log of the run is below; not below the head, which a first commit creates."""
    return f"{ROUNDS}/{run_id}"


def round_key(run_id: str, server_round: int) -> str:
    """Return where the commit of one round is kept for good."""
    return f"{ROUNDS}/{run_id}/{server_round:010}"


def history_key(term: int) -> str:
    """Return where it is kept who took the term."""
    return f"{HISTORY}/{term:010}"


def dump(value: Mapping[str, Any]) -> bytes:
    """Return the value as compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def load(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `dump` wrote."""
    value: dict[str, Any] = json.loads(data)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Leadership:
    """Prove which term was won; every write of a leader is checked against it.

    Attributes
    ----------
    term : int
        Leadership number, counts from 1.
    term_version : int
        Version of the entry ``term`` since then.
    instance : str
        Which start of the replica won it.
    """

    term: int
    term_version: int
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    """Say who holds the leader entry.

    Attributes
    ----------
    replica_id : int
        Id of the replica.
    instance : str
        Which start of it.
    term : int
        Leadership number, counts from 1.
    attempt : str
        Random text that tells one campaign from another, for the case that its answer is lost.
    """

    replica_id: int
    instance: str
    term: int
    attempt: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored."""
        return {"replica": self.replica_id, "instance": self.instance, "term": self.term, "attempt": self.attempt}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LeaderRecord:
        """Return the record that `to_json` described."""
        return cls(
            replica_id=value["replica"], instance=value["instance"], term=value["term"], attempt=value["attempt"]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Switchover:
    """Ask the leader to hand over.

    Attributes
    ----------
    candidate : int or None
        Id of the replica that shall lead; None for any healthy standby.
    requested_at : str
        UTC time.
    """

    candidate: int | None
    requested_at: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored."""
        return {"candidate": self.candidate, "requested_at": self.requested_at}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Switchover:
        """Return the request that `to_json` described."""
        return cls(candidate=value["candidate"], requested_at=value["requested_at"])


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Show the cluster as it was read; the parts are read one after the other.

    Attributes
    ----------
    term : int
        Newest leadership number, 0 before the first; never older than the leader's.
    leader : LeaderRecord or None
        Who leads.
    replicas : Mapping of int to Record
        What each running replica published, by id.
    heads : Mapping of str to Head
        Newest commit of each run, by run id.
    control : ControlHead or None
        Committed snapshot of the control plane.
    is_paused : bool
        Whether there is no automatic failover.
    switchover : Switchover or None
        Request to hand over that is not done yet.
    """

    term: int = 0
    leader: LeaderRecord | None = None
    replicas: Mapping[int, Record] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    control: ControlHead | None = None
    is_paused: bool = False
    switchover: Switchover | None = None
