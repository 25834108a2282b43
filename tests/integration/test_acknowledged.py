"""Acknowledged means safe: the leader dies within milliseconds after `flwr run` has printed a run id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.acknowledged import kill_after_acknowledgement

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

TIMES = int(os.environ.get("FLWR_HA_TEST_ACKNOWLEDGED", "3"))


def test_no_acknowledged_run_is_ever_missing(tmp_path: Path) -> None:
    """Every run id that a user has seen is known to the next leader; `make chaos` does it fifty times."""
    acknowledged, known = kill_after_acknowledgement(tmp_path, times=TIMES)
    assert len(acknowledged) == TIMES
    assert set(acknowledged) <= known
