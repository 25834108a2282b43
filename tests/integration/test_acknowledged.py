"""Acknowledged means safe: the leader dies within milliseconds after an answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.acknowledged import kill_after_acknowledgement

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

TIMES = int(os.environ.get("FLWR_HA_TEST_ACKNOWLEDGED", "3"))


@pytest.mark.parametrize("what", ["runs", "supernodes"])
def test_nothing_acknowledged_is_ever_missing(tmp_path: Path, what: str) -> None:
    """Every run id that a user has seen and every registered node is known later; `make chaos`: fifty times each."""
    acknowledged, known = kill_after_acknowledgement(tmp_path, times=TIMES, what=what)
    assert len(set(acknowledged)) == TIMES
    assert set(acknowledged) <= known
