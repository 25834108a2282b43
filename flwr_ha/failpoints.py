"""Places at which a process can be made to die or to freeze, to prove that nothing is lost there.

They do nothing unless the environment names one, as ``FLWR_HA_FAILPOINT=commit.after-protect:kill:2``:
the second time that the process comes to that place it ends with SIGKILL. `docs/failpoints.md` lists them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from enum import StrEnum

from flwr_ha.errors import ConfigError

log = logging.getLogger(__name__)

NAMES = (
    "session.before-save",
    "session.after-save",
    "session.after-commit",
    "blob.before-rename",
    "blob.after-rename",
    "commit.begin",
    "commit.after-protect",
    "commit.before-transaction",
    "commit.after-transaction",
    "commit.before-answer",
    "control.after-export",
    "control.after-protect",
    "control.after-transaction",
    "takeover.elected",
    "takeover.after-fetch",
    "takeover.after-checkpoints",
    "takeover.after-restore",
    "takeover.after-open",
    "stand-down.begin",
    "stand-down.after-kill",
)
"""All places, in the order in which a round and a change of leadership come to them."""


class Effect(StrEnum):
    """Say what happens to the process."""

    KILL = "kill"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True)
class Failpoint:
    """Name a place, and when the process comes to harm there.

    Attributes
    ----------
    name : str
        One of `NAMES`.
    effect : Effect
        What happens.
    count : int
        At which visit, counts from 1.
    """

    name: str
    effect: Effect
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """Return the failpoint that ``NAME:EFFECT`` or ``NAME:EFFECT:COUNT`` names; else ConfigError."""
        name, _, rest = text.partition(":")
        effect, _, count = rest.partition(":")
        if name not in NAMES:
            raise ConfigError(f"FLWR_HA_FAILPOINT = {text!r}: there is no failpoint {name!r}, see docs/failpoints.md")
        if effect not in tuple(Effect) or not (count or "1").isdigit() or count == "0":
            raise ConfigError(f"FLWR_HA_FAILPOINT = {text!r} is not NAME:kill or NAME:freeze, with :COUNT or without")
        return cls(name, Effect(effect), int(count or 1))


class _Armed:
    """Hold the failpoint of this process, and how often it came there."""

    def __init__(self) -> None:
        self.failpoint: Failpoint | None = None
        self.visits = 0
        self.lock = threading.Lock()


_armed = _Armed()


def arm(failpoint: Failpoint | None) -> None:
    """Set the failpoint of this process; None makes all of them inert again."""
    with _armed.lock:
        _armed.failpoint, _armed.visits = failpoint, 0
    if failpoint is not None:
        log.warning("failpoint %s is armed: this process will come to harm on purpose", failpoint)


def reach(name: str) -> None:
    """Come to a place; returns at once unless it is the armed one."""
    failpoint = _armed.failpoint
    if failpoint is None or failpoint.name != name:
        return
    with _armed.lock:
        _armed.visits += 1
        is_due = _armed.visits == failpoint.count
    if is_due:
        os.kill(os.getpid(), signal.SIGKILL if failpoint.effect is Effect.KILL else signal.SIGSTOP)
