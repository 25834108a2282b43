"""The argument behind a leader's lease with ZooKeeper; times in units of the session timeout."""

import pytest

from flwr_ha.coordination.proof import CLOCK_MARGIN, SessionProof

FULL = 1 - CLOCK_MARGIN


@pytest.fixture
def proof():
    """Return a proof with no calls noted."""
    return SessionProof()


def test_a_lone_transaction_proves_nothing(proof):
    """ZooKeeper's leader may not have heard of the session for a whole timeout."""
    assert proof.until(10.0, 1.0) < 10.0


def test_a_pause_takes_the_proof_away(proof):
    """A process that was frozen for nearly the session timeout has a lease in the past."""
    for tenth in range(20):
        proof.note(tenth / 10, tenth / 10 + 0.01, 1.0)

    assert proof.until(1.9 + 0.96, 1.0) < 1.9 + 0.96


def test_a_call_counts_when_it_was_reported_before_the_transaction(proof):
    """It was answered a third of the timeout ago or more; a younger one may not be reported yet."""
    proof.note(10.0, 10.1, 1.0)
    proof.note(10.3, 10.35, 1.0)

    assert proof.until(10.44, 1.0) == pytest.approx(10.0 + FULL)
    assert proof.until(10.69, 1.0) == pytest.approx(10.3 + FULL)
    assert proof.until(10.43, 1.0) < 10.43


def test_connecting_counts_at_once(proof):
    """ZooKeeper's leader itself hears of it; but not for a transaction that was begun before."""
    proof.note_connecting(10.0)

    assert proof.until(10.01, 1.0) == pytest.approx(10.0 + FULL)
    assert proof.until(9.99, 1.0) < 9.99


def test_many_calls_do_not_push_the_old_ones_out(proof):
    """A thousand calls a second, and the one that proves the lease is still known."""
    for millisecond in range(2000):
        proof.note(millisecond / 1000, millisecond / 1000 + 0.001, 1.0)

    assert proof.until(2.0, 1.0) > 2.5
