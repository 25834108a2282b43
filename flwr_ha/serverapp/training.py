"""The loop over rounds: begin or go on, train, evaluate, commit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result

from flwr_ha.errors import ConfigError
from flwr_ha.model import Head
from flwr_ha.serverapp.aggregation import fast_averages
from flwr_ha.serverapp.arrays import canonical, pack, unpack
from flwr_ha.serverapp.context import RunContext
from flwr_ha.serverapp.history import metrics_for_people, result_from_json, result_to_json
from flwr_ha.serverapp.phases import run_phase
from flwr_ha.serverapp.state import Memory, State, capture, restore
from flwr_ha.storage.checkpoint import Checkpoint

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class Training:
    """Train over all rounds, from where the last life of the ServerApp has stopped.

    Parameters
    ----------
    run : RunContext
        Grid, session, strategy, rules.
    memory : Memory
        What the strategy remembers, and the configurations.
    arrays : ArrayRecord
        The initial model.
    evaluate_fn : callable or None
        The server's own evaluation.
    """

    def __init__(self, run: RunContext, memory: Memory, arrays: ArrayRecord, evaluate_fn: EvaluateFn | None) -> None:
        self._run = run
        self._memory = memory
        self._result = Result(arrays=canonical(arrays))
        self._initial = _form(arrays)
        self._evaluate_fn = evaluate_fn

    def run(self) -> Result:
        """Return the result of all rounds, those of earlier lives included.

        Raises
        ------
        FencedError
            A newer term exists; another replica goes on.
        NotEnoughNodesError
            A round cannot be completed.
        ConfigError
            What is committed was made by another training.
        CheckpointError
            What is committed has no good copy.
        """
        head = self._run.session.head()
        if head is None:
            self._evaluate_centrally(0)
            self._commit(0)
            done = 0
        else:
            self._resume(head)
            done = head.position.server_round
        for server_round in range(done + 1, self._run.num_rounds + 1):
            logger.info("")
            logger.info("[ROUND %d/%d]", server_round, self._run.num_rounds)
            self._train(server_round)
            self._evaluate(server_round)
            self._evaluate_centrally(server_round)
            self._commit(server_round)
        return self._result

    def _train(self, server_round: int) -> None:
        strategy, arrays = self._run.strategy, self._result.arrays

        def aggregate(replies: list[Message]) -> tuple[ArrayRecord, MetricRecord | None] | None:
            with fast_averages():
                aggregated, metrics = strategy.aggregate_train(server_round, replies)
            if aggregated is None:
                return None if replies else (arrays, metrics)
            return aggregated, metrics

        aggregated, metrics = run_phase(
            self._run,
            self._memory,
            "train",
            server_round,
            lambda grid: strategy.configure_train(server_round, arrays, self._memory.train_config, grid),
            aggregate,
        )
        self._result.arrays = canonical(aggregated)
        if metrics is not None:
            logger.info("round %d: training metrics %s", server_round, dict(metrics))
            self._result.train_metrics_clientapp[server_round] = metrics

    def _evaluate(self, server_round: int) -> None:
        strategy, arrays = self._run.strategy, self._result.arrays
        (metrics,) = run_phase(
            self._run,
            self._memory,
            "evaluate",
            server_round,
            lambda grid: strategy.configure_evaluate(server_round, arrays, self._memory.evaluate_config, grid),
            lambda replies: (strategy.aggregate_evaluate(server_round, replies),),
        )
        if metrics is not None:
            logger.info("round %d: evaluation metrics %s", server_round, dict(metrics))
            self._result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_centrally(self, server_round: int) -> None:
        if self._evaluate_fn is None:
            return
        if (metrics := self._evaluate_fn(server_round, self._result.arrays)) is not None:
            logger.info("round %d: metrics of the server %s", server_round, dict(metrics))
            # Flower does not look at what it gets here; a numpy scalar in it could not be kept.
            plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in metrics.items()}
            self._result.evaluate_metrics_serverapp[server_round] = MetricRecord(plain)

    def _commit(self, server_round: int) -> None:
        state = capture(self._memory, is_copied=False)
        arrays, foreign = pack(self._result.arrays)
        checkpoint = Checkpoint(
            run_id=self._run.session.run_id,
            server_round=server_round,
            num_rounds=self._run.num_rounds,
            arrays=arrays,
            strategy_arrays=dict(state.arrays),
            state={**state.plain, "foreign": foreign, "initial": self._initial},
            history=result_to_json(self._result),
        )
        head = self._run.session.commit(checkpoint, metrics_for_people(self._result, server_round))
        where = "on replicas " + ", ".join(map(str, head.copies)) if head.copies else _place(head)
        logger.info("round %d/%d committed %s (term %d)", server_round, self._run.num_rounds, where, head.position.term)

    def _resume(self, head: Head) -> None:
        """Take over the committed round; the initial arrays may be random, so only their form is compared."""
        if head.num_rounds != self._run.num_rounds:
            raise ConfigError(
                f"round {head.position.server_round} of {head.num_rounds} is committed, but now {self._run.num_rounds} "
                "rounds are asked for: one run holds one training"
            )
        checkpoint = self._run.session.load(head)
        arrays = unpack(checkpoint.arrays, checkpoint.state["foreign"])
        if (found := checkpoint.state["initial"]) != self._initial:
            raise ConfigError(f"the run began with arrays {found}, now the initial arrays are {self._initial}")
        restore(self._memory, State(checkpoint.state, checkpoint.strategy_arrays))
        self._result = result_from_json(checkpoint.history, arrays)
        logger.info("resuming after round %d (term %d)", head.position.server_round, head.position.term)


def _form(arrays: ArrayRecord) -> list[list[Any]]:
    """Return names and, but for serialized models (flat bytes, which grow), shapes.

    Types are left out: FedAdam and its like turn float32 into float64.
    """
    return [
        [name, "any" if array.dtype == "uint8" and len(array.shape) == 1 else list(array.shape)]
        for name, array in arrays.items()
    ]


def _place(head: Head) -> str:
    return "to the local folder" if head.position.digest else "in memory only (no replica, no checkpoint_dir)"
