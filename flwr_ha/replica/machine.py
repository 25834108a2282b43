"""Decide what a replica does: a pure state machine without clocks, threads or I/O.

`step` gets the state, one event and the monotonic time, and returns the next state and what the
agent must do. The safety argument of the leadership stands here, and only here:

* A replica serves only between `Elected` and the end of its lease. The lease runs from *before*
  the transaction that proved it, and is shorter than the session (see `Store.proven_until`), so it has
  ended before the coordinator lets anyone else be elected.
* Whatever a replica that is wrong about its lease still does, it cannot commit: every commit
  checks the term in the same transaction (see `flwr_ha.coordination.coordinator`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from flwr_ha.errors import HaError
from flwr_ha.replica.messages import (
    Action,
    Campaign,
    Crashed,
    Elected,
    Event,
    Exit,
    ExtendLease,
    Fenced,
    FitnessChanged,
    NotElected,
    Renewed,
    Resign,
    RunSettled,
    Seen,
    StandDown,
    StartSuperLink,
    StopAsked,
    SuperLinkGone,
    SuperLinkReady,
    SwitchoverAsked,
    TakeOver,
    TakeoverFailed,
    Tick,
    TookOver,
)

_MOST_FAILURES = 16  # counted: the state space stays finite


class ImpossibleEventError(HaError):
    """An event that cannot happen in this state: a bug of ours, report it with the message."""


class Phase(Enum):
    """Say where a replica is between standby and leader."""

    STANDBY = "standby"
    CAMPAIGNING = "campaigning"
    TAKING_OVER = "taking over"
    LEADING = "leading"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Hold the waits of the machine, in seconds.

    Attributes
    ----------
    rest_s : float
        How long a replica that could not take over lets the others try; twice as long each further time.
    longest_rest_s : float
        The most of that.
    defer_s : float
        How long the others wait for the candidate of a switchover.
    drain_s : float
        How long a planned switchover waits for the running round.
    """

    rest_s: float = 3.0
    longest_rest_s: float = 30.0
    defer_s: float = 3.0
    drain_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Drain:
    """Hold a planned switchover that waits for running rounds.

    Attributes
    ----------
    reason : str
        What to say when the leadership is given up.
    runs : frozenset of str
        Runs whose next commit is awaited.
    until_s : float
        Monotonic time at which it is handed over all the same.
    """

    reason: str
    runs: frozenset[str]
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """Hold all that decides what a replica does next.

    Attributes
    ----------
    replica_id : int
        Own id.
    phase : Phase
        Where it is.
    term : int
        Newest leadership number that it knows of; its own while it is taking over or leading.
    lease_until_s : float
        Monotonic time at which the leadership ends unless it is renewed.
    is_warm : bool
        Whether its SuperLink is ready to serve.
    is_stopping : bool
        Whether the process is to end.
    unfit : str
        Why it must not lead, such as a full disk; empty where it may.
    rest_until_s : float
        Monotonic time before which it does not campaign.
    failed_takeovers : int
        In a row.
    leaderless_since_s : float or None
        Monotonic time at which it first saw that nobody leads.
    drain : Drain or None
        A planned switchover in progress.
    """

    replica_id: int
    phase: Phase = Phase.STANDBY
    term: int = 0
    lease_until_s: float = 0.0
    is_warm: bool = False
    is_stopping: bool = False
    unfit: str = ""
    rest_until_s: float = 0.0
    failed_takeovers: int = 0
    leaderless_since_s: float | None = None
    drain: Drain | None = None

    @property
    def is_elected(self) -> bool:
        """Whether it holds a term, serving or about to serve."""
        return self.phase in (Phase.TAKING_OVER, Phase.LEADING)


Step = tuple[MachineState, Sequence[Action]]


def step(state: MachineState, event: Event, *, now_s: float, timing: Timing = Timing()) -> Step:
    """Return the next state and what the agent must do about it."""
    if state.phase is Phase.STOPPED:
        return state, ()
    match event:
        case Tick():
            return _tick(state, now_s)
        case SuperLinkReady() | SuperLinkGone() | FitnessChanged():
            return _own_parts(state, event)
        case Seen():
            return _seen(state, event, now_s, timing)
        case Elected() | NotElected():
            return _ballot(state, event, now_s)
        case TookOver() | TakeoverFailed() | Renewed() | Fenced():
            return _in_office(state, event, now_s, timing)
        case SwitchoverAsked() | RunSettled():
            return _drain(state, event, now_s, timing)
        case StopAsked(reason=reason):
            return _stop(state, reason)
        case Crashed(reason=reason):
            return _stand_down(state, reason) if state.is_elected else (state, ())


def _tick(state: MachineState, now_s: float) -> Step:
    if state.is_elected and now_s >= state.lease_until_s:
        return _stand_down(state, "the lease ran out before it was renewed")
    if state.drain is not None and now_s >= state.drain.until_s:
        return _stand_down(state, f"{state.drain.reason}; the running round took too long to wait for it")
    return state, ()


def _own_parts(state: MachineState, event: SuperLinkReady | SuperLinkGone | FitnessChanged) -> Step:
    match event:
        case SuperLinkReady():
            return replace(state, is_warm=True), ()
        case FitnessChanged(reason=reason):
            changed = replace(state, unfit=reason)
            return _stand_down(changed, reason) if reason and state.is_elected else (changed, ())
        case SuperLinkGone(reason=reason):
            cold = replace(state, is_warm=False)
            if state.is_elected:
                return _stand_down(cold, reason)
            again = StartSuperLink(f"{reason}: start it again as a standby")
            return cold, () if state.is_stopping else (again,)


