"""Choose the coordinator of the demo: ZooKeeper where it can be had, else the embedded one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from flwr_ha.errors import ConfigError, HaError
from flwr_ha.local.zookeeper import LocalEnsemble, node_mode, require_zookeeper
from flwr_ha.settings import Endpoint, Settings

KINDS = ("auto", "zookeeper", "embedded")
DOCKER_ANSWER_S = 10.0
DOCKER_START_S = 240.0
READY_S = 60.0
TICK_MS = 200


class Source(Enum):
    """Say where the coordinator comes from."""

    RUNNING = "a ZooKeeper that runs already"
    INSTALLED = "an installed ZooKeeper"
    DOCKER = "ZooKeeper in Docker"
    EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Say which coordinator the demo uses.

    Attributes
    ----------
    source : Source
        Where it comes from.
    why : str
        The reason, for the first line of the demo.
    hosts : str
        Connect string of ZooKeeper; empty where it is started on free ports, or embedded.
    """

    source: Source
    why: str
    hosts: str = ""

    def __str__(self) -> str:
        name = "embedded" if self.source is Source.EMBEDDED else "ZooKeeper"
        return f"coordinator: {name}, since {self.why}"


def choose(wanted: str, settings: Settings, *, root: Path, home: Path | None) -> Choice:
    """Return the coordinator to use.

    Parameters
    ----------
    wanted : str
        ``zookeeper``, ``embedded`` or ``auto``: ZooKeeper if it can be had.
    settings : Settings
        Of the project; name the ports at which a ZooKeeper may run.
    root : Path
        Folder of the project, with ``zookeeper/compose.yaml``.
    home : Path or None
        Folder of an unpacked ZooKeeper release.

    Raises
    ------
    ConfigError
        ``zookeeper`` is wanted, but there is none; the message says how to get it.
    """
    if wanted not in KINDS:
        raise ConfigError(f"--coordinator {wanted} is none of {', '.join(KINDS)}")
    if wanted == "embedded":
        return Choice(source=Source.EMBEDDED, why="--coordinator embedded asks for it")
    hosts = "" if settings.is_embedded else settings.zookeeper_hosts
    if hosts and is_serving(hosts):
        return Choice(source=Source.RUNNING, why=f"one runs at {hosts}", hosts=hosts)
    missing = ""
    try:
        require_zookeeper(home)
        return Choice(source=Source.INSTALLED, why="it is installed on this machine: a local ensemble is started")
    except ConfigError as error:
        missing = str(error)
    if hosts and (root / "zookeeper" / "compose.yaml").is_file() and is_docker_up():
        return Choice(source=Source.DOCKER, why="Docker runs on this machine: zookeeper/compose.yaml", hosts=hosts)
    if wanted == "zookeeper":
        raise ConfigError(f"--coordinator zookeeper: {missing}, or start Docker")
    return Choice(source=Source.EMBEDDED, why="no ZooKeeper runs or is installed, and no Docker answers")


def is_serving(hosts: str) -> bool:
    """Whether a ZooKeeper on this machine serves at the hosts of a connect string."""
    endpoints = [Endpoint.parse(host, setting="coordinator") for host in hosts.split(",")]
    if not all(endpoint.is_loopback for endpoint in endpoints):
        return False  # a demo does not write to somebody's servers
    modes = [node_mode(endpoint.port) for endpoint in endpoints]
    return "leader" in modes or "standalone" in modes


def is_docker_up() -> bool:
    """Whether a Docker engine answers and knows compose."""
    if shutil.which("docker") is None:
        return False
    try:
        return all(
            subprocess.run(
                ["docker", *words], capture_output=True, timeout=DOCKER_ANSWER_S, check=False, start_new_session=True
            ).returncode
            == 0
            for words in (["info"], ["compose", "version"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def running(choice: Choice, *, root: Path, folder: Path, home: Path | None) -> Iterator[str]:
    """Have the coordinator run meanwhile, and give its connect string; empty where it is embedded.

    Raises
    ------
    HaError
        It does not start; the message says why.
    """
    match choice.source:
        case Source.EMBEDDED:
            yield ""
        case Source.RUNNING:
            yield choice.hosts
        case Source.INSTALLED:
            with LocalEnsemble(folder / "zookeeper", tick_time_ms=TICK_MS, home=home) as ensemble:
                ensemble.wait_ready(READY_S)
                yield ensemble.connect_string
        case Source.DOCKER:
            compose = ["docker", "compose", "-p", "flwr-ha-demo", "-f", str(root / "zookeeper" / "compose.yaml")]
            try:
                _docker([*compose, "up", "-d", "--wait"])
                yield choice.hosts
            finally:
                _docker([*compose, "down", "--volumes"])


def _docker(command: list[str]) -> None:
    """Run docker in a session of its own: Ctrl-C is for the demo, which then takes the containers down."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOCKER_START_S, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired as error:
        raise HaError(f"`{' '.join(command)}` did not end within {DOCKER_START_S:g} s") from error
    if done.returncode != 0:
        raise HaError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
