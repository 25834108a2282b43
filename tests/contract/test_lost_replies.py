"""ZooKeeper applies a transaction and its answer is lost, or nothing gets through at all: a real node behind a link."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.coordination.zookeeper import ZooKeeperStore
from flwr_ha.errors import CoordinationError
from flwr_ha.local.processes import wait_until
from flwr_ha.local.zookeeper import LocalEnsemble
from flwr_ha.model import Head, Position
from tests.chaos.links import Link, Links

pytestmark = [pytest.mark.zookeeper, pytest.mark.timeout(120)]
RUN = "5"


@pytest.fixture
def link(standalone: LocalEnsemble) -> Iterator[Link]:
    """Lead to a ZooKeeper node."""
    with Links() as links:
        yield links.add(standalone.client_ports[0])


@pytest.fixture
def coordinator(link: Link, request: pytest.FixtureRequest) -> Iterator[Coordinator]:
    """Take part in a cluster of this test through the link."""
    store = ZooKeeperStore(f"127.0.0.1:{link.port}", f"/{abs(hash(request.node.name))}", session_timeout_s=6.0)
    store.start(lambda: None, timeout_s=20.0)
    made = Coordinator(store, replica_id=0, instance="a")
    yield made
    link.heal()
    made.close()


def _head(leadership: Leadership, server_round: int) -> Head:
    position = Position(leadership.term, server_round, f"sha256:{server_round:064}")
    return Head(run_id=RUN, app="a/b", num_rounds=3, position=position, model_digest="", size_bytes=1)


def _lead(coordinator: Coordinator) -> Leadership:
    leadership = coordinator.campaign("a test")
    assert leadership is not None
    return leadership


def test_round_whose_commit_was_applied_unheard_is_committed_once(coordinator: Coordinator, link: Link) -> None:
    """The leader reads again before it decides, and finds its own commit."""
    leadership = _lead(coordinator)
    coordinator.commit(leadership, _head(leadership, 1))

    link.lose_reply()
    done = coordinator.commit(leadership, _head(leadership, 2))

    assert link.lost_replies == 1
    assert done.position.server_round == 2
    assert [head.position.server_round for head in coordinator.commit_log(RUN)] == [1, 2]


def test_election_that_was_won_unheard_is_one_term(coordinator: Coordinator, link: Link) -> None:
    """The candidate finds its own entry, not another leader."""
    link.lose_reply()

    assert _lead(coordinator).term == 1
    assert link.lost_replies == 1
    assert [change.term for change in coordinator.history()] == [1]


def test_silent_network_is_an_unknown_outcome_and_a_healed_one_goes_on(coordinator: Coordinator, link: Link) -> None:
    """Nothing is refused and nothing answers: each call ends in time, and the session lives on if that was short."""
    leadership = _lead(coordinator)

    link.cut()
    with pytest.raises(CoordinationError):
        coordinator.renew(leadership, {})
    link.heal()

    def renewed() -> bool:
        try:
            coordinator.renew(leadership, {})
        except CoordinationError:
            return False
        return True

    wait_until(renewed, timeout_s=20.0, what="a renewal")
    assert coordinator.commit(leadership, _head(leadership, 1)).position.server_round == 1
