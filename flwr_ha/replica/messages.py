"""What can happen to a replica (events), and what its agent is told to do about it (actions)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class SuperLinkReady:
    """The SuperLink answers on its private port."""


@dataclass(frozen=True, slots=True)
class SuperLinkGone:
    """The SuperLink ended, froze, or closed its public socket by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class FitnessChanged:
    """The disk of this replica has become unfit for a leader, and why; or, with an empty reason, fit again."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The coordinator was read: who leads, the newest term, and what operators asked for.

    `candidate` is the replica that a switchover names and that is ready to lead, else None.
    """

    leader: int | None
    term: int
    is_paused: bool = False
    candidate: int | None = None


@dataclass(frozen=True, slots=True)
class Elected:
    """The coordinator made this replica the leader."""

    term: int
    lease_until_s: float


@dataclass(frozen=True, slots=True)
class NotElected:
    """Somebody else leads, or the coordinator did not answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class TookOver:
    """The public socket is open, the control plane is in place."""

    term: int


@dataclass(frozen=True, slots=True)
class TakeoverFailed:
    """The replica cannot serve: it lacks bytes, or its public port is taken."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """The coordinator confirmed the leadership."""

    term: int
    lease_until_s: float


@dataclass(frozen=True, slots=True)
class Fenced:
    """The coordinator refused an act of this term."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class SwitchoverAsked:
    """An operator wants another leader, after the rounds that are running."""

    runs: frozenset[str]
    candidate: int | None = None


@dataclass(frozen=True, slots=True)
class RunSettled:
    """A run committed a round, or ended."""

    run_id: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The process is to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Crashed:
    """A part of the agent failed in a way that was not foreseen."""

    reason: str


Event = (
    Tick
    | SuperLinkReady
    | SuperLinkGone
    | FitnessChanged
    | Seen
    | Elected
    | NotElected
    | TookOver
    | TakeoverFailed
    | Renewed
    | Fenced
    | SwitchoverAsked
    | RunSettled
    | StopAsked
    | Crashed
)


@dataclass(frozen=True, slots=True)
class Campaign:
    """Try to become the leader; answer with `Elected` or `NotElected`."""

    reason: str


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Get the bytes, carry the control plane over, open the socket; answer with `TookOver` or `TakeoverFailed`."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class ExtendLease:
    """Let the SuperLink serve until then."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class StandDown:
    """Close the public socket, end the SuperLink and its ServerApps, resign."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resign:
    """Withdraw a leadership that the coordinator still lists, though it was given up or never heard of."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class StartSuperLink:
    """Start a SuperLink as a warm standby; answer with `SuperLinkReady` or `SuperLinkGone`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """End the SuperLink and the process."""

    reason: str


Action = Campaign | TakeOver | ExtendLease | StandDown | Resign | StartSuperLink | Exit
