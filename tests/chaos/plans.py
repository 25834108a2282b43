"""Fault plans as data: what breaks, when, and for how long; drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """Name what can be killed or frozen."""

    TREE = "the whole replica"
    AGENT = "the agent"
    SUPERLINK = "the SuperLink"
    SERVERAPP = "the ServerApp"
    SUPERNODE = "a SuperNode"
    ZOOKEEPER = "a ZooKeeper node"


class Path(StrEnum):
    """Name what can be cut."""

    TO_ZOOKEEPER = "the replica from ZooKeeper"
    TO_REPLICAS = "the replica from the other replicas"
    TO_ALL = "the replica from ZooKeeper and the other replicas"
    OF_CLIENTS = "the clients from the leader"


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL; it is started again afterwards."""

    part: Part


@dataclass(frozen=True, slots=True)
class Freeze:
    """SIGSTOP, and SIGCONT after so many session timeouts."""

    part: Part
    sessions: float


@dataclass(frozen=True, slots=True)
class Cut:
    """Silent loss of all that is sent, for so many session timeouts."""

    path: Path
    sessions: float


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Change a bit of the newest checkpoint on a disk, or cut the file short."""

    is_truncated: bool


@dataclass(frozen=True, slots=True)
class FillDisk:
    """Leave no free space on a disk, for so many session timeouts."""

    sessions: float


@dataclass(frozen=True, slots=True)
class SlowDisk:
    """Let every write to a disk wait for up to `stall_s` seconds, for so many session timeouts."""

    sessions: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class LoseReply:
    """ZooKeeper applies the replica's next transaction, but the answer is lost."""


@dataclass(frozen=True, slots=True)
class FlipInTransfer:
    """Change a bit in each of the next blobs that the leader sends to the replica, or, as the leader, to both."""

    blobs: int


@dataclass(frozen=True, slots=True)
class LoseMajority:
    """All but one ZooKeeper node are killed, or frozen, for so many seconds."""

    seconds: float
    is_killed: bool


Fault = Kill | Freeze | Cut | Corrupt | FillDisk | SlowDisk | LoseReply | FlipInTransfer | LoseMajority


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Say when a fault comes, and whom it hits.

    Attributes
    ----------
    fault : Fault
        What happens.
    is_leader_hit : bool
        Whether it hits the leader, else a standby; of no meaning for what belongs to no replica.
    after_commits : int
        Commits to wait for before it comes.
    delay_s : float
        Seconds to wait then, so that it comes in the middle of something.
    """

    fault: Fault
    is_leader_hit: bool
    after_commits: int
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Hold a sequence of faults; the cluster heals between two of them.

    Attributes
    ----------
    seed : int
        From which it was drawn.
    steps : tuple of Step
        In order.
    """

    seed: int
    steps: tuple[Step, ...]


WITHOUT_SUPERNODES: tuple[Fault, ...] = (
    Kill(Part.TREE),
    Kill(Part.AGENT),
    Kill(Part.SUPERLINK),
    Kill(Part.ZOOKEEPER),
    Freeze(Part.TREE, 2.5),
    Freeze(Part.AGENT, 2.5),
    Freeze(Part.AGENT, 0.5),
    Freeze(Part.SUPERLINK, 2.0),
    Freeze(Part.ZOOKEEPER, 2.0),
    Cut(Path.TO_ZOOKEEPER, 2.0),
    Cut(Path.TO_ZOOKEEPER, 0.4),
    Cut(Path.TO_REPLICAS, 2.0),
    Cut(Path.TO_ALL, 2.0),
    Corrupt(False),
    Corrupt(True),
    FillDisk(2.0),
    SlowDisk(2.0, 0.2),
    SlowDisk(2.0, 1.5),
    LoseReply(),
    FlipInTransfer(1),
    FlipInTransfer(4),  # more than one push tries
    LoseMajority(20.0, True),
    LoseMajority(20.0, False),
)
WITH_SUPERNODES: tuple[Fault, ...] = (
    *WITHOUT_SUPERNODES,
    Kill(Part.SERVERAPP),
    Freeze(Part.SERVERAPP, 1.0),
    Freeze(Part.SUPERNODE, 2.0),
    Cut(Path.OF_CLIENTS, 1.0),
)


CUTS: tuple[Cut, ...] = tuple(Cut(path, sessions) for path in Path for sessions in (0.5, 2.0))


def draw_cuts(seed: int, *, steps: int) -> FaultPlan:
    """Return a plan of cuts alone, as `draw` does."""
    rng = random.Random(f"{seed}/{steps}/cuts")
    return FaultPlan(seed=seed, steps=tuple(_draw_step(rng, rng.choice(CUTS)) for _ in range(steps)))


def draw(seed: int, *, steps: int, has_supernodes: bool) -> FaultPlan:
    """Return the plan of a seed; the same for the same arguments.

    Only every fifth kills SuperNodes: Flower takes a minute to notice, and what one had done may be repeated then,
    so that the other plans say more about the servers.
    """
    rng = random.Random(f"{seed}/{steps}/{has_supernodes}")
    faults = WITH_SUPERNODES if has_supernodes else WITHOUT_SUPERNODES
    if has_supernodes and seed % 5 == 0:
        faults = (*faults, Kill(Part.SUPERNODE))
    return FaultPlan(seed=seed, steps=tuple(_draw_step(rng, rng.choice(faults)) for _ in range(steps)))


def _draw_step(rng: random.Random, fault: Fault) -> Step:
    return Step(
        fault=fault,
        is_leader_hit=rng.random() < 0.7,
        after_commits=rng.randrange(1, 5),
        delay_s=rng.random() * 0.5,
    )
