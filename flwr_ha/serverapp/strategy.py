"""Wrap any Flower strategy so that its training survives the death of its server."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from flwr_ha.errors import ConfigError
from flwr_ha.serverapp.context import Clock, RunContext, SystemClock
from flwr_ha.serverapp.nodes import names
from flwr_ha.serverapp.rounds import Rules
from flwr_ha.serverapp.session import Session, open_session
from flwr_ha.serverapp.spill import IN_MEMORY_BYTES
from flwr_ha.serverapp.state import Memory
from flwr_ha.serverapp.training import EvaluateFn, Training

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

_FLOWER_TIMEOUT_S = 3600.0

# One run holds one training: a second one would take the rounds of the first for its own.
_used_grids: WeakSet[Grid] = WeakSet()


class HighlyAvailable(Strategy):
    """Train with any Message-API strategy, and go on after the death of the server.

    Each round is a transaction: it counts only with ``min_nodes`` valid replies, and, inside a
    replica, only once a majority of replicas holds it. After a failover the ServerApp starts again
    and this goes on with the next round of the same run.

    Parameters
    ----------
    strategy : Strategy
        Configures and aggregates the rounds.
    min_nodes : int
        No round trains or counts with fewer valid replies; below it training pauses; from 1.
    round_timeout_s : float
        Seconds that one attempt of a phase waits for replies.
    min_replies : int, optional
        Replies after which stragglers are given up; None: all nodes that were asked. It makes the
        result depend on who is fast.
    grace_s : float
        Seconds that stragglers have once ``min_replies`` are there.
    wait_timeout_s : float, optional
        Seconds to wait for enough nodes to be online; None: for ever.
    same_arrays : bool
        Whether a reply to training must hold the arrays that were sent, by name and shape. False for
        clients that send something else on purpose, such as compressed updates or adapters: the
        strategy has to know what to do with it.
    checkpoint_dir : path, optional
        Keeps checkpoints in a folder where no replica runs the ServerApp: with a plain
        ``flower-superlink`` or the simulation runtime. There each process is a new run, so a
        training is known by its app (``publisher/name``) and the classes of its strategies:
        killed and run again it goes on; once it has finished, it starts anew.

    Raises
    ------
    ConfigError
        A parameter is impossible.

    Notes
    -----
    With differential privacy a round that is repeated after a failover draws new noise. If clients
    had already evaluated the lost model, they have seen both: count such a round twice.
    """

    max_attempts: ClassVar[int] = 10
    """Attempts of one phase that may fail, by bad replies or a deadline, before `start` gives up."""

    in_memory_bytes: ClassVar[int] = IN_MEMORY_BYTES
    """Replies of one training phase that wait in memory; where they are bigger, they wait on disk."""

    clock: ClassVar[Clock] = SystemClock()
    """A seam for tests."""

    def __init__(  # noqa: PLR0913  # each is a setting of its own, all but the first by name
        self,
        strategy: Strategy,
        *,
        min_nodes: int,
        round_timeout_s: float = _FLOWER_TIMEOUT_S,
        min_replies: int | None = None,
        grace_s: float = 0.0,
        wait_timeout_s: float | None = None,
        same_arrays: bool = True,
        checkpoint_dir: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise ConfigError(f"HighlyAvailable wraps a flwr.serverapp.strategy.Strategy, not {type(strategy)!r}")
        if isinstance(strategy, HighlyAvailable):
            raise ConfigError("HighlyAvailable is already highly available: wrap the strategy once")
        self.strategy = strategy
        self.rules = Rules(
            min_nodes=min_nodes,
            round_timeout_s=round_timeout_s,
            min_replies=min_replies,
            grace_s=grace_s,
            wait_timeout_s=wait_timeout_s,
            same_arrays=same_arrays,
        )
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)

    def start(  # noqa: PLR0913, PLR0917  # Flower's signature
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = _FLOWER_TIMEOUT_S,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Train, from the first round or from where the last life of the ServerApp has stopped.

        Parameters
        ----------
        grid : Grid
            To the nodes.
        initial_arrays : ArrayRecord
            The initial model; may be random: only the first life of a run uses it.
        num_rounds : int
            Rounds that the run is to have.
        timeout : float
            Seconds; shortens ``round_timeout_s``.
        train_config, evaluate_config : ConfigRecord, optional
            Sent to the nodes.
        evaluate_fn : callable, optional
            Gets the round (0 for the initial model) and the arrays; returns metrics or None.

        Returns
        -------
        Result
            Final arrays, and the metrics of all rounds, those of earlier lives included.

        Raises
        ------
        FencedError
            A newer term exists, another replica goes on: let the ServerApp end.
        NotEnoughNodesError
            A round cannot be completed; the message says why.
        ConfigError
            What is committed was made by another training, or the strategy asks too few nodes.
        CheckpointError
            What is committed has no good copy; the message names the one before.
        """
        memory = Memory(
            self.strategy,
            ConfigRecord() if train_config is None else train_config,
            ConfigRecord() if evaluate_config is None else evaluate_config,
        )
        logger.info("Starting HighlyAvailable, min_nodes = %d:", self.rules.min_nodes)
        log_strategy_start_info(num_rounds, initial_arrays, train_config, evaluate_config)
        self.summary()
        session = self._open_session(grid)
        try:
            run = self._context(grid, session, num_rounds=num_rounds, timeout_s=timeout)
            return Training(run, memory, initial_arrays, evaluate_fn).run()
        finally:
            session.close()

    def _open_session(self, grid: Grid) -> Session:
        name = names(self.strategy)
        session = open_session(
            run_id=str(grid.run.run_id), app=grid.run.fab_id, name=name, checkpoint_dir=self.checkpoint_dir
        )
        if session.is_once_per_run:
            if grid in _used_grids:
                session.close()
                raise ConfigError("start() was called twice in one run: a run on replicas holds one training")
            _used_grids.add(grid)
        return session

    def _context(self, grid: Grid, session: Session, *, num_rounds: int, timeout_s: float) -> RunContext:
        return RunContext(
            grid=grid,
            session=session,
            strategy=self.strategy,
            rules=replace(self.rules, round_timeout_s=min(self.rules.round_timeout_s, timeout_s)),
            clock=self.clock,
            app=grid.run.fab_id,
            num_rounds=num_rounds,
            max_attempts=self.max_attempts,
            in_memory_bytes=self.in_memory_bytes,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass on."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Pass on."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the settings of the wrapped strategy."""
        self.strategy.summary()
