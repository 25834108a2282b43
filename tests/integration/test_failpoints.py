"""A leader is killed at each step of a commit and of a takeover: the head is the old or the new one, never between."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.failpoints import NAMES, Failpoint
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import load
from flwr_ha.superlink import linkstate
from tests.chaos.miniature import model_after
from tests.chaos.stage import Stage, stage_in

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),  # Flower's own migrations
]

ROUNDS = 4
DOCS = Path(__file__).parents[2] / "docs" / "failpoints.md"

# What the old leader has committed when it dies at its second visit: rounds from 0 on.
LAST_ROUND = {
    "session.before-save": 0,
    "session.after-save": 0,
    "session.after-commit": 1,
    "commit.begin": 0,
    "commit.after-protect": 0,
    "commit.before-transaction": 0,
    "commit.after-transaction": 1,
    "commit.before-answer": 1,
}
IN_AN_AGENT = ("stand-down.begin", "stand-down.after-kill")


@pytest.fixture
def stage(tmp_path: Path, flower_database: Path) -> Iterator[Stage]:
    """Give each of three replicas a disk."""
    with stage_in(tmp_path, flower_database) as made:
        yield made


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("session.", "commit.", "blob."))])
def test_killed_at_any_step_of_a_commit_the_head_is_the_old_or_the_new_one(stage: Stage, name: str) -> None:
    """The successor, which cannot reach the dead replica's disk, reads it, goes on from it, and repeats no round."""
    died = stage.start(0, rounds=ROUNDS, failpoint=f"{name}:kill:2")
    assert died.returncode == -signal.SIGKILL, died.stderr

    head, log, _, terms = stage.facts()
    last = -1 if head is None else head.position.server_round
    if name in LAST_ROUND:
        assert last == LAST_ROUND[name]
    assert log == list(range(1, last + 1))
    assert terms == 1

    went_on = stage.start(1, rounds=ROUNDS)
    assert went_on.returncode == 0, went_on.stderr
    head, log, _, terms = stage.facts()
    assert head is not None
    assert log == list(range(1, ROUNDS + 1))
    assert terms == 2
    loaded = load(head.position.digest, BlobStore(stage.folder / "replica-1" / "store"))
    assert np.array_equal(loaded.arrays["model"], model_after(ROUNDS))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("takeover.", "control."))])
def test_killed_at_any_step_of_a_takeover_the_next_one_takes_over_whole(stage: Stage, name: str) -> None:
    """What the leader before has committed is there, and a snapshot of the control plane is the old or the new one."""
    first = stage.start(1, rounds=2)
    assert first.returncode == 0, first.stderr
    _, _, control, _ = stage.facts()
    assert control is not None

    died = stage.start(2, rounds=ROUNDS, failpoint=f"{name}:kill", has_new_node=name.startswith("control."))
    assert died.returncode == -signal.SIGKILL, died.stderr
    head, log, found, terms = stage.facts()
    assert head is not None
    assert head.position.server_round == 2
    assert log == [1, 2]
    assert terms == 2
    assert found is not None
    assert found.serial == control.serial + (name == "control.after-transaction")
    assert linkstate.references(BlobStore(stage.folder / "replica-1" / "store").read(found.digest)) is not None

    went_on = stage.start(1, rounds=ROUNDS)
    assert went_on.returncode == 0, went_on.stderr
    _, log, _, terms = stage.facts()
    assert log == list(range(1, ROUNDS + 1))
    assert terms == 3


def test_each_failpoint_is_in_the_documentation_and_under_test() -> None:
    """What is listed exists, and what exists is listed."""
    rows = [line.split("`")[1] for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert tuple(rows) == NAMES


@pytest.mark.parametrize("text", ["nowhere:kill", "commit.begin", "commit.begin:hurt", "commit.begin:kill:0"])
def test_a_failpoint_that_does_not_exist_is_refused(text: str) -> None:
    """A typing error must not look like a test that passed."""
    with pytest.raises(ConfigError, match="FLWR_HA_FAILPOINT"):
        Failpoint.parse(text)
