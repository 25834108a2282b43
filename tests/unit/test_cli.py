"""The command line, with a cluster that is a fake."""

import json
import logging
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer

from flwr_ha import cli, console
from flwr_ha.errors import CoordinationError
from flwr_ha.operator import RequestRefusedError

CONFIG = """
cluster = "c"
coordinator = "embedded:coordinator"
[[replicas]]
id = 0
address = "127.0.0.1:8000"
api = "127.0.0.1:8010"
"""


class FakeOperator:
    """A cluster of one replica that does what it is asked at once."""

    def __init__(self, settings: object) -> None:
        self.posts = POSTS
        self.state = STATE

    def get(self, path: str) -> Any:
        if STATE.get("down"):
            raise CoordinationError("no replica of cluster 'c' answers")
        if path == "/history":
            return [{"term": 1, "leader": 0, "at": "2026-11-24T03:00:00Z", "reason": "first"}]
        replica = {"id": 0, "role": "leader", "state": "running", "address": "a:1", "api": "a:2", "lag_rounds": 0}
        return {
            "cluster": "c",
            "term": STATE.get("term", 1),
            "leader": 0,
            "paused": STATE.get("paused", False),
            "replicas": [replica],
            "runs": [],
        }

    def post(self, path: str, body: dict[str, Any]) -> Any:
        POSTS.append((path, body))
        if path == "/switchover" and body["candidate"] == 9:
            raise RequestRefusedError("replica 9 is not a healthy standby")
        if path == "/switchover":
            STATE["term"] = 2
        else:
            STATE["paused"] = path == "/pause"
        return {}


POSTS: list[tuple[str, dict[str, Any]]] = []
STATE: dict[str, Any] = {}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs ``flwr-ha`` and returns exit status, output and complaints."""
    POSTS.clear()
    STATE.clear()
    monkeypatch.setattr(cli, "Operator", FakeOperator)
    monkeypatch.setenv("COLUMNS", "160")
    config = tmp_path / "c.toml"
    config.write_text(CONFIG)

    def run_it(*arguments: str, config: Path = config) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flwr-ha", *arguments, "--config", str(config)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return run_it


def test_list_shows_replicas_as_a_table_and_as_json(run):
    """People get a table, programs get what the replicas answer."""
    status, out, _ = run("list")
    assert status == 0
    assert "leader" in out

    status, out, _ = run("list", "--json")
    assert status == 0
    assert json.loads(out)["replicas"][0]["id"] == 0


def test_pause_is_shown_in_the_table_until_resume(run):
    """A paused cluster says so."""
    assert run("pause")[0] == 0
    assert "failover is paused" in run("list")[1]
    assert json.loads(run("resume", "--json")[1]) == {"paused": False}
    assert "failover is paused" not in run("list")[1]
    assert [path for path, _ in POSTS] == ["/pause", "/resume"]


def test_history_names_the_reason(run):
    """Each leadership change is a row."""
    status, out, _ = run("history")
    assert status == 0
    assert "first" in out


def test_switchover_waits_for_the_new_term(run):
    """It says who leads now."""
    status, out, _ = run("switchover", "--candidate", "0")
    assert status == 0
    assert out.strip() == "replica 0 leads in term 2"


def test_switchover_that_another_replica_has_won_is_status_1(run):
    """The leadership changed, but not to the one that was asked for: a script must not go on."""
    status, out, err = run("switchover", "--candidate", "1", "--json")
    assert status == 1
    assert out == ""
    assert err.strip() == "flwr-ha: replica 0 leads in term 2, not replica 1: `flwr-ha history`"


def test_switchover_that_the_old_leader_has_won_is_status_1(run):
    """Whoever asks for any standby wants the old leader not to lead."""
    status, out, err = run("switchover")
    assert status == 1
    assert out == ""
    assert err.strip() == "flwr-ha: replica 0 leads again in term 2: `flwr-ha history`"


def test_refused_switchover_is_one_sentence_and_status_1(run):
    """The cluster's own reason reaches the user."""
    status, out, err = run("switchover", "--candidate", "9")
    assert status == 1
    assert out == ""
    assert err.strip() == "flwr-ha: replica 9 is not a healthy standby"


