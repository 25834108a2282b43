"""Every command of the documents is run, in their order, against one real cluster, as a newcomer would."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import free_ports, require_zookeeper

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FIRST = ["docs/quickstart.md", "README.md", "docs/operations.md"]  # the quickstart builds what the others look at
FOLLOWED = ["docs/three-machines.md"]  # test_three_machines.py follows it, on three hosts
OTHERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*FIRST, *(name for name in OTHERS if name not in (*FIRST, *FOLLOWED))]
SUPERNODES = 5
ROUNDS = 2
ADDRESSES = [f"127.0.0.1:{port}" for port in (8000, 8010, 8011, 8012, 2181, 2182, 2183)]
SUPERNODE = 'flower-supernode --insecure --port 9094 --node-config "partition-id=0 num-partitions=5"'

# What cannot be run here, and why; it is parsed by its own tool at least.
NOT_RUN = {
    "make setup": "installs into .venv; `make test`, which runs this, begins with it",
    "make test": "runs this test",
    "make demo": "test_demo.py runs the program that it calls",
    "docker compose -f zookeeper/compose.yaml up -d --wait": "needs a Docker engine; test_deploy.py checks the file",
    "python3 -m venv /opt/flwr-ha && /opt/flwr-ha/bin/pip install '.[metrics]'": "test_installation.py does it",
    "useradd --system flwr-ha": "changes this machine's users",
    "install -d /etc/flwr-ha": "changes this machine's /etc",
    "install -m 600 -o flwr-ha secret /etc/flwr-ha/secret": "needs that user",
    "install -m 644 flwr-ha.toml /etc/flwr-ha/flwr-ha.toml": "needs that folder",
    "cp deploy/systemd/*.service /etc/systemd/system/ && systemctl enable --now flwr-ha-replica@0": "needs systemd",
}


def commands(document: str) -> list[str]:
    """Return the commands in a document's shell blocks, without their comments."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def all_commands() -> list[str]:
    """Return the commands of all documents, in the order in which they are run."""
    return [line for document in DOCUMENTS for line in commands(document)]


