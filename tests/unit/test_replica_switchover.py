"""When a leader takes a switchover for one that it has to carry out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flwr_ha.coordination.coordinator import LeaderRecord, Switchover, View
from flwr_ha.replica.messages import SwitchoverAsked
from flwr_ha.replica.replica import Replica
from flwr_ha.replica.runs import RunBoard


@pytest.mark.parametrize(
    ("seen_term", "asked"),
    [(4, []), (5, [SwitchoverAsked(frozenset(), 0)])],
    ids=["of the term before", "of this term"],
)
def test_only_a_request_of_its_own_term_is_obeyed(seen_term: int, asked: list[SwitchoverAsked]) -> None:
    """The view from before the election still holds the request that the election fulfilled."""
    view = View(
        term=seen_term,
        leader=LeaderRecord(replica_id=2, instance="a", term=seen_term, attempt="b"),
        switchover=Switchover(candidate=0, requested_at="2026-11-24T03:00:00.000Z"),
    )
    posted: list[object] = []
    replica = object.__new__(Replica)  # its threads and parts have no say in this
    replica._board = RunBoard()
    replica.pulse = SimpleNamespace(sight=SimpleNamespace(view=view))
    replica._agent = SimpleNamespace(is_leader=True, state=SimpleNamespace(drain=None), post=posted.append)

    replica._obey_switchover(SimpleNamespace(leadership=SimpleNamespace(term=5)))

    assert posted == asked
