"""Hosts on a network of this machine: namespaces with a bridge, whose cables can be pulled."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from flwr_ha.config import load_settings
from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import JAVA_OPTIONS, MAIN_CLASS, require_zookeeper
from flwr_ha.settings import Settings

SUBNET = "10.20.0"
BRIDGE = "flwrha0"
BIN = Path(sys.executable).parent
REPLICAS = {0: "replica-0", 1: "replica-1", 2: "replica-2"}
HOSTS = {
    "replica-0": 10,
    "replica-1": 11,
    "replica-2": 12,
    "zookeeper-1": 20,
    "zookeeper-2": 21,
    "zookeeper-3": 22,
    "client-0": 30,
    "client-1": 31,
    "haproxy": 40,
}
LEADER_NAME = "flower"  # has one address per replica


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def address(host: str) -> str:
    """Return the address of a host."""
    return f"{SUBNET}.{HOSTS[host]}"


class Network:
    """One namespace per host, joined by a bridge; this process is on the bridge, too."""

    hosts = tuple(HOSTS)

    def __enter__(self) -> Self:
        self._turn = (Path(tempfile.gettempdir()) / "flwr-ha-network.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)  # one network at a time: tests run side by side
        self._remove()
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for host in HOSTS:
            self._add(host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()
        self._turn.close()

    def _add(self, host: str) -> None:
        space, cable = self.space(host), self.cable(host)
        ip("netns", "add", space)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", BRIDGE, "up")
        ip("-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        folder = Path("/etc/netns") / space
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{address(name)} {name}" for name in HOSTS]
        names += [f"{address(replica)} {LEADER_NAME}" for replica in REPLICAS.values()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def _remove(self) -> None:
        for host in HOSTS:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(host))
            with suppress(subprocess.CalledProcessError):
                ip("link", "del", self.cable(host))
            folder = Path("/etc/netns") / self.space(host)
            (folder / "hosts").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", BRIDGE)

    @staticmethod
    def space(host: str) -> str:
        """Return the namespace of a host."""
        return f"flwrha-{host}"

    @staticmethod
    def cable(host: str) -> str:
        """Return the bridge's end of a host's cable."""
        return f"fha{HOSTS[host]}"

    def cut(self, host: str) -> None:
        """Pull the cable: no packet comes or goes, and nobody is told."""
        ip("link", "set", self.cable(host), "down")

    def heal(self, host: str) -> None:
        """Put the cable back."""
        ip("link", "set", self.cable(host), "up")

    def part(self, host: str, other: str) -> None:
        """Lose all packets between two hosts, and between no others: each sends them to a card that nobody has."""
        for own, away in ((host, other), (other, host)):
            nowhere = ["lladdr", "02:00:00:00:00:00", "dev", "eth0", "nud", "permanent"]
            ip("-n", self.space(own), "neigh", "replace", address(away), *nowhere)

    def join(self, host: str, other: str) -> None:
        """Let the two find each other again."""
        for own, away in ((host, other), (other, host)):
            ip("-n", self.space(own), "neigh", "del", address(away), "dev", "eth0")

    def peers(self, host: str, port: int) -> set[str]:
        """Return the addresses that have an open connection to a port of a host."""
        command = ["ip", "netns", "exec", self.space(host), "ss", "-Htn", "state", "established", f"sport = :{port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(re.findall(rf"({re.escape(SUBNET)}\.\d+)\]?:\d+\s*$", done.stdout, re.MULTILINE))


class NetworkCluster:
    """Three ZooKeeper hosts, three replica hosts, HAProxy, and SuperNodes on client hosts."""

    def __init__(self, folder: Path, network: Network, *, session_timeout_s: float) -> None:
        self.folder = folder
        self.network = network
        self.session_timeout_s = session_timeout_s
        self.programs: dict[str, Program] = {}
        self.config = folder / "flwr-ha.toml"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in reversed(self.programs.values()):
            if program.is_alive:
                program.kill_tree()

    @property
    def settings(self) -> Settings:
        """The settings of the cluster, read from its file."""
        return load_settings(self.config)

    @property
    def replicas(self) -> Mapping[int, Program]:
        """The replicas that were started."""
        return {replica_id: self.programs[name] for replica_id, name in REPLICAS.items() if name in self.programs}

    def run(
        self, host: str, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Program:
        """Start a program on a host."""
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        program = Program(
            name,
            ["ip", "netns", "exec", self.network.space(host), *command],
            log_file=self.folder / "logs" / f"{name}.log",
            environment={
                "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
                "FLWR_HOME": str(home),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                "FLWR_HA_REPLAY_DIR": str(home / "replay"),
                **(environment or {}),
            },
        )
        self.programs[name] = program
        return program

    def start(self) -> None:
        """Start ZooKeeper, the replicas and HAProxy with the configuration in `deploy/`."""
        self._start_zookeeper()
        secret = self.folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text("the secret of the network cluster\n")
        zookeeper = ",".join(f"{address(host)}:2181" for host in HOSTS if host.startswith("zookeeper"))
        lines = [
            'cluster = "network"',
            f'coordinator = "zookeeper://{zookeeper}"',
            f"session-timeout = {self.session_timeout_s}",
            f'data-dir = "{self.folder / "data"}"',
            f'secret-file = "{secret}"',
        ]
        for replica_id, host in REPLICAS.items():
            lines += ["[[replicas]]", f"id = {replica_id}"]
            lines += [f'address = "{address(host)}:8000"', f'api = "{address(host)}:8010"']
        self.config.write_text("\n".join(lines) + "\n")
        for replica_id in REPLICAS:
            self.start_replica(replica_id)
        deploy = Path(__file__).parents[1] / "deploy"
        self.run("haproxy", "haproxy", ["haproxy", "-db", "-f", str(deploy / "haproxy.cfg")])

    def wait_haproxy(self) -> None:
        """Wait until HAProxy leads to a leader: whoever comes earlier pauses for long; fail where it has ended."""

        def leads() -> bool:
            haproxy = self.programs["haproxy"]
            assert haproxy.is_alive, f"HAProxy has ended, see {haproxy.log_file}"
            with suppress(httpx.HTTPError):
                httpx.get(f"http://{address('haproxy')}:8000/", timeout=2.0, trust_env=False)
                return True
            return False

        wait_until(leads, timeout_s=60.0, what="HAProxy leads to a leader")

    def start_replica(self, replica_id: int) -> None:
        """Start a replica on its host."""
        command = [sys.executable, "-m", "flwr_ha", "replica", "--id", str(replica_id), "--config", str(self.config)]
        self.run(REPLICAS[replica_id], f"replica-{replica_id}", command)

    def _start_zookeeper(self) -> None:
        class_path = require_zookeeper()
        for number in (1, 2, 3):
            host = f"zookeeper-{number}"
            data = self.folder / host
            data.mkdir(parents=True)
            (data / "myid").write_text(f"{number}\n")
            lines = [
                "tickTime=500\ninitLimit=20\nsyncLimit=4\nmaxSessionTimeout=60000\nforceSync=no",
                f"dataDir={data}\nclientPort=2181\nclientPortAddress={address(host)}",
                "admin.enableServer=false\nmaxClientCnxns=0",
                *(f"server.{n}={address(f'zookeeper-{n}')}:2888:3888" for n in (1, 2, 3)),
            ]
            (data / "zoo.cfg").write_text("\n".join(lines) + "\n")
            self.run(host, host, ["java", *JAVA_OPTIONS, "-cp", class_path, MAIN_CLASS, str(data / "zoo.cfg")])

    def start_supernode(
        self, host: str, superlink: str, partition: int, environment: Mapping[str, str] | None = None
    ) -> Program:
        """Start an unmodified SuperNode on a client host."""
        options = ["--node-config", f"partition-id={partition} num-partitions=2", "--port", str(9094 + partition)]
        command = [str(BIN / "flower-supernode"), "--insecure", "--superlink", superlink, *options]
        name = f"supernode-{partition}-{superlink.split(':', maxsplit=1)[0]}"
        return self.run(host, name, command, environment)

    def get(self, path: str, replica_ids: Sequence[int] = (0, 1, 2)) -> Any:
        """Return the JSON answer of the first of these replicas that answers; None where none does."""
        for replica_id in replica_ids:
            url = f"http://{address(REPLICAS[replica_id])}:8010{path}"
            with suppress(httpx.HTTPError, ValueError):
                return httpx.get(url, timeout=1.0, trust_env=False).json()
        return None

    def leader(self, replica_ids: Sequence[int] = (0, 1, 2)) -> int | None:
        """Return which of these replicas says that it leads."""
        for replica_id in replica_ids:
            url = f"http://{address(REPLICAS[replica_id])}:8010/leader"
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=0.5, trust_env=False).status_code == 200:
                    return replica_id
        return None

    def wait_leader(self, replica_ids: Sequence[int] = (0, 1, 2), *, timeout_s: float) -> int:
        """Return which of these replicas leads, once one does."""

        def found() -> tuple[int] | None:
            leader = self.leader(replica_ids)
            return None if leader is None else (leader,)

        return wait_until(found, timeout_s=timeout_s, what="a leader")[0]

    def wait_reached(self, replica_id: int, clients: set[str], *, timeout_s: float) -> None:
        """Wait until all these hosts have had a connection to the public address of a replica."""
        waiting = {address(client) for client in clients}

        def is_reached() -> bool:
            waiting.difference_update(self.network.peers(REPLICAS[replica_id], 8000))
            return not waiting

        wait_until(is_reached, timeout_s=timeout_s, what=f"{clients} reach replica {replica_id}", poll_s=0.05)

    def submit(self, app: Path, **run_config: object) -> str:
        """Submit an app through HAProxy."""
        home = self.folder / "homes" / "operator"
        home.mkdir(parents=True, exist_ok=True)
        connection = f'[superlink]\ndefault = "ha"\n[superlink.ha]\naddress = "{address("haproxy")}:8000"\n'
        (home / "config.toml").write_text(connection + "insecure = true\n")
        pairs = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in run_config.items())
        command = [str(BIN / "flwr"), "run", str(app), "ha", "--format", "json", "--run-config", pairs]
        done = subprocess.run(
            command,
            env={"PATH": f"{BIN}:/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        answer = json.loads(done.stdout)
        assert answer.get("success"), f"flwr run says {answer} {done.stderr}"
        return str(answer["run-id"])

    def committed_round(self, run_id: str, replica_ids: Sequence[int] = (0, 1, 2)) -> int:
        """Return the last committed round of a run; -1 where there is none."""
        cluster = self.get("/cluster", replica_ids) or {"runs": []}
        run = next((run for run in cluster["runs"] if run["run_id"] == run_id), None)
        return -1 if run is None or run["checkpoint"] is None else int(run["server_round"])
