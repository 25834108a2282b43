"""``make demo``, as a user runs it: in the project's folder, until its end or Ctrl-C."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flwr_ha.local.processes import wait_until

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "server_app.py", "client_app.py", "task.py")

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


class Demo:
    """Run the demo in a folder of its own; all processes that it starts carry a mark."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        for name in FILES:
            shutil.copy(ROOT / name, folder)
        self.mark = f"FLWR_HA_TEST_MARK={secrets.token_hex(8)}"
        self._output = folder / "output"
        name, _, value = self.mark.partition("=")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flwr_ha", "demo", *arguments],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, name: value},
                start_new_session=True,
            )

    def output(self) -> str:
        """Return what it has printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def left(self) -> list[str]:
        """Return the command lines of the processes that carry the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has ended meanwhile
        return found

    def close(self) -> None:
        """Kill what a failed test leaves."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.mark.parametrize(("coordinator", "rounds"), [("embedded", 2), pytest.param("auto", 3, marks=pytest.mark.long)])
def test_demo_survives_the_kill_and_reports_it(tmp_path, coordinator, rounds):
    """The leader is killed in the middle; all rounds are there at the end, and no process is left."""
    demo = Demo(tmp_path, "--rounds", str(rounds), "--kill", "1", "--coordinator", coordinator, "--json")
    try:
        status = demo.process.wait(800)
        output = demo.output()
        assert status == 0, output
        assert output.startswith("coordinator: ")
        assert "kill -9 of replica" in output
        assert f"round {rounds}/{rounds} is committed: accuracy" in output
        report = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
        assert report["rounds"].startswith(f"{rounds} of {rounds}")
        assert report["rounds lost"] == "0"
        assert report["trainings repeated"].startswith("0 of")
        assert float(report["seconds without training, kill 1"].split()[0]) > 0
        told = json.loads(output[output.rindex("\n{\n") :])  # standard output, behind what went to standard error
        assert report["model digest"] == told["model_digest"]
        assert (told["server_round"], told["rounds_lost"], told["trainings"]["repeated"]) == (rounds, [], 0)
        assert demo.left() == []
    finally:
        demo.close()


@pytest.mark.parametrize(
    ("moment", "number"), [("replicas start", signal.SIGTERM), ("round 1: training", signal.SIGINT)]
)
def test_demo_that_is_interrupted_leaves_no_process(tmp_path, moment, number):
    """Ctrl-C ends everything, while it starts and in the middle of a round."""
    demo = Demo(tmp_path, "--rounds", "3", "--kill", "1", "--coordinator", "embedded")
    try:
        wait_until(lambda: moment in demo.output(), timeout_s=200.0, what=moment)
        demo.process.send_signal(number)
        assert demo.process.wait(60) == 130, demo.output()
        assert "interrupted" in demo.output()
        assert demo.left() == []
    finally:
        demo.close()


def test_demo_outside_of_the_project_says_what_it_needs(tmp_path):
    """It runs the example, which is not part of the package."""
    done = subprocess.run(
        [sys.executable, "-m", "flwr_ha", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "server_app.py" in done.stderr
    assert done.stderr.count("\n") == 1
