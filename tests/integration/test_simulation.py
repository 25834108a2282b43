"""Outside of replicas: a plain SuperLink or Flower's simulation runtime, and checkpoints in a local folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_ha import HighlyAvailable
from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import free_ports
from flwr_ha.serverapp.testing import FakeClock, FakeGrid, FakeNode, some_nodes

pytestmark = pytest.mark.processes

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
BIN = Path(sys.executable).parent
ROUNDS = 4


class World:
    """A plain SuperLink and two SuperNodes, none of which knows an earlier world."""

    run_options: tuple[str, ...] = ()

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self.calls = folder / "calls"
        self.programs: list[Program] = []
        (self.port, *self.node_ports) = free_ports(3)
        self.environment = {
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "FLWR_HA_REPLAY_DIR": str(folder / "replay"),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self) -> None:
        (self.folder / "home").mkdir(parents=True)
        lines = ["[superlink]", 'default = "here"', "[superlink.here]", f'address = "127.0.0.1:{self.port}"']
        (self.folder / "home" / "config.toml").write_text("\n".join([*lines, "insecure = true", ""]), encoding="utf-8")
        self._start_servers()
        self.flwr("list")  # retries until the SuperLink answers

    def _start_superlink(self, *arguments: str) -> None:
        database = str(self.folder / "state.db")
        self._run("superlink", "--host", "127.0.0.1", "--port", str(self.port), "--database", database, *arguments)

    def _start_servers(self) -> None:
        self._start_superlink()
        for index, port in enumerate(self.node_ports):
            node_config = f'partition-id={index} calls="{self.calls}"'
            address = f"127.0.0.1:{self.port}"
            self._run("supernode", "--superlink", address, "--port", str(port), "--node-config", node_config)

    def _run(self, name: str, *arguments: str) -> None:
        log_file = self.folder / f"{name}-{len(self.programs)}.log"
        command = [str(BIN / f"flower-{name}"), "--insecure", *arguments]
        program = Program(name, command, log_file=log_file, environment=self.environment, folder=self.folder)
        self.programs.append(program)

    def stop(self) -> None:
        for program in self.programs:
            if program.is_alive:
                program.kill_tree()

    def flwr(self, *arguments: str) -> str:
        command, environment = [str(BIN / "flwr"), *arguments], {**os.environ, **self.environment}

        def succeeds() -> str | None:
            done = subprocess.run(
                command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False
            )
            return done.stdout + done.stderr if done.returncode == 0 else None

        return wait_until(succeeds, timeout_s=300, what=f"flwr {arguments[0]}")

    def train(self, *, step_s: float, is_streamed: bool) -> str:
        config = {"num-server-rounds": ROUNDS, "strategy": "fedadam", "step-s": step_s}
        config["checkpoint-dir"] = str(self.checkpoints)
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        options = [*self.run_options, *(["--stream"] if is_streamed else [])]
        return self.flwr("run", str(APP), "--run-config", pairs, *options)

    def trained(self) -> list[str]:
        files = sorted(self.calls.glob("partition-*")) if self.calls.exists() else []
        return [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "train" in line]

    def committed_round(self) -> int:
        heads = list(self.checkpoints.rglob("heads.json"))
        return json.loads(heads[0].read_text(encoding="utf-8"))["heads"][-1]["server_round"] if heads else -1


class Simulation(World):
    """Flower's simulation runtime with two virtual SuperNodes in ray; what ``flwr run . local`` starts by itself."""

    run_options = ("--federation-config", "num-supernodes=2 init-args-num-cpus=2")

    def _start_servers(self) -> None:
        self._ray = tempfile.TemporaryDirectory(prefix="ray-")  # pytest's folder is too long for ray's sockets
        self.environment |= {"RAY_TMPDIR": self._ray.name, "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment["FLWR_HA_TEST_CALLS"] = str(self.calls)
        self._start_superlink("--simulation")

    def stop(self) -> None:
        super().stop()
        self._ray.cleanup()


@contextmanager
def running(world: World) -> Iterator[World]:
    try:
        world.start()
        yield world
    finally:
        world.stop()


def digest(log: str) -> str:
    """Return the digest that the ServerApp logs at its end."""
    assert f"result rounds {list(range(1, ROUNDS + 1))}" in log
    return next(line.split("result digest ")[1] for line in log.splitlines() if "result digest " in line).strip()


class AppGrid(FakeGrid):
    """Runs the app's own ClientApp in this process."""

    def __init__(self, clock: FakeClock, client_app: ClientApp, config: dict[str, object]) -> None:
        super().__init__(clock, some_nodes(2))
        self._client_app = client_app
        self._config = config

    def _answer(self, node: FakeNode, sent: Message) -> list[Message]:
        node_config = {"partition-id": node.partition}
        context = Context(self.run.run_id, sent.metadata.dst_node_id, node_config, RecordDict(), self._config)
        return [self._client_app(sent, context)]


def load(name: str) -> ModuleType:
    """Import a module of the app."""
    spec = importlib.util.spec_from_file_location(f"numpy_app_{name}", APP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def never_stopped(monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Return the digest of the same training in one go: no process, no checkpoint, no fault."""
    clock = FakeClock()
    monkeypatch.setattr(HighlyAvailable, "clock", clock)
    monkeypatch.setenv("FLWR_HA_REPLAY_DIR", str(folder))
    caplog.set_level("INFO", "flwr.ha")
    defaults = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    config = {**defaults, "num-server-rounds": ROUNDS, "strategy": "fedadam"}
    context = Context(7, 1, {}, RecordDict(), config)
    load("server_app").app(AppGrid(clock, load("client_app").app, config), context)
    return digest(caplog.text)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [World, Simulation])
def test_killed_and_run_again_goes_on_and_gives_the_same_model(tmp_path, monkeypatch, caplog, world):
    """Everything is killed in the middle; new processes with new ids finish, bit for bit the same."""
    checkpoints = tmp_path / "checkpoints"
    with running(world(tmp_path / "one", checkpoints)) as one:
        one.train(step_s=1.0, is_streamed=False)
        wait_until(lambda: one.committed_round() >= 1 or None, timeout_s=300, what="the first commit")
    done = one.committed_round()
    assert done < ROUNDS
    with running(world(tmp_path / "two", checkpoints)) as two:
        resumed = digest(two.train(step_s=0.0, is_streamed=True))
        assert two.trained() == [f"train {r}" for _ in range(2) for r in range(done + 1, ROUNDS + 1)]
    assert never_stopped(monkeypatch, tmp_path / "replay", caplog) == resumed