class Newcomer:
    """Has a clone of the project in which only ports and the number of rounds differ, and types what is written.

    Parameters
    ----------
    folder : Path
        For the clone and the home folder.
    """

    def __init__(self, folder: Path) -> None:
        self.clone, self.home = folder / "clone", folder / "home"
        (self.home / ".flwr").mkdir(parents=True)
        self.clone.mkdir()
        for name in ("server_app.py", "client_app.py", "task.py"):
            shutil.copy(ROOT / name, self.clone)
        (self.clone / ".venv").symlink_to(sys.prefix)
        here = [f"127.0.0.1:{port}" for port in free_ports(len(ADDRESSES))]
        self.address = here[0]
        self.substitutions = {
            **dict(zip(ADDRESSES, here, strict=True)),
            "num-server-rounds = 8": f"num-server-rounds = {ROUNDS}",
        }
        settings = self.adapted((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        (self.clone / "pyproject.toml").write_text(settings, encoding="utf-8")
        self.state: list[
            str
        ] = []  # commands that change the shell itself: they are repeated in front of each other one
        self.programs: dict[str, Program] = {}
        self.environment = {"HOME": str(self.home), "COLUMNS": "200"}

    def adapted(self, text: str) -> str:
        """Return text of a document with the ports of this test."""
        for written, here in self.substitutions.items():
            text = text.replace(written, here)
        return text

    def script(self, command: str) -> str:
        """Return what the shell is given for a command."""
        return "\n".join(["set -eo pipefail", *self.state, command])

    def type(self, command: str) -> str:
        """Run a command to its end, which must be a good one, and return its output."""
        done = subprocess.run(
            ["bash", "-c", self.script(command)],
            cwd=self.clone,
            env={**self._inherited(), **self.environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def open_terminal(self, name: str, command: str) -> Program:
        """Run a command that goes on, in a terminal of its own."""
        program = Program(
            name,
            ["bash", "-c", self.script(f"exec env {command}")],
            log_file=self.home / f"{name}.log",
            environment={**self.environment, "PYTHONUNBUFFERED": "1"},
            folder=self.clone,
        )
        self.programs[name] = program
        return program

    @staticmethod
    def _inherited() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "FLWR_HA_CONFIG")}

    def listed(self) -> str:
        """Return what ``flwr-ha list`` shows."""
        return self.type("flwr-ha list")

    def close(self) -> None:
        """End all programs."""
        for program in reversed(self.programs.values()):
            if program.is_alive:
                program.kill_tree()

    # What stands in prose between the commands, and commands that go on.

    def start_zookeeper(self, command: str) -> None:
        """Start it once; `docker compose` does the same."""
        program = self.open_terminal("zookeeper", command)
        wait_until(lambda: "Ctrl-C ends it" in program.log_text(), timeout_s=90.0, what="ZooKeeper", poll_s=0.1)

    def start_replicas(self, command: str) -> None:
        """Start all three: "then --id 1 and --id 2"."""
        for replica_id in range(3):
            if not self._is_running(f"replica-{replica_id}"):
                self.open_terminal(f"replica-{replica_id}", command.replace("--id 0", f"--id {replica_id}"))
        self._wait_listed(r"leader", what="a leader")

    def start_supernodes(self, command: str) -> None:
        """Start five: "`--port` and `partition-id` differ"; four are not enough."""
        for index, port in enumerate(free_ports(SUPERNODES)):
            if self._is_running(f"supernode-{index}"):
                continue
            if index == SUPERNODES - 1:
                self._wait_listed(rf"{SUPERNODES - 1} of {SUPERNODES} nodes online", what="four SuperNodes")
            here = command.replace("--insecure", f"--insecure --superlink {self.address}")
            here = here.replace("--port 9094", f"--port {port}").replace("partition-id=0", f"partition-id={index}")
            assert f"--port {port}" in here and f"partition-id={index}" in here
            self.open_terminal(f"supernode-{index}", here)

    def watch(self, command: str) -> None:
        """Look, and leave with Ctrl-C; the first time, in the quickstart, the leader is killed then."""
        is_first = "watch" not in self.programs
        (self.home / "watch.log").unlink(missing_ok=True)
        program = self.open_terminal("watch", command)
        wait_until(lambda: "leader" in program.log_text(), timeout_s=30.0, what="the table", poll_s=0.1)
        program.send(signal.SIGINT)
        assert program.wait(10.0) == 0
        if is_first:
            self._kill_the_leader()

    def _kill_the_leader(self) -> None:
        self._wait_listed(rf"\b1/{ROUNDS}\b", what="the first round")
        leader = self._leader()
        self.programs[f"replica-{leader}"].kill()
        wait_until(lambda: self._leader() not in (None, leader), timeout_s=30.0, what="another leader", poll_s=0.2)
        self.start_replicas("python server_app.py --id 0")

    def _leader(self) -> str | None:
        found = re.search(r"^\W*(\d)\W+leader", self.listed(), re.MULTILINE)
        return found and found[1]

    def switch_to(self, command: str) -> None:
        """Name a candidate that is a standby."""
        if self._leader() == "1":
            self.type("flwr-ha switchover")
        self._wait_listed(r"\b1\W+standby\W+running", what="replica 1 stands by")
        self.type(command)

    def start_failing_replica(self, command: str) -> None:
        """Start replica 0 with a failpoint instead of the one that runs."""
        assert self.programs["replica-0"].stop(timeout_s=30.0) == 0
        program = self.open_terminal("replica-0", command)
        wait_until(lambda: self._is_ready(program), timeout_s=60.0, what="replica 0", poll_s=0.2)

    def run_app(self, command: str) -> None:
        """Tell Flower's command line where the cluster is, as the document shows, and submit."""
        table = re.search(
            r"```toml\n(\[superlink\].*?)```", (ROOT / "docs/quickstart.md").read_text("utf-8"), re.DOTALL
        )
        assert table is not None
        (self.home / ".flwr" / "config.toml").write_text(self.adapted(table[1]), encoding="utf-8")
        self.type(command)

    def with_run(self, command: str) -> None:
        """Put the id of the newest run, which ``flwr-ha list`` shows, for RUN, once a round of it is committed."""
        newest = rf"\b(\d{{15,20}})\b.*\b[1-9]\d*/{ROUNDS}\b(?!.*\d{{15,20}})"
        self._wait_listed(f"(?s){newest}", what="a committed round of the newest run")
        found = re.search(newest, self.listed(), re.DOTALL)
        assert found is not None
        self.type(command.replace("RUN", found[1]))

    def _is_running(self, name: str) -> bool:
        return name in self.programs and self.programs[name].is_alive

    def _is_ready(self, program: Program) -> bool:
        assert program.is_alive, program.log_text()
        return re.search(r"^\W*0\W+(leader|standby)\W+running", self.listed(), re.MULTILINE) is not None

    def _wait_listed(self, pattern: str, *, what: str) -> None:
        def is_listed() -> bool:
            try:
                return re.search(pattern, self.listed()) is not None
            except AssertionError:  # while no replica answers
                return False

        wait_until(is_listed, timeout_s=300.0, what=what, poll_s=1.0)


# Commands that go on, or need something of the prose around them; any other is run as it stands.
STEPS: dict[str, Callable[[Newcomer, str], None]] = {
    "flwr-ha zookeeper": Newcomer.start_zookeeper,
    "python server_app.py --id 0": Newcomer.start_replicas,
    SUPERNODE: Newcomer.start_supernodes,
    "flwr-ha list --watch": Newcomer.watch,
    "flwr-ha switchover --candidate 1": Newcomer.switch_to,
    "flwr-ha checkpoint list RUN": Newcomer.with_run,
    "flwr-ha checkpoint export RUN --out model.safetensors": Newcomer.with_run,
    "flwr run . ha": Newcomer.run_app,
    "FLWR_HA_FAILPOINT=commit.after-protect:kill:2 flwr-ha replica --id 0": Newcomer.start_failing_replica,
}


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    """Give a clone and a home folder."""
    require_zookeeper()
    made = Newcomer(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_every_command_of_the_documents_works(newcomer: Newcomer) -> None:
    """From the set-up to the export; a command that fails fails the test, whoever adds it."""
    for command in all_commands():
        if command in NOT_RUN:
            continue
        if command in STEPS:
            STEPS[command](newcomer, command)
        else:
            newcomer.type(command)
            if command.startswith(("source ", "export ")):
                newcomer.state.append(command)
    assert (newcomer.clone / "model.safetensors").stat().st_size > 0
    ended = [name for name, program in newcomer.programs.items() if not program.is_alive]
    assert ended == ["watch"]


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_is_parsed(command: str) -> None:
    """Bash and make understand it, and the files that it names are there."""
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    if command.startswith("make "):
        subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)
    ours = [word for word in shlex.split(command) if word.startswith(("zookeeper/", "deploy/"))]
    assert all(list(ROOT.glob(word)) for word in ours)


def test_no_exception_outlives_its_command() -> None:
    """What is listed above stands in a document."""
    assert {*NOT_RUN, *STEPS} <= set(all_commands())
