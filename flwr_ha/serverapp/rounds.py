"""Decide when one phase of a round has enough replies: pure, time is an argument.

The invariant: `Done` is never decided with fewer valid replies than ``min_nodes``. It is checked
in one place, `_decide`, and every path that returns `Done` passes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from flwr_ha.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Say how many replies a round needs and how long it waits for them.

    Attributes
    ----------
    min_nodes : int
        No round counts with fewer valid replies; from 1.
    round_timeout_s : float
        Seconds one attempt of a phase waits for replies.
    min_replies : int or None
        Replies after which stragglers are given up; None: all nodes that were asked.
    grace_s : float
        Seconds that stragglers have once ``min_replies`` are there.
    wait_timeout_s : float or None
        Seconds to wait for enough nodes to be online; None: for ever.
    same_arrays : bool
        Whether a reply to training must hold the arrays that were sent, by name and shape.
    """

    min_nodes: int
    round_timeout_s: float = 3600.0
    min_replies: int | None = None
    grace_s: float = 0.0
    wait_timeout_s: float | None = None
    same_arrays: bool = True

    def __post_init__(self) -> None:
        if self.min_nodes < 1:
            raise ConfigError(f"min_nodes = {self.min_nodes}: at least 1 is needed")
        if not self.round_timeout_s > 0:
            raise ConfigError(f"round_timeout_s = {self.round_timeout_s}: more than 0 seconds are needed")
        if self.min_replies is not None and self.min_replies < self.min_nodes:
            raise ConfigError(f"min_replies = {self.min_replies} is less than min_nodes = {self.min_nodes}")
        if not self.grace_s >= 0:
            raise ConfigError(f"grace_s = {self.grace_s}: 0 or more seconds are possible")
        if self.wait_timeout_s is not None and not self.wait_timeout_s >= 0:
            raise ConfigError(f"wait_timeout_s = {self.wait_timeout_s}: 0 or more seconds, or None for ever")


@dataclass(frozen=True, slots=True)
class Valid:
    """A reply of this node came in and is good."""

    node: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reply of this node came in and cannot be used."""

    node: int
    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The node is not online any more and has not answered."""

    node: int


@dataclass(frozen=True, slots=True)
class Back:
    """The node is online again, and asked."""

    node: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Valid | Rejected | Gone | Back | Tick


@dataclass(frozen=True, slots=True)
class Continue:
    """Wait for more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Aggregate what is there: the promise is kept."""

    reason: str


@dataclass(frozen=True, slots=True)
class Short:
    """End the attempt: too few valid replies can come, or the deadline has passed.

    Attributes
    ----------
    reason : str
        A sentence for people.
    is_failure : bool
        Somebody answered wrongly or too late; False: nodes went, and the wait for them is no failure.
    """

    reason: str
    is_failure: bool


Decision = Continue | Done | Short


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Hold what is known of one attempt of one phase.

    Attributes
    ----------
    rules : Rules
        Threshold and waiting.
    asked : frozenset of int
        Nodes that got a message.
    valid : frozenset of int
        Nodes with a good reply.
    rejected : mapping of int to str
        Nodes whose reply cannot be used, and why.
    gone : frozenset of int
        Nodes that went before they answered.
    deadline_s : float
        Monotonic seconds at which the attempt ends.
    enough_s : float or None
        Monotonic seconds at which ``min_replies`` were first there.
    """

    rules: Rules
    asked: frozenset[int]
    deadline_s: float
    valid: frozenset[int] = frozenset()
    rejected: Mapping[int, str] = field(default_factory=dict)
    gone: frozenset[int] = frozenset()
    enough_s: float | None = None

    @property
    def pending(self) -> frozenset[int]:
        """Nodes whose reply may still come."""
        return self.asked - self.valid - self.rejected.keys() - self.gone

    @property
    def target(self) -> int:
        """Valid replies that end the wait."""
        wanted = len(self.asked) if self.rules.min_replies is None else self.rules.min_replies
        return max(self.rules.min_nodes, min(wanted, len(self.asked)))

    @property
    def progress(self) -> str:
        """The state for people, as ``3 of 5 replies``."""
        return f"{len(self.valid)} of {len(self.asked)} replies"


def begin(rules: Rules, asked: Collection[int], *, now_s: float) -> Phase:
    """Return the phase in which these nodes are asked now.

    Raises
    ------
    ConfigError
        The strategy asks fewer nodes than ``min_nodes``: it could never succeed.
    """
    nodes = frozenset(asked)
    if len(nodes) < rules.min_nodes:
        raise ConfigError(
            f"the strategy asks {len(nodes)} nodes, fewer than min_nodes = {rules.min_nodes}: lower min_nodes, "
            "or let the strategy sample more nodes"
        )
    return Phase(rules=rules, asked=nodes, deadline_s=now_s + rules.round_timeout_s)


def step(phase: Phase, event: Event, *, now_s: float) -> tuple[Phase, Decision]:
    """Return the next phase and what to do; late, duplicate and foreign events change nothing."""
    after = _applied(phase, event)
    if after.enough_s is None and len(after.valid) >= after.target:
        after = replace(after, enough_s=now_s)
    return after, _decide(after, now_s)


def _applied(phase: Phase, event: Event) -> Phase:
    if isinstance(event, Tick) or event.node not in phase.asked or event.node in phase.valid:
        return phase
    match event:
        case Valid(node) if node not in phase.rejected:
            return replace(phase, valid=phase.valid | {node}, gone=phase.gone - {node})
        case Rejected(node, reason) if node not in phase.rejected:
            return replace(phase, rejected={**phase.rejected, node: reason}, gone=phase.gone - {node})
        case Gone(node) if node not in phase.rejected:
            return replace(phase, gone=phase.gone | {node})
        case Back(node):
            return replace(phase, gone=phase.gone - {node})
        case _:
            return phase


def _decide(phase: Phase, now_s: float) -> Decision:
    is_late = now_s >= phase.deadline_s
    if len(phase.valid) < phase.rules.min_nodes:
        if is_late:
            return Short(f"{phase.progress} within {phase.rules.round_timeout_s:g} s{_missing(phase)}", True)
        if len(phase.valid) + len(phase.pending) < phase.rules.min_nodes:
            reason = f"{phase.progress}, {phase.rules.min_nodes} are needed{_missing(phase)}"
            return Short(reason, bool(phase.rejected))
        return Continue(phase.progress)
    if not phase.pending:
        return Done(f"{phase.progress}{_missing(phase)}")
    if is_late:
        return Done(f"{phase.progress} at the deadline{_missing(phase)}")
    if phase.enough_s is not None and now_s >= phase.enough_s + phase.rules.grace_s:
        return Done(f"{phase.progress} are enough")
    return Continue(phase.progress)


def _missing(phase: Phase) -> str:
    """Return why replies are missing, as the end of a sentence; at most a few nodes are named."""
    reasons = [f"node {node} is gone" for node in sorted(phase.gone)]
    reasons += [phase.rejected[node] for node in sorted(phase.rejected)]
    reasons += [f"node {node} has not answered" for node in sorted(phase.pending)]
    if not reasons:
        return ""
    rest = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f" ({'; '.join(reasons[:5])}{rest})"
