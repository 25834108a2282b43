"""The demo's decisions and figures, without processes."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flwr_ha.config import parse_settings
from flwr_ha.demo import coordinators
from flwr_ha.demo.coordinators import Source, choose
from flwr_ha.demo.report import Kill, Trainings, count_trainings, lost_rounds, problems, report, report_table
from flwr_ha.demo.screen import Screen, changes, picture, state_line
from flwr_ha.demo.story import kill_rounds
from flwr_ha.errors import ConfigError
from flwr_ha.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return the settings of a project with three ZooKeeper nodes."""
    replica = {"id": 0, "address": "127.0.0.1:8000", "api": "127.0.0.1:8010"}
    hosts = "zookeeper://127.0.0.1:2181,127.0.0.1:2182,127.0.0.1:2183"
    return parse_settings({"cluster": "c", "coordinator": hosts, "replicas": [replica]}, folder=tmp_path)


def have(monkeypatch: pytest.MonkeyPatch, *, is_running: bool, is_installed: bool, is_docker: bool) -> None:
    """Pretend what can be had on this machine."""

    def require(home: Path | None) -> str:
        if not is_installed:
            raise ConfigError("ZooKeeper was not found on this machine")
        return "jar"

    monkeypatch.setattr(coordinators, "is_serving", lambda hosts: is_running)
    monkeypatch.setattr(coordinators, "require_zookeeper", require)
    monkeypatch.setattr(coordinators, "is_docker_up", lambda: is_docker)


@pytest.mark.parametrize(
    ("is_running", "is_installed", "is_docker", "source"),
    [
        (True, True, True, Source.RUNNING),
        (False, True, True, Source.INSTALLED),
        (False, False, True, Source.DOCKER),
        (False, False, False, Source.EMBEDDED),
    ],
)
def test_auto_takes_the_first_zookeeper_that_can_be_had(  # noqa: PLR0917
    monkeypatch, settings, tmp_path, is_running, is_installed, is_docker, source
):
    """Running before installed before Docker before embedded, and the reason is said."""
    (tmp_path / "zookeeper").mkdir()
    (tmp_path / "zookeeper" / "compose.yaml").touch()
    have(monkeypatch, is_running=is_running, is_installed=is_installed, is_docker=is_docker)
    choice = choose("auto", settings, root=tmp_path, home=None)
    assert choice.source is source
    assert str(choice).startswith("coordinator: ")
    assert choice.why in str(choice)


def test_zookeeper_that_cannot_be_had_is_refused(monkeypatch, settings, tmp_path):
    """Who asks for ZooKeeper does not get something else."""
    have(monkeypatch, is_running=False, is_installed=False, is_docker=False)
    with pytest.raises(ConfigError, match="--coordinator zookeeper: ZooKeeper was not found"):
        choose("zookeeper", settings, root=tmp_path, home=None)


def test_zookeeper_of_other_machines_is_left_alone():
    """A demo does not write to somebody's servers."""
    assert not coordinators.is_serving("zk.example:2181")


@pytest.mark.parametrize(
    ("rounds", "kills", "expected"),
    [(8, 0, ()), (8, 1, (5,)), (8, 2, (3, 7)), (3, 1, (2,)), (1, 1, (1,)), (8, 8, (1, 2, 3, 4, 5, 6, 7, 8))],
)
def test_kills_are_spread_over_the_run(rounds, kills, expected):
    """Each in a round of its own."""
    assert kill_rounds(rounds, kills) == expected


@pytest.mark.parametrize(("rounds", "kills", "name"), [(0, 0, "--rounds"), (3, 4, "--kill"), (3, -1, "--kill")])
def test_impossible_numbers_are_refused(rounds, kills, name):
    """The option is named."""
    with pytest.raises(ConfigError, match=name):
        kill_rounds(rounds, kills)


def cluster(*, term: int = 1, leader: int | None = 0, **run) -> dict:
    """Return an answer of ``GET /cluster``."""
    replica = {"id": 0, "role": "leader", "state": "running", "address": "a", "api": "b", "lag_rounds": 0}
    runs = [{**RUN, **run}] if run else []
    return {"cluster": "c", "term": term, "leader": leader, "paused": False, "replicas": [replica], "runs": runs}


RUN = {
    "run_id": "12",
    "app": "a/b",
    "state": "training",
    "reason": "0 of 5 replies",
    "server_round": 3,
    "num_rounds": 8,
    "nodes_online": 5,
    "min_nodes": 5,
    "checkpoint": {"digest": "d3", "model_digest": "m3", "copies": [0, 1]},
    "metrics": {"3": {"accuracy": 0.9}},
}


def test_only_what_changed_becomes_a_line():
    """A log on a pipe stays short."""
    before = cluster(server_round=3)
    assert changes(before, before) == []
    assert changes(before, cluster(server_round=3, reason="1 of 5 replies")) == []
    (line,) = changes(before, cluster(server_round=4, metrics={"4": {"accuracy": 0.95}}))
    assert line[0] == "round 4/8 is committed: accuracy 0.95"
    (line,) = changes(before, cluster(term=2, leader=0, server_round=3))
    assert line[0] == "replica 0 leads (term 2)"


