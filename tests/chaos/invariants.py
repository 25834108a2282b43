"""What must hold whatever breaks: pure checks over the evidence that a cluster leaves behind.

The promises are those of `docs/guarantees.md`. Each check returns a sentence per violation, so that a
failing seed says what it broke.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import pairwise

from tests.chaos.evidence import Attempt, Evidence, NodeKill, Training


def broken(evidence: Evidence) -> tuple[str, ...]:
    """Return what does not hold, a sentence each; empty where all is well."""
    return tuple(sentence for check in CHECKS for sentence in check(evidence))


def _one_leader_per_term(evidence: Evidence) -> Iterator[str]:
    leaders: defaultdict[int, set[int]] = defaultdict(set)
    for event in evidence.events:
        if event["kind"] in ("elected", "leading"):
            leaders[event["term"]].add(event["replica"])
    for change in evidence.history:
        leaders[change.term].add(change.leader)
    for term, replicas in sorted(leaders.items()):
        if len(replicas) > 1:
            yield f"term {term} has {len(replicas)} leaders: {sorted(replicas)}"


def _terms_rise(evidence: Evidence) -> Iterator[str]:
    terms = [change.term for change in evidence.history]
    if terms != list(range(1, len(terms) + 1)):
        yield f"the terms of the history are {terms}"
    newest: dict[int, int] = {}
    for event in evidence.events:
        if event["kind"] == "elected":
            replica, term = event["replica"], event["term"]
            if term <= newest.get(replica, 0):
                yield f"replica {replica} was elected for term {term} after {newest[replica]}"
            newest[replica] = term


def _no_commit_under_an_old_term(evidence: Evidence) -> Iterator[str]:
    for run_id, log in evidence.commits.items():
        terms = [head.position.term for head in log]
        if terms != sorted(terms):
            yield f"run {run_id} has commits under the terms {terms}: an older leader committed after a newer one"
    leaders = {change.term: change.leader for change in evidence.history}
    for event in evidence.events:
        if event["kind"] == "commit" and leaders.get(event["term"]) != event["replica"]:
            yield f"replica {event['replica']} committed under term {event['term']}, which is not its own"


def _each_round_committed_once(evidence: Evidence) -> Iterator[str]:
    for run_id, log in evidence.commits.items():
        rounds = [head.position.server_round for head in log]
        if rounds != list(range(1, len(rounds) + 1)):
            yield f"run {run_id} has commits of the rounds {rounds}"
    told: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for event in evidence.events:
        if event["kind"] == "commit":
            told[event["run_id"], event["server_round"]].add(event["digest"])
    for (run_id, server_round), digests in told.items():
        log = evidence.commits.get(run_id, ())
        if server_round == 0:
            continue  # the initial model has no entry of its own
        kept = log[server_round - 1].position.digest if server_round <= len(log) else "nothing"
        if digests != {kept}:
            yield f"round {server_round} of run {run_id} was committed as {sorted(digests)}, but {kept} is kept"


def _all_rounds_there(evidence: Evidence) -> Iterator[str]:
    for run_id, rounds in evidence.rounds.items():
        found = len(evidence.commits.get(run_id, ()))
        if found != rounds:
            yield f"run {run_id} has {found} committed rounds of {rounds}"


def _committed_is_readable(evidence: Evidence) -> Iterator[str]:
    for digest, reason in evidence.unreadable.items():
        yield f"the committed checkpoint {digest} cannot be read: {reason}"


def _threshold_kept(evidence: Evidence) -> Iterator[str]:
    trained: Counter[tuple[str, int]] = Counter()
    for (run_id, _, server_round), attempts in evidence.trainings.items():
        trained[run_id, server_round] += any(math.isfinite(attempt.ended_s) for attempt in attempts)
    for run_id, least in evidence.min_nodes.items():
        for head in evidence.commits.get(run_id, ()):
            server_round = head.position.server_round
            count = trained[run_id, server_round]
            if count < least:
                yield f"round {server_round} of run {run_id} counts {count} clients, {least} are the least"


def _same_bits(evidence: Evidence) -> Iterator[str]:
    for run_id, expected in evidence.expected_models.items():
        found = evidence.final_models.get(run_id)
        if found != expected:
            yield f"the model of run {run_id} is {found} at the end, not {expected}"


def _nothing_trained_twice(evidence: Evidence) -> Iterator[str]:
    for (run_id, partition, server_round), reason in repeats(evidence):
        if reason is None:
            attempts = evidence.trainings[run_id, partition, server_round]
            yield f"{partition} trained round {server_round} of run {run_id} again for no good reason: {attempts}"


class Reason(StrEnum):
    """Say why a training had to be repeated."""

    IN_THE_MIDDLE = "its SuperNode was killed in the middle of it"
    BEFORE_COMMIT = "its SuperNode was killed after it, before the round was committed"


def repeats(evidence: Evidence) -> Iterator[tuple[Training, Reason | None]]:
    """Return each repeated training and why it was repeated; None where nothing excuses it.

    The cache of a client lies under its node, and a SuperNode that is started again is another node for
    Flower: what its predecessor had not delivered is lost. Nothing else is a reason, whatever becomes of the replicas.
    """
    for training, attempts in evidence.trainings.items():
        for earlier, later in pairwise(attempts):
            yield training, _reason(training[1], earlier, later, evidence.kills)


def _reason(partition: str, earlier: Attempt, later: Attempt, kills: Iterable[NodeKill]) -> Reason | None:
    between = [
        kill.at_s for kill in kills if kill.partition == partition and earlier.began_s < kill.at_s < later.began_s
    ]
    if not between or earlier.node == later.node:
        return None
    return Reason.BEFORE_COMMIT if earlier.ended_s < min(between) else Reason.IN_THE_MIDDLE


CHECKS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    _one_leader_per_term,
    _terms_rise,
    _no_commit_under_an_old_term,
    _each_round_committed_once,
    _all_rounds_there,
    _committed_is_readable,
    _threshold_kept,
    _same_bits,
    _nothing_trained_twice,
)
