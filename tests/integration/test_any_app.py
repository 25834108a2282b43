"""Apps as users write them, several at once, through the death of a leader: one cluster, one failover, many facts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.errors import HaError
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

APPS = Path(__file__).parents[1] / "apps"
ROUNDS = 3
WRAPPED = {"numpy_app": 1, "message_custom": 1, "message_fedadam": 0}  # and the round that is committed before the kill
TRAINING = ("classic", *WRAPPED)
ENDS = {"finished:completed": "finished", "finished:stopped": "stopped", "finished:failed": "failed"}


class Story:
    """What happened on the cluster: the runs by name, and what Flower said of them before and after the failover."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.runs: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}

    def states(self) -> dict[str, str]:
        """Return Flower's own words for the state of each run."""
        listed = json.loads(self.cluster.flwr("ls", "ha", "--format", "json"))["runs"]
        return {str(run["run-id"]): run["status"] for run in listed}

    def log(self, name: str) -> str:
        """Return what ``flwr log`` shows, without colours."""
        return re.sub(r"\x1b\[\d+m", "", self.cluster.flwr("log", self.runs[name], "ha", "--show"))

    def state(self, name: str) -> str:
        """Return the state of a run after the failover."""
        return ENDS.get(self.after[self.runs[name]], self.after[self.runs[name]])

    def wait_round(self, name: str, server_round: int, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait until a round of a run is committed."""
        return self.cluster.wait_run(
            self.runs[name],
            lambda run: run["server_round"] >= server_round,
            timeout_s=timeout_s,
            what=f"round {server_round} of {name}",
        )

    def wait_end(self, names: tuple[str, ...], timeout_s: float) -> None:
        """Wait until Flower says that all of these runs have ended."""
        waited = {self.runs[name] for name in names}

        def is_ended() -> bool:
            try:
                states = self.states()
            except HaError:
                return False  # no leader at this moment
            return all(states.get(run_id) in ENDS for run_id in waited)

        wait_until(is_ended, timeout_s=timeout_s, what=f"the end of {', '.join(names)}", poll_s=1.0)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Submit everything, let some runs end, kill the leader, wait for the rest."""
    folder = tmp_path_factory.mktemp("any-app")
    with LocalCluster(folder, Plan(is_embedded=True, supernodes=2)) as cluster:
        cluster.start()
        story = Story(cluster)
        story.runs["sleeper"] = cluster.submit(APPS / "sleeper", seconds=600.0)
        story.runs["raising"] = cluster.submit(APPS / "faulty", how="raise")
        story.runs["early"] = cluster.submit(APPS / "message_fedadam", num_server_rounds=1, learning_rate=0.5)
        cluster.flwr("stop", story.runs["sleeper"], "ha")
        story.wait_end(("sleeper", "raising", "early"), 240.0)
        hold = folder / "hold"
        hold.touch()
        story.runs["classic"] = cluster.submit(APPS / "classic", num_server_rounds=ROUNDS, min_nodes=2, hold=str(hold))
        for name in WRAPPED:
            story.runs[name] = cluster.submit(APPS / name, num_server_rounds=ROUNDS, min_nodes=2)
        story.before = story.states()
        wait_until(lambda: "[ROUND 1]" in story.log("classic"), timeout_s=240.0, what="classic training", poll_s=0.5)
        for name, server_round in WRAPPED.items():
            story.wait_round(name, server_round)
        leader = cluster.leader()
        assert leader is not None
        cluster.replicas[leader].kill_tree()
        hold.unlink()  # until now the classic app could not get beyond its round 1
        cluster.wait_leader(timeout_s=90.0, other_than=leader)
        cluster.start_replica(leader)
        story.wait_end(TRAINING, 480.0)
        story.after = story.states()
        yield story


def test_run_ids_survive(story: Story) -> None:
    """Every run that `flwr run` has acknowledged is listed under the same id after the failover."""
    assert set(story.after) == set(story.before) == set(story.runs.values())


def test_ends_survive(story: Story) -> None:
    """No takeover wakes a stopped, failed or finished run."""
    assert (story.state("sleeper"), story.state("raising"), story.state("early")) == ("stopped", "failed", "finished")
    for name in ("sleeper", "raising", "early"):
        assert re.search("leads in term [2-9]", story.log(name)) is None


@pytest.mark.parametrize("name", TRAINING)
def test_each_kind_of_app_finishes(story: Story, name: str) -> None:
    """Message API with FedAdam and with an own strategy, NumPyClient, and the classic `server_fn`: all survive."""
    assert story.state(name) == "finished"


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_app_goes_on_after_its_last_round(story: Story, name: str) -> None:
    """With `HighlyAvailable` no committed round is trained again, and the result holds all of them."""
    log = story.log(name)
    resumed = re.search(r"replica \d leads in term [2-9]: the ServerApp starts again after round (\d)", log)
    assert resumed is not None, log
    assert int(resumed[1]) >= WRAPPED[name]
    assert f"result rounds {list(range(1, ROUNDS + 1))}" in log


def test_own_strategy_keeps_its_state_and_config(story: Story) -> None:
    """A user's strategy class: its losses, its momentum and the config it changed in place are those of one life."""
    log = story.log("message_custom")
    assert "losses [1.0, 0.5, 0.333]" in log
    weight = velocity = 0.0
    for server_round in range(1, ROUNDS + 1):
        velocity = 0.5 * velocity + weight + 1.5 * 0.5 ** (server_round - 1)  # mean step of partitions 1 and 2
        weight = velocity
    assert f"weight {weight:.6f}" in log


def test_plain_app_starts_again_and_the_log_says_so(story: Story) -> None:
    """An app that knows nothing of flwr_ha runs again from its round 1, under the same run id."""
    log = story.log("classic")
    first, second = re.split(r"leads in term [2-9]: no round of this run is committed", log, maxsplit=1)
    assert "[ROUND 1]" in first, "the log up to the takeover survives"
    assert "the ServerApp starts from its round 1" in second
    assert second.count(f"[ROUND {ROUNDS}]") == 1
    assert log.count("server_fn was called") == 2


def test_log_of_a_wrapped_app_survives(story: Story) -> None:
    """What a run logged before the takeover is there after it."""
    first, _ = re.split("leads in term [2-9]", story.log("message_custom"), maxsplit=1)
    assert "round 1 has learning rate 1" in first


def test_exception_fails_the_run_with_its_traceback(story: Story) -> None:
    """An error in user code is no reason to start the app again: the run fails as in plain Flower."""
    log = story.log("raising")
    assert "RuntimeError: the user's code has a bug in line 42" in log
    assert "Traceback" in log
    assert "it starts again" not in log