def test_waiting_says_why():
    """The reason stands in the line, once."""
    run = {**RUN, "state": "waiting", "nodes_online": 4, "reason": "4 of 5 nodes online"}
    assert state_line(run) == "round 4: waiting, 4 of 5 nodes online"


def test_picture_can_be_drawn_with_and_without_a_cluster():
    """The live picture shows leader, round and note."""
    console = Console(record=True, width=150, force_terminal=False)
    console.print(picture(cluster(server_round=3), "round 4 is in training"))
    console.print(picture(None, "no replica answers"))
    text = console.export_text()
    assert "3/8" in text
    assert "leader" in text
    assert "no replica answers" in text


def test_terminal_keeps_the_lines_and_redraws_the_picture():
    """Lines stay above the live picture; on a pipe there is no picture and no escape sequence."""
    terminal, pipe = StringIO(), StringIO()
    for output, is_terminal in ((terminal, True), (pipe, False)):
        with Screen(Console(file=output, force_terminal=is_terminal, width=150)) as screen:
            screen.draw(cluster(server_round=3), "round 4 is in training")
            screen.say("kill -9 of replica 0")
    assert "kill -9 of replica 0" in terminal.getvalue()
    assert "round 4 is in training" in terminal.getvalue()
    assert "kill -9 of replica 0" in pipe.getvalue()
    assert "round 4" not in pipe.getvalue()
    assert "\x1b" not in pipe.getvalue()


def kill(server_round: int = 4, digest: str = "d3") -> Kill:
    """Return the kill of replica 0 in the middle of a round."""
    return Kill(
        replica_id=0, term=1, server_round=server_round, digest=digest, at_s=10.0, served_s=14.5, trained_s=17.25
    )


def commits(*rounds: int) -> list[dict]:
    """Return a commit log."""
    return [{"server_round": number, "digest": f"d{number}"} for number in rounds]


FINISHED = {**RUN, "state": "finished", "server_round": 8, "reason": "", "metrics": {"8": {"accuracy": 0.97}}}


def test_committed_round_with_another_digest_is_lost():
    """The round that was committed before the kill must be the very one in the log."""
    assert lost_rounds(commits(1, 2, 3, 4), [kill()]) == ()
    assert lost_rounds(commits(1, 2, 3, 4), [kill(digest="other")]) == (3,)
    assert lost_rounds(commits(1, 2), [kill()]) == (3,)


@pytest.mark.parametrize(
    ("run", "log", "words"),
    [
        ({**FINISHED, "state": "failed", "reason": "why"}, commits(*range(1, 9)), "the run is failed: why"),
        (FINISHED, commits(1, 2, 3, 3, 4, 5, 6, 7, 8), "each once"),
        (FINISHED, commits(*range(1, 8)), "not 1 to 8"),
    ],
)
def test_broken_promise_is_a_problem(run, log, words):
    """The demo fails when a round is missing or there twice."""
    assert any(words in problem for problem in problems(run, log, [kill()]))
    assert problems(FINISHED, commits(*range(1, 9)), [kill()]) == []


def test_report_holds_the_figures():
    """Rounds, accuracy, the pause of each kill, nothing lost."""
    console = Console(record=True, width=120, force_terminal=False)
    trainings = Trainings(real=41, replayed=3, needed=40)
    told = report(FINISHED, commits(*range(1, 9)), [kill()], trainings, elapsed_s=123.4)
    console.print(report_table(told))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    values = {row[0]: row[1] for row in rows if len(row) == 2}
    assert values["accuracy on held-out digits"] == "0.9700"
    assert values["seconds without training, kill 1"].startswith("7.2 (replica 0 in round 4")
    assert values["rounds lost"] == "0"
    assert values["trainings repeated"].startswith("1 of 40")
    assert json.loads(json.dumps(told))["kills"] == [
        {"replica": 0, "server_round": 4, "seconds_without_leader": 4.5, "seconds_without_training": 7.25}
    ]


LOG = """
INFO :      Receiving: train message (ID: 1)
INFO :      Received successfully
INFO :      Receiving: evaluate message (ID: 2)
INFO :      Received successfully
INFO :      Receiving: train message (ID: 3)
INFO :      Receiving: train message (ID: 4)
INFO :      Received successfully
INFO :      train of round 2: answered from the cache, nothing is computed again
"""


def test_trainings_are_counted_in_the_supernodes_logs():
    """A request whose content did not arrive is no training; one answered from the cache neither."""
    assert count_trainings([LOG, LOG], rounds=1) == Trainings(real=2, replayed=2, needed=2)


INTERRUPTED_ALL_THE_TIME = """
import os, signal, threading
from flwr_ha.demo.main import _signals

def interrupt():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 3000:
        os.kill(os.getpid(), number)

with _signals() as is_interrupted:
    assert not is_interrupted()
    thread = threading.Thread(target=interrupt)
    thread.start()
    while thread.is_alive():
        is_interrupted()
    assert is_interrupted()
print("went on")
"""


def test_signal_comes_through_whatever_the_demo_does():
    """A handler runs in the middle of the main thread's work, of its own look at the signals and of another handler."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_ALL_THE_TIME], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr
