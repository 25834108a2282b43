"""What ``GET /cluster`` shows of what the coordinator holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flwr_ha.config import parse_settings
from flwr_ha.coordination.values import LeaderRecord, Record, View
from flwr_ha.model import Head, Position, RunState, RunStatus
from flwr_ha.replica.clusterview import cluster_json

RUN = "1951071765553103618"
SETTINGS = parse_settings(
    {
        "cluster": "mnist",
        "coordinator": "embedded:c",
        "replicas": [{"id": n, "address": "127.0.0.1:8000", "api": f"127.0.0.1:801{n}"} for n in range(3)],
    },
    folder=Path("/srv/flwr-ha"),
)


def head(server_round: int, *, num_rounds: int = 8, term: int = 2) -> Head:
    """Return the commit of one round, made on replicas 0 and 1."""
    return Head(
        run_id=RUN,
        app="flwr-ha/flwr-ha",
        num_rounds=num_rounds,
        position=Position(term, server_round, f"sha256:{server_round:064}"),
        model_digest="sha256:model",
        size_bytes=4_800_512,
        copies=(0, 1),
        committed_at="2026-11-24T03:00:00.000Z",
        metrics={"accuracy": server_round / 10},
    )


def record(
    replica_id: int,
    *,
    holds: int | None = None,
    checked: int = 3,
    runs: list[RunStatus] | None = None,
    knows_runs: bool = True,
    lag: int = 0,
) -> Record:
    """Return what a replica publishes: the round whose checkpoint lies there, and that which it looked for."""
    return {
        "id": replica_id,
        "state": "running",
        "lag_rounds": lag,
        "checked": {RUN: head(checked).position.digest},
        "holds": {} if holds is None else {RUN: head(holds).position.digest},
        "runs": [status.to_json() for status in runs or ()],
        "knows_runs": knows_runs,
    }


def leader(replica_id: int, term: int = 3) -> LeaderRecord:
    """Return the entry of the leader."""
    return LeaderRecord(replica_id=replica_id, instance="a", term=term, attempt="b")


WAITING = RunStatus(
    run_id=RUN,
    app="flwr-ha/flwr-ha",
    state=RunState.WAITING,
    reason="4 of 5 nodes online",
    num_rounds=8,
    nodes_online=4,
    min_nodes=5,
)


def test_cluster_is_shown_as_the_contract_says() -> None:
    """The whole answer of a cluster whose replica 2 is down, key by key."""
    view = View(
        term=3,
        leader=leader(1),
        replicas={0: record(0, holds=2, lag=1), 1: record(1, holds=3, runs=[WAITING])},
        heads={RUN: head(3)},
    )
    assert cluster_json(SETTINGS, view, {RUN: (head(1), head(2), head(3))}) == {
        "cluster": "mnist",
        "term": 3,
        "leader": 1,
        "paused": False,
        "replicas": [
            {
                "id": 0,
                "role": "standby",
                "state": "running",
                "address": "127.0.0.1:8000",
                "api": "127.0.0.1:8010",
                "lag_rounds": 1,
            },
            {
                "id": 1,
                "role": "leader",
                "state": "running",
                "address": "127.0.0.1:8000",
                "api": "127.0.0.1:8011",
                "lag_rounds": 0,
            },
            {
                "id": 2,
                "role": "standby",
                "state": "unreachable",
                "address": "127.0.0.1:8000",
                "api": "127.0.0.1:8012",
                "lag_rounds": None,
            },
        ],
        "runs": [
            {
                "run_id": RUN,
                "app": "flwr-ha/flwr-ha",
                "state": "waiting",
                "reason": "4 of 5 nodes online",
                "server_round": 3,
                "num_rounds": 8,
                "nodes_online": 4,
                "min_nodes": 5,
                "checkpoint": {
                    "server_round": 3,
                    "term": 2,
                    "digest": f"sha256:{3:064}",
                    "model_digest": "sha256:model",
                    "bytes": 4_800_512,
                    "copies": [1],
                    "committed_at": "2026-11-24T03:00:00.000Z",
                },
                "metrics": {"1": {"accuracy": 0.1}, "2": {"accuracy": 0.2}, "3": {"accuracy": 0.3}},
            }
        ],
    }


@pytest.mark.parametrize(
    ("server_round", "state", "reason"), [(3, "waiting", "no leader"), (8, "finished", ""), (0, "waiting", "no leader")]
)
def test_without_a_leader_the_commits_still_tell(server_round: int, state: str, reason: str) -> None:
    """Nobody reports on the runs; a run whose last round is committed is finished."""
    view = View(term=3, heads={RUN: head(server_round)})
    (run,) = cluster_json(SETTINGS, view, {})["runs"]
    assert (run["state"], run["reason"], run["server_round"]) == (state, reason, server_round)


@pytest.mark.parametrize(
    ("knows_runs", "server_round", "state"), [(True, 3, "stopped"), (True, 8, "finished"), (False, 3, "waiting")]
)
def test_run_that_the_leader_does_not_list_has_ended(knows_runs: bool, server_round: int, state: str) -> None:
    """It lists the newest of those that have ended; right after a takeover it has not looked yet."""
    view = View(
        leader=leader(1), replicas={1: record(1, knows_runs=knows_runs)}, heads={RUN: head(server_round)}, term=3
    )
    (run,) = cluster_json(SETTINGS, view, {})["runs"]
    assert run["state"] == state
    assert bool(run["reason"]) == (state != "finished")


def test_copies_are_those_that_exist_now() -> None:
    """A live replica speaks for itself; one that is down counts if it held the bytes at the commit."""
    view = View(leader=leader(1), replicas={1: record(1, holds=3), 2: record(2, holds=3)}, heads={RUN: head(3)}, term=3)
    (run,) = cluster_json(SETTINGS, view, {})["runs"]
    assert run["checkpoint"]["copies"] == [0, 1, 2]


def test_reports_of_an_earlier_leader_do_not_count() -> None:
    """Only the present leader knows what its runs do."""
    view = View(leader=leader(0), replicas={0: record(0), 1: record(1, runs=[WAITING])}, term=3)
    assert cluster_json(SETTINGS, view, {})["runs"] == []


def test_run_without_a_commit_is_shown() -> None:
    """It has just been submitted."""
    view = View(leader=leader(1), replicas={1: record(1, runs=[WAITING])}, term=3)
    (run,) = cluster_json(SETTINGS, view, {})["runs"]
    assert (run["server_round"], run["checkpoint"], run["metrics"], run["num_rounds"]) == (0, None, {}, 8)


def test_runs_are_shown_oldest_first() -> None:
    """What the leader has dropped from its list is older than that list, whose order is that of submission."""
    listed = [replace(WAITING, run_id=run_id) for run_id in ("3", "1")]
    heads = {
        run_id: replace(head(3), run_id=run_id, committed_at=f"2026-11-24T03:00:0{at}Z")
        for run_id, at in (("1", 9), ("2", 2), ("4", 1))
    }
    view = View(leader=leader(1), replicas={1: record(1, runs=listed)}, heads=heads, term=3)
    assert [run["run_id"] for run in cluster_json(SETTINGS, view, {})["runs"]] == ["4", "2", "3", "1"]


def test_answer_grows_little_with_the_runs_of_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dashboard asks once a second: metrics of all rounds are there for the newest runs."""
    monkeypatch.setattr("flwr_ha.replica.clusterview.FULL_RUNS", 1)
    heads = {
        run_id: replace(head(3), run_id=run_id, committed_at=f"2026-11-24T03:00:0{at}Z")
        for run_id, at in (("1", 1), ("2", 2))
    }
    logs = {run_id: tuple(replace(head(n), run_id=run_id) for n in (1, 2, 3)) for run_id in heads}
    first, second = cluster_json(SETTINGS, View(term=3, heads=heads), logs)["runs"]
    assert first["metrics"] == {"3": {"accuracy": 0.3}}
    assert set(second["metrics"]) == {"1", "2", "3"}


def test_replica_that_has_not_looked_yet_counts_as_the_commit_said() -> None:
    """Right after a commit the records are older than the head: they do not say that the copies are gone."""
    copies = head(3).copies
    assert copies
    view = View(
        leader=leader(1),
        replicas={replica_id: record(replica_id, holds=2, checked=2) for replica_id in copies},
        heads={RUN: head(3)},
        term=3,
    )
    (run,) = cluster_json(SETTINGS, view, {})["runs"]
    assert run["checkpoint"]["copies"] == sorted(copies)
