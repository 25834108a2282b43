"""What people see of a cluster in a terminal of 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from flwr_ha import tables

RUN = "15109387637633453898"


def shown(table: RenderableType, *, width: int = 80) -> str:
    """Return a table as a terminal of that width shows it."""
    output = io.StringIO()
    Console(file=output, width=width, highlight=False).print(table)
    assert max(len(line) for line in output.getvalue().splitlines()) <= width
    return output.getvalue()


def cluster(*, host: str = "127.0.0.1", replica_state: str = "running", **run: Any) -> dict[str, Any]:
    """Return what ``GET /cluster`` answers, with one replica and one run."""
    replica = {"id": 0, "role": "standby", "state": replica_state, "address": f"{host}:8000", "api": f"{host}:8010"}
    base = {
        "run_id": RUN,
        "app": "flwr-ha/flwr-ha",
        "state": "finished",
        "reason": "",
        "server_round": 8,
        "num_rounds": 8,
        "nodes_online": 4,
        "min_nodes": 5,
        "checkpoint": {"copies": [0, 1, 2]},
        "metrics": {"8": {"accuracy": 0.92341, "loss": 0.31236}},
    }
    return {
        "cluster": "mnist",
        "term": 3,
        "paused": False,
        "replicas": [{**replica, "lag_rounds": None if replica_state == "unreachable" else 0}],
        "runs": [{**base, **run}],
    }


@pytest.mark.parametrize("state", ["finished", "evaluating"])
def test_words_of_a_run_stay_whole(state: str) -> None:
    """Ids are copied from here, and states are read at a glance."""
    out = shown(tables.run_table(cluster(state=state, reason="4 of 5 nodes online", num_rounds=100)))
    whole = (RUN, "flwr-ha/flwr-ha", state, "8/100", "4 of 5", "0, 1, 2", "accuracy", "0.3124", "online")
    assert [word for word in whole if word not in out] == []


def test_a_run_has_one_line_for_grep() -> None:
    """What a script may look for stands beside the id."""
    (line,) = (line for line in shown(tables.run_table(cluster())).splitlines() if RUN in line)
    assert line.split()[:3] == [RUN, "finished", "8/8"]


def test_addresses_are_never_cut() -> None:
    """A long one goes on in the next line."""
    assert "127.0.0.1:8000  127.0.0.1:8010" in shown(tables.replica_table(cluster(replica_state="unreachable")))
    host = "replica-0.federated-learning.example.org"
    lines = shown(tables.replica_table(cluster(host=host))).splitlines()
    column = slice(lines[2].index("Address"), lines[2].index("API"))
    assert "".join(line[column].strip() for line in lines[4:]) == f"{host}:8000"


def test_digests_are_never_cut() -> None:
    """They are compared with those of another run."""
    digest = "sha256:" + "0123456789abcdef" * 4
    entry = {"server_round": 3, "term": 2, "kept": True, "bytes": 4_800_512, "model_digest": digest}
    lines = shown(tables.checkpoint_table(RUN, [{**entry, "committed_at": "2026-11-24T03:00:00.123Z"}])).splitlines()
    start = lines[2].index("Model digest")
    assert "".join(line[start:].strip() for line in lines[4:]) == digest
