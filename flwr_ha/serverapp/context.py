"""What all parts of a training share: the grid, the session, the rules, the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_ha.model import RunState, RunStatus
from flwr_ha.serverapp.rounds import Rules
from flwr_ha.serverapp.session import Session
from flwr_ha.serverapp.spill import IN_MEMORY_BYTES


class Clock(Protocol):
    """Tell the time and let it pass; a seam for tests."""

    def now_s(self) -> float:
        """Return monotonic seconds."""
        ...

    def wait(self, seconds: float) -> None:
        """Return after that many seconds."""
        ...


class SystemClock:
    """Use the clock of this machine."""

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Return after that many seconds."""
        time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Hold what all parts of a training share.

    Attributes
    ----------
    grid : Grid
        To the nodes.
    session : Session
        Keeps the rounds.
    strategy : Strategy
        The one that is wrapped.
    rules : Rules
        Threshold and waiting.
    clock : Clock
        Time.
    app : str
        ``publisher/name``; may be empty.
    num_rounds : int
        Rounds that the run is to have.
    max_attempts : int
        Attempts of one phase that may fail before the training gives up.
    in_memory_bytes : int
        Replies of one phase that may wait in memory; more wait on disk.
    """

    grid: Grid
    session: Session
    strategy: Strategy
    rules: Rules
    clock: Clock
    app: str
    num_rounds: int
    max_attempts: int
    in_memory_bytes: int = IN_MEMORY_BYTES

    def report(self, state: RunState, reason: str, *, nodes_online: int) -> None:
        """Show what the run does."""
        self.session.report(
            RunStatus(
                run_id=self.session.run_id,
                app=self.app,
                state=state,
                reason=reason,
                num_rounds=self.num_rounds,
                nodes_online=nodes_online,
                min_nodes=self.rules.min_nodes,
            )
        )
