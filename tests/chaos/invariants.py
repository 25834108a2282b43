"""What must hold whatever breaks: pure checks over the evidence that a cluster leaves behind.

The promises are those of `docs/guarantees.md`. Each check returns a sentence per violation, so that a
failing seed says what it broke.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from tests.chaos.evidence import Evidence


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
    for run_id, _, server_round in evidence.trainings:
        trained[run_id, server_round] += 1
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
    repeats = {key: count for key, count in evidence.trainings.items() if count > 1}
    if sum(count - 1 for count in repeats.values()) <= evidence.allowed_repeats:
        return
    for (run_id, partition, server_round), count in repeats.items():
        yield f"{partition} trained round {server_round} of run {run_id} {count} times"


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
