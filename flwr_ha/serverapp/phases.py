"""Run one phase of a round as a transaction: an attempt that ends short leaves no trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from flwr_ha.errors import NotEnoughNodesError
from flwr_ha.model import RunState
from flwr_ha.serverapp.context import RunContext
from flwr_ha.serverapp.gather import Gathering
from flwr_ha.serverapp.nodes import Kind, SamplingGrid, need, online, seeded_sampling, weight_key
from flwr_ha.serverapp.rounds import Done, Short
from flwr_ha.serverapp.state import Memory, capture, restore
from flwr_ha.serverapp.validation import why_weightless

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

_NODES_POLL_S = 0.5
_LOG_INTERVAL_S = 30.0
_LONGEST_PAUSE_S = 30.0

Outcome = TypeVar("Outcome")


def wait_for_nodes(run: RunContext, kind: Kind, server_round: int) -> dict[int, str]:
    """Return the nodes that are online once there are enough for the strategy.

    Raises
    ------
    NotEnoughNodesError
        ``wait_timeout_s`` is over: start more SuperNodes.
    FencedError
        A newer term exists: end at once.
    """
    needed = need(run.strategy, kind, min_nodes=run.rules.min_nodes)
    start_s = next_log_s = run.clock.now_s()
    while len(nodes := online(run.grid)) < needed.nodes:
        why = f" ({needed.reason})" if needed.reason else ""
        reason = f"{len(nodes)} of {needed.nodes} nodes online{why}"
        waited_s = run.clock.now_s() - start_s
        run.report(RunState.WAITING, reason, nodes_online=len(nodes))
        if run.clock.now_s() >= next_log_s:
            logger.info("round %d waits to %s: %s", server_round, kind, reason)
            next_log_s += _LOG_INTERVAL_S
        if run.rules.wait_timeout_s is not None and waited_s >= run.rules.wait_timeout_s:
            raise NotEnoughNodesError(f"round {server_round}: {reason} after {waited_s:.0f} s")
        run.clock.wait(_NODES_POLL_S)
    return nodes


def run_phase(
    run: RunContext,
    memory: Memory,
    kind: Kind,
    server_round: int,
    configure: Callable[[Grid], Iterable[Message]],
    aggregate: Callable[[list[Message]], Outcome | None],
) -> Outcome:
    """Ask the nodes that the strategy samples, and aggregate their replies, until it succeeds.

    Parameters
    ----------
    run : RunContext
        Grid, session, rules.
    memory : Memory
        Put back as it was before each further attempt.
    kind : str
        ``train`` or ``evaluate``.
    server_round : int
        Counts from 1.
    configure : callable
        Gives the messages; samples through the grid that it gets.
    aggregate : callable
        Gives the outcome, or None where the replies cannot be aggregated.

    Raises
    ------
    NotEnoughNodesError
        Too many attempts failed, or the wait for nodes is over; the message holds the reasons.
    FencedError
        A newer term exists: end at once.
    """
    before = capture(memory, is_copied=True)
    gathering = Gathering(run, kind, server_round)
    failures = 0
    while True:
        nodes = wait_for_nodes(run, kind, server_round)
        with seeded_sampling(run.session.run_id, server_round, kind):
            messages = list(configure(SamplingGrid(run.grid, nodes)))
        decision: Done | Short = Done("the strategy asks no nodes")
        replies: list[Message] = []
        if messages or not _may_skip(run, kind):
            decision, replies = gathering.attempt(messages, nodes)
        reason = decision.reason
        if isinstance(decision, Done):
            why = why_weightless(replies, weight_key(run.strategy))
            if why is None and (outcome := aggregate(replies)) is not None:
                return outcome
            reason = f"{reason}, but {why or f'{type(run.strategy).__name__} made no model of them'}"
            gathering.forget()
        restore(memory, before, is_exact=True)
        is_failure = isinstance(decision, Done) or decision.is_failure
        failures += is_failure
        logger.warning("round %d: the attempt to %s ended short: %s", server_round, kind, reason)
        if failures >= run.max_attempts:
            raise NotEnoughNodesError(
                f"round {server_round}: {failures} attempts to {kind} failed, the last one with {reason}"
            )
        if is_failure:
            run.report(RunState.WAITING, f"attempt {failures} to {kind} failed: {reason}", nodes_online=len(nodes))
            run.clock.wait(min(2.0 ** (failures - 1), _LONGEST_PAUSE_S))


def _may_skip(run: RunContext, kind: Kind) -> bool:
    """Whether no message at all is fine; a round that trains must keep the promise of ``min_nodes``."""
    return kind == "evaluate" or need(run.strategy, kind, min_nodes=run.rules.min_nodes).nodes == 0