def _seen(state: MachineState, seen: Seen, now_s: float, timing: Timing) -> Step:
    if state.is_elected:
        # Who leads is not read here: the answer may be older than the election. The term never goes back.
        if seen.term > state.term:
            return _stand_down(state, f"term {seen.term} has begun, this replica's was {state.term}")
        return state, ()
    since = None if seen.leader is not None else state.leaderless_since_s
    if seen.leader is None and since is None:
        since = now_s
    state = replace(state, term=max(state.term, seen.term), leaderless_since_s=since)
    if seen.leader == state.replica_id and state.phase is Phase.STANDBY:
        # The session outlived the lease, or the answer to the campaign or to the resignation was lost.
        return state, (Resign(seen.term, "the coordinator still lists a leadership that this replica does not have"),)
    if since is None or not _may_campaign(state, seen, now_s, since + timing.defer_s):
        return state, ()
    return replace(state, phase=Phase.CAMPAIGNING), (Campaign(_why_campaign(state, seen)),)


def _may_campaign(state: MachineState, seen: Seen, now_s: float, deferred_until_s: float) -> bool:
    if state.phase is not Phase.STANDBY or state.is_stopping or state.unfit:
        return False
    if not state.is_warm or now_s < state.rest_until_s:
        return False
    if seen.candidate is not None:  # an operator's switchover counts in a paused cluster too
        return seen.candidate == state.replica_id or (now_s >= deferred_until_s and not seen.is_paused)
    return not seen.is_paused or seen.term == 0  # a pause forbids failover, not the first election


def _why_campaign(state: MachineState, seen: Seen) -> str:
    if seen.candidate == state.replica_id:
        return "switchover to this replica"
    return f"the leader of term {seen.term} is gone" if seen.term else "first election of this cluster"


def _ballot(state: MachineState, event: Elected | NotElected, now_s: float) -> Step:
    if state.phase is not Phase.CAMPAIGNING:
        raise ImpossibleEventError(f"{event} in phase {state.phase.value}: {state}")
    match event:
        case NotElected():
            standby = replace(state, phase=Phase.STANDBY)
            return _stop(standby, "the process is to end") if state.is_stopping else (standby, ())
        case Elected(term=term, lease_until_s=until_s):
            if term <= 0:
                raise ImpossibleEventError(f"{event} is no term: {state}")
            if term < state.term:  # its answer took so long that others have led since
                down, actions = _stand_down(state, f"term {state.term} began before term {term} was heard of")
                if not state.is_stopping:
                    return down, actions
                stopped, exits = _stop(down, "the process is to end")
                return stopped, (*actions, *exits)
            elected = replace(state, phase=Phase.TAKING_OVER, term=term, lease_until_s=until_s, leaderless_since_s=None)
            if state.is_stopping:
                return _stop(elected, "the process is to end")
            if state.unfit or not state.is_warm:
                return _stand_down(elected, state.unfit or "the SuperLink is not ready")
            if now_s >= until_s:
                return _stand_down(elected, "the lease ran out during the election")
            return elected, (
                ExtendLease(until_s, f"elected for term {term}"),
                TakeOver(term, f"elected for term {term}"),
            )


def _in_office(
    state: MachineState, event: TookOver | TakeoverFailed | Renewed | Fenced, now_s: float, timing: Timing
) -> Step:
    if not state.is_elected or event.term != state.term:
        return state, ()  # about a leadership that is over
    match event:
        case TookOver():
            return replace(state, phase=Phase.LEADING, failed_takeovers=0), ()
        case TakeoverFailed(reason=reason):
            down, actions = _stand_down(state, reason)
            failures = min(state.failed_takeovers + 1, _MOST_FAILURES)
            rest_s = min(timing.rest_s * 2 ** (failures - 1), timing.longest_rest_s)
            return replace(down, rest_until_s=now_s + rest_s, failed_takeovers=failures), actions
        case Fenced(reason=reason):
            return _stand_down(state, reason)
        case Renewed(lease_until_s=until_s):
            if now_s >= state.lease_until_s:
                return _stand_down(state, "the lease ran out before it was renewed")
            until_s = max(until_s, state.lease_until_s)
            return replace(state, lease_until_s=until_s), (ExtendLease(until_s, "the leadership is confirmed"),)


def _drain(state: MachineState, event: SwitchoverAsked | RunSettled, now_s: float, timing: Timing) -> Step:
    if state.phase is not Phase.LEADING:
        return state, ()
    match event:
        case SwitchoverAsked(runs=runs, candidate=candidate):
            if state.drain is not None:
                return state, ()
            reason = "planned switchover" + ("" if candidate is None else f" to replica {candidate}")
            state = replace(state, drain=Drain(reason, runs, now_s + timing.drain_s))
        case RunSettled(run_id=run_id):
            if state.drain is None:
                return state, ()
            state = replace(state, drain=replace(state.drain, runs=state.drain.runs - {run_id}))
    drain = state.drain
    if drain is not None and not drain.runs:
        return _stand_down(state, drain.reason)
    return state, ()


def _stop(state: MachineState, reason: str) -> Step:
    if state.phase is Phase.CAMPAIGNING:  # the answer is on its way; it is resigned when it comes
        return replace(state, is_stopping=True), ()
    actions: list[Action] = [StandDown(state.term, reason)] if state.is_elected else []
    return replace(state, phase=Phase.STOPPED, is_stopping=True, is_warm=False), (*actions, Exit(reason))


def _stand_down(state: MachineState, reason: str) -> Step:
    down = replace(state, phase=Phase.STANDBY, lease_until_s=0.0, is_warm=False, drain=None)
    actions: list[Action] = [StandDown(state.term, reason)]
    if not state.is_stopping:
        actions.append(StartSuperLink("start again as a standby"))
    return down, tuple(actions)