def test_cluster_that_does_not_answer_is_status_1(run):
    """Nothing is wrong with the command, but it failed."""
    STATE["down"] = True
    status, _, err = run("list")
    assert status == 1
    assert err.count("\n") == 1


def test_certificates_are_made_that_the_settings_name_already(run, tmp_path):
    """Otherwise settings that are complete could not be used to make what they name."""
    tls = "".join(f'{name} = "tls/{file}"\n' for name, file in {"ca": "ca.crt", "cert": "server.crt"}.items())
    (tmp_path / "tls.toml").write_text(f'{CONFIG}\n[tls]\n{tls}key = "tls/server.key"\n')
    assert run("list", config=tmp_path / "tls.toml")[0] == 2

    assert run("certs", str(tmp_path / "tls"), config=tmp_path / "tls.toml")[0] == 0
    assert run("list", config=tmp_path / "tls.toml")[0] == 0


def test_missing_settings_file_is_status_2(run, tmp_path):
    """The file is named."""
    status, _, err = run("list", config=tmp_path / "absent.toml")
    assert status == 2
    assert "absent.toml" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("checkpoint", "export", "12"), "--out FILE.safetensors"),
        (("checkpoint", "export", "12", "--out", "/no/such/folder/x"), "/no/such/folder"),
        (("checkpoint", "list", "../12"), "is not a run id"),
        (("zookeeper",), "no ZooKeeper is needed"),
        (("replica", "--id", "7"), "--id 7"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(run, arguments, words):
    """No traceback, and what to change is named."""
    status, _, err = run(*arguments)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


def test_unknown_option_is_status_2(run):
    """The parser's own errors have the same status."""
    assert run("list", "--nonsense")[0] == 2


def test_watch_goes_on_while_the_cluster_is_away_and_ends_well_with_ctrl_c(monkeypatch, capsys):
    """A cluster that does not answer may come back; Ctrl-C is the way to end it, not a failure."""
    answers = iter([{"n": 1}, CoordinationError("away"), {"n": 2}])

    def make() -> Any:
        answer = next(answers, None)
        if answer is None:
            raise KeyboardInterrupt
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(console, "WATCH_EVERY_S", 0.0)
    console.show(make, str, as_json=True, watch=True)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"n": 1}, {"error": "away"}, {"n": 2}]


def every_command() -> list[str]:
    """Return the words of each command, those of groups included."""
    found = []
    for name, command in typer.main.get_command(cli.app).commands.items():
        found += [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]
    return found


@pytest.mark.parametrize("command", every_command())
def test_help_of_each_command_has_an_example(command, monkeypatch, capsys):
    """A user who asks for help can copy a line."""
    monkeypatch.setattr(sys, "argv", ["flwr-ha", *command.split(), "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out = capsys.readouterr().out
    assert f"Example: flwr-ha {command}" in out
    assert {"--config", "--json"} <= set(out.split())


def test_certificates_are_listed_for_programs(run, tmp_path):
    """The text for people holds lines to copy, which a script does not want."""
    status, out, _ = run("certs", str(tmp_path / "certs"), "--json")
    assert status == 0
    assert {Path(path).name for path in json.loads(out)} >= {"ca.crt", "server.crt", "server.key"}


def test_log_for_programs_is_one_json_object_a_line():
    """Line breaks and tracebacks stay within an entry."""
    stream = StringIO()
    logger = logging.Logger("flwr_ha.test")
    logger.addHandler(console.log_handler(stream, as_json=True))
    logger.warning("two\n%s", "lines")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")

    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("WARNING", "flwr_ha.test", "two\nlines")
    assert datetime.fromisoformat(first["at"]).utcoffset() == timedelta(0)
    assert "ValueError: why" in second["traceback"]
