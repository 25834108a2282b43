"""A whole cluster on this machine: coordinator, replicas, SuperNodes; for the demo, tests and benchmarks."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import httpx

from flwr_ha.config import load_settings
from flwr_ha.errors import HaError
from flwr_ha.local.processes import Program, WaitTimeoutError, wait_until
from flwr_ha.local.zookeeper import LocalEnsemble, free_ports
from flwr_ha.settings import Settings
from flwr_ha.tls import peer_context

SUPERLINK, SUPEREXEC, SERVERAPP = "flwr_ha.superlink.child", "flwr_ha.superlink.superexec", "flwr-serverapp"
REPLICA_TIMEOUT_S = 60.0
_PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say what a local cluster consists of.

    Attributes
    ----------
    replicas : int
        Number of replicas.
    supernodes : int
        Number of SuperNodes that `LocalCluster.start` starts.
    is_embedded : bool
        Whether the coordinator is a folder instead of a ZooKeeper ensemble.
    zookeeper : str
        Connect string of a running ensemble; empty: one is started.
    session_timeout_s : float
        Of the coordinator sessions, in seconds.
    tick_time_ms : int
        Of an ensemble that is started.
    app : Path or None
        Folder whose ``server_app.py`` runs the replicas; None: ``flwr-ha replica``.
    settings : mapping
        Further keys of ``[tool.flwr-ha]``; a mapping as value is a table.
    certificates : Path or None
        Folder with what ``flwr-ha certs`` writes: everything speaks TLS.
    environment : mapping
        Added to the environment of every process.
    """

    replicas: int = 3
    supernodes: int = 5
    is_embedded: bool = False
    zookeeper: str = ""
    session_timeout_s: float = 2.0
    tick_time_ms: int = 200
    app: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    certificates: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class LocalCluster:
    """Run a cluster below one folder; a context manager that leaves no process behind.

    Parameters
    ----------
    folder : Path
        Data, logs and settings of everything.
    plan : Plan
        What it consists of.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder.absolute()
        self.plan = plan
        self.ensemble: LocalEnsemble | None = None
        self.replicas: dict[int, Program] = {}
        self.supernodes: dict[int, Program] = {}
        self.config = self.folder / "flwr-ha.toml"
        self._ports = free_ports(1 + plan.replicas)
        self._bin = Path(sys.executable).parent
        self.environment = {
            "PATH": f"{self._bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(self.folder / "flwr-home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_HA_CONFIG": str(self.config),
            "FLWR_HA_REPLAY_DIR": str(self.folder / "replay"),
            "PYTHONUNBUFFERED": "1",
            **plan.environment,
        }

    def __enter__(self) -> LocalCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in [*self.supernodes.values(), *self.replicas.values()]:
            if program.is_alive:
                program.thaw()
                program.kill_tree()
        if self.ensemble is not None:
            self.ensemble.stop()

    @property
    def address(self) -> str:
        """Public address of the SuperLink, the same for all replicas."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def supernode_address(self) -> str:
        """What SuperNodes are told to connect to."""
        return self.address

    @property
    def settings(self) -> Settings:
        """The settings of the cluster, read from its file."""
        return load_settings(self.config)

    def start(self) -> None:
        """Start everything, and wait until a replica leads and all SuperNodes run."""
        self.start_coordinator()
        for replica_id in range(self.plan.replicas):
            self.start_replica(replica_id)
        self.wait_leader(timeout_s=REPLICA_TIMEOUT_S)
        for index in range(self.plan.supernodes):
            self.start_supernode(index)

    def start_coordinator(self) -> None:
        """Start the ensemble, where there is none, and write the settings file and Flower's connection."""
        plan = self.plan
        coordinator = f"embedded:{self.folder / 'coordinator'}"
        if not plan.is_embedded:
            hosts = plan.zookeeper or self._start_ensemble()
            coordinator = f"zookeeper://{hosts}"
        table = {
            "cluster": "local",
            "coordinator": coordinator,
            "session-timeout": plan.session_timeout_s,
            "data-dir": str(self.folder / "data"),
            **plan.settings,
        }
        if plan.certificates is not None:
            files = {"ca": "ca.crt", "cert": "server.crt", "key": "server.key"}
            table["tls"] = {key: str(plan.certificates.absolute() / name) for key, name in files.items()}
        lines = _toml(table)
        for replica_id in range(plan.replicas):
            lines += ["[[replicas]]", f"id = {replica_id}", f'address = "{self.address}"']
            lines += [f'api = "127.0.0.1:{self._ports[1 + replica_id]}"']
        self.config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        home = self.folder / "flwr-home"
        home.mkdir(exist_ok=True)
        connection = f'[superlink]\ndefault = "ha"\n[superlink.ha]\naddress = "{self.address}"\n'
        trust = f"root-certificates = {json.dumps(self._authority)}\n" if self._authority else "insecure = true\n"
        (home / "config.toml").write_text(connection + trust, encoding="utf-8")

    @property
    def _authority(self) -> str:
        folder = self.plan.certificates
        return "" if folder is None else str(folder.absolute() / "ca.crt")

    def _start_ensemble(self) -> str:
        self.ensemble = LocalEnsemble(self.folder / "zookeeper", tick_time_ms=self.plan.tick_time_ms)
        self.ensemble.start()
        self.ensemble.wait_ready(30.0)
        return self.ensemble.connect_string

    def start_replica(
        self, replica_id: int, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Program:
        """Start one replica; `environment` is added to that of the cluster."""
        app = self.plan.app
        command = [sys.executable, str(app / "server_app.py")] if app else [sys.executable, "-m", "flwr_ha", "replica"]
        program = Program(
            f"replica {replica_id}",
            [*command, "--id", str(replica_id), *arguments],
            log_file=self.folder / "logs" / f"replica-{replica_id}.log",
            environment={**self.environment, **environment},
            folder=app,
        )
        self.replicas[replica_id] = program
        return program

    def start_supernode(self, index: int, *arguments: str, node_config: str = "") -> Program:
        """Start one unmodified SuperNode; `node_config` is added to its partition, `arguments` to its command line."""
        (port,) = free_ports(1)
        partition = f"partition-id={index} num-partitions={max(self.plan.supernodes, 1)} {node_config}".strip()
        options = ["--port", str(port), "--node-config", partition, *arguments]
        trust = ["--root-certificates", self._authority] if self._authority else ["--insecure"]
        program = Program(
            f"SuperNode {index}",
            [str(self._bin / "flower-supernode"), *trust, "--superlink", self.supernode_address, *options],
            log_file=self.folder / "logs" / f"supernode-{index}.log",
            environment=self.environment,
            folder=self.folder,
        )
        self.supernodes[index] = program
        return program

    def flwr(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run Flower's own command line against the cluster and return its output; HaError where it fails."""
        with tempfile.TemporaryDirectory() as scratch:  # where it may leave its files
            done = subprocess.run(
                [str(self._bin / "flwr"), *arguments],
                env={**os.environ, **self.environment},
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        if done.returncode != 0:
            raise HaError(f"flwr {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, app: Path, **run_config: object) -> str:
        """Submit an app with ``flwr run`` and return its run id; HaError where it is refused."""
        pairs = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in run_config.items())
        options = ["--run-config", pairs] if pairs else []
        answer = json.loads(self.flwr("run", str(app.absolute()), "ha", "--format", "json", *options))
        if "run-id" not in answer:
            raise HaError(f"flwr run says {answer}")
        return str(answer["run-id"])

    def get(self, path: str, *, replica_id: int | None = None) -> Any:
        """Return a JSON answer of one replica, or of the first that answers; None where none does."""
        ids = [replica_id] if replica_id is not None else [i for i, r in self.replicas.items() if r.is_alive]
        for each in ids:
            try:
                return self._ask(each, path, timeout_s=2.0).json()
            except (httpx.HTTPError, ValueError):
                continue
        return None

    def leader(self) -> int | None:
        """Return the id of the replica that says that it leads."""
        for replica_id, program in self.replicas.items():
            if program.is_alive and self._is_leader(replica_id):
                return replica_id
        return None

    def _is_leader(self, replica_id: int) -> bool:
        try:
            return self._ask(replica_id, "/leader", timeout_s=1.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _ask(self, replica_id: int, path: str, *, timeout_s: float) -> httpx.Response:
        url = f"{'https' if self._authority else 'http'}://127.0.0.1:{self._ports[1 + replica_id]}{path}"
        # The default loads every public authority at each call, and this one is called many times a second.
        context = (peer_context(self.settings.tls) if self._authority else None) or _PLAIN
        return httpx.get(url, timeout=timeout_s, trust_env=False, verify=context)

    def wait_leader(self, *, timeout_s: float, other_than: int | None = None) -> int:
        """Return the id of the leader once there is one (another one)."""

        def found() -> tuple[int] | None:
            leader = self.leader()
            return None if leader is None or leader == other_than else (leader,)

        return wait_until(found, timeout_s=timeout_s, what="a leader")[0]

    def run(self, run_id: str) -> dict[str, Any] | None:
        """Return a run as ``GET /cluster`` shows it."""
        cluster = self.get("/cluster") or {"runs": []}
        found: dict[str, Any] | None = next((run for run in cluster["runs"] if run["run_id"] == run_id), None)
        return found

    def wait_run(
        self, run_id: str, condition: Callable[[dict[str, Any]], object], *, timeout_s: float, what: str
    ) -> dict[str, Any]:
        """Return the run once `condition` is true of it."""
        seen: dict[str, Any] | None = None

        def found() -> dict[str, Any] | None:
            nonlocal seen
            seen = self.run(run_id) or seen
            return seen if seen is not None and condition(seen) else None

        try:
            return wait_until(found, timeout_s=timeout_s, what=what, poll_s=0.1)
        except WaitTimeoutError as error:
            raise WaitTimeoutError(f"{what}: not within {timeout_s:g} s, the run was last seen as {seen}") from error

    def kill_part(self, replica_id: int, words: str) -> int:
        """Kill one process of a replica's tree with SIGKILL, for example its `SUPERLINK`; return its id."""
        program = self.replicas[replica_id]
        pid = wait_until(lambda: program.find(words), timeout_s=10.0, what=f"{words} of {program.name}")
        os.kill(pid, 9)
        return pid


def _toml(table: Mapping[str, Any]) -> list[str]:
    """Return the lines of a TOML file: plain values first, since a table goes on to the next one."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += [f"[{key}]", *_toml(value)]
    return lines
