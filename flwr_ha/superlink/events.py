"""What a SuperLink child tells its agent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildReady:
    """The SuperLink serves its private port.

    Attributes
    ----------
    private_port : int
        Port on 127.0.0.1.
    """

    private_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildExited:
    """The child and all that it started are gone; the last event of a child.

    Attributes
    ----------
    returncode : int
        Exit status; negative: the signal that ended it.
    is_wanted : bool
        Whether `SuperLinkProcess.kill` ended it.
    """

    returncode: int
    is_wanted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildFrozen:
    """The child lives but does not answer; said once per silence.

    Attributes
    ----------
    silent_s : float
        Seconds since it was last heard of.
    """

    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicClosed:
    """The child closed its public socket without being asked to.

    Attributes
    ----------
    why : str
        A sentence for people.
    """

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicateRequested:
    """Answers wait until the control plane, as the database has it from now on, is safe elsewhere.

    Answer with `SuperLinkProcess.answer`, and take the picture after this event: not an older one.

    Attributes
    ----------
    serial : int
        Number of the request, counts from 1.
    """

    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAppDied:
    """A ServerApp ended without having reported a result.

    Attributes
    ----------
    task_id, run_id : str
        Flower's ids, unsigned decimal; `flwr_ha.superlink.linkstate.requeue_task` starts it again.
    status : int
        Exit status; negative: the signal that ended it.
    """

    task_id: str
    run_id: str
    status: int


Event = ChildReady | ChildExited | ChildFrozen | PublicClosed | ReplicateRequested | ServerAppDied
