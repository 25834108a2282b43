"""Follow docs/three-machines.md on three hosts of a network: its commands, its settings, its systemd unit.

What only a machine of its own can do (packages, users, systemd, ssh) is done by stand-ins on the path. Files below
/etc, /opt and /var are those below a folder of the test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import JAVA_OPTIONS, MAIN_CLASS, require_zookeeper
from tests.network import BIN, REPLICAS, Network, NetworkCluster

pytestmark = [
    pytest.mark.processes,
    pytest.mark.zookeeper,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "three-machines.md").read_text(encoding="utf-8")
APP = ROOT / "tests" / "apps" / "numpy_app"
STAND_INS = {
    "sudo": 'exec "$@"',
    "apt-get": "",
    "useradd": "",
    "chown": "",
    "systemctl": 'echo "$@" >> "$MACHINE/systemctl"',
    "python3": f'mkdir -p "$3/bin" && ln -sf {BIN}/flwr-ha "$3/bin" && ln -sf "$0" "$3/bin/pip"',  # -m venv FOLDER
    "scp": 'to="${!#}" && cp "${@:1:$#-1}" "${to##*:}"',
    "ssh": 'bash -c "$2"',
}


class Machines:
    """Three hosts that are set up as the document says."""

    def __init__(self, folder: Path, cluster: NetworkCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in STAND_INS.items():
            (self.bin / name).write_text(f"#!/bin/bash\ncase $0 in */pip) exit 0;; esac\n{text}\n")
            (self.bin / name).chmod(0o755)
        self.sections = dict(re.findall(r"^## (\d)\..*?\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE))

    def here(self, text: str, machine: str) -> str:
        """Return a text with the paths of one machine; all but ZooKeeper's hold the same on each of them."""
        text = re.sub(r"/(etc|var/lib)/zookeeper", rf"{self.folder}/{machine}/\1/zookeeper", text)
        return re.sub(r"/(etc/flwr-ha|etc/systemd/system|opt/flwr-ha|var/lib/flwr-ha)\b", rf"{self.folder}/\1", text)

    def block(self, section: int, kind: str, number: int = 0) -> str:
        """Return a block of a section."""
        return re.findall(rf"```{kind}\n(.*?)```", self.sections[str(section)], re.DOTALL)[number]

    def type(self, machine: str, script: str) -> str:
        """Run commands of the document in a checkout on a machine."""
        done = subprocess.run(
            [
                "ip",
                "netns",
                "exec",
                Network.space(machine),
                "bash",
                "-euo",
                "pipefail",
                "-c",
                self.here(script, machine),
            ],
            cwd=self.folder / machine / "checkout",
            env={
                **os.environ,
                "PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin",
                "MACHINE": str(self.folder / machine),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def set_up(self) -> None:
        """Follow sections 1 to 4, and start what systemd would."""
        for number, machine in REPLICAS.items():
            checkout = self.folder / machine / "checkout"
            checkout.mkdir(parents=True)
            for name in ("zookeeper", "deploy"):
                (checkout / name).symlink_to(ROOT / name)
            for path in (*(f"{machine}/{name}/zookeeper/conf" for name in ("etc", "var/lib")), "etc/systemd/system"):
                (self.folder / path).mkdir(parents=True, exist_ok=True)
            programs = self.block(1, "bash").replace("N=0", f"N={number}")
            self.type(machine, programs + self.block(2, "bash"))
            self.start_zookeeper(machine)
        settings = self.here(self.block(3, "toml"), "replica-0")
        (self.folder / "replica-0" / "checkout" / "flwr-ha.toml").write_text(settings)
        self.type("replica-0", self.block(3, "bash"))
        for number, machine in REPLICAS.items():
            self.type(machine, f"N={number}\n" + self.block(4, "bash"))
            asked = (self.folder / machine / "systemctl").read_text().splitlines()
            assert asked == ["restart zookeeper", f"enable --now flwr-ha-replica@{number}"]
            self.start_replica(number)

    def start_zookeeper(self, machine: str) -> None:
        """Do what the distribution's service does."""
        settings = self.folder / machine / "etc/zookeeper/conf/zoo.cfg"
        command = ["java", *JAVA_OPTIONS, "-cp", require_zookeeper(), MAIN_CLASS, str(settings)]
        self.cluster.run(machine, f"zookeeper-{machine}", command)

    def start_replica(self, number: int) -> None:
        """Do what systemd does with the unit that was copied."""
        unit = (self.folder / "etc/systemd/system/flwr-ha-replica@.service").read_text()
        unit = self.here(unit.replace("%i", str(number)), REPLICAS[number])
        environment = dict(line.split("=", 1) for line in re.findall(r"^Environment=(.*)", unit, re.MULTILINE))
        environment["PATH"] = f"{BIN}:{environment['PATH']}"
        (command,) = re.findall(r"^ExecStart=(.*)", unit, re.MULTILINE)
        self.cluster.run(REPLICAS[number], REPLICAS[number], command.split(), environment)

    def state(self, machine: str) -> dict[str, Any]:
        """Return what the document's `flwr-ha list` says on a machine; nothing while no replica answers."""
        try:
            answer: dict[str, Any] = json.loads(self.type(machine, self.block(4, "bash", 1).strip() + " --json"))
        except AssertionError:
            return {"leader": None, "runs": []}
        return answer


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Set three machines up."""
    folder = tmp_path_factory.mktemp("machines")
    with Network() as network, NetworkCluster(folder, network, session_timeout_s=4.0) as cluster:
        machines = Machines(folder, cluster)
        machines.set_up()
        yield machines


def start_client(machines: Machines, host: str, partition: int) -> Program:
    """Set a client's machine up and start its SuperNode as section 5 says."""
    (machines.folder / host / "checkout").mkdir(parents=True)
    machines.type(host, machines.block(5, "bash"))
    command = machines.block(5, "bash", 1).strip().replace("partition-id=0", f"partition-id={partition}")
    return machines.cluster.run(
        host, f"supernode-{host}", ["bash", "-c", f"cd {machines.folder}/etc/flwr-ha && {command}"]
    )


def submit(machines: Machines) -> None:
    """Run the app as section 5 says."""
    home = machines.folder / "homes" / "user"
    home.mkdir(parents=True)
    ca_file = machines.folder / "etc/flwr-ha/ca.crt"
    (home / "config.toml").write_text(machines.block(5, "toml", 0).replace("ca.crt", str(ca_file)))
    run, _ = machines.block(5, "bash", 2).splitlines()
    assert run.endswith(" --run-config 'min-nodes=2'")
    run = run.replace("min-nodes=2", "num-server-rounds=3 min-nodes=2 step-s=1.0")
    subprocess.run(
        ["ip", "netns", "exec", Network.space("client-0"), "bash", "-c", f"cd {APP} && {run}"],
        env={"PATH": f"{BIN}:/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
        check=True,
        timeout=120,
    )


def test_three_machines_train_on_when_one_is_switched_off(machines: Machines) -> None:
    """The leader's machine goes, with its ZooKeeper node; the run is finished without it."""
    wait_until(lambda: machines.state("replica-1")["leader"] is not None, timeout_s=180.0, what="a leader", poll_s=1.0)
    clients = [start_client(machines, host, partition) for partition, host in enumerate(("client-0", "client-1"))]
    submit(machines)

    def rounds(machine: str) -> int:
        return max((run["server_round"] for run in machines.state(machine)["runs"]), default=-1)

    wait_until(lambda: rounds("replica-0") >= 1, timeout_s=240.0, what="round 1 is committed", poll_s=0.5)
    number = machines.state("replica-0")["leader"]
    off = REPLICAS[number]
    machines.cluster.programs[off].kill_tree()
    machines.cluster.programs[f"zookeeper-{off}"].kill_tree()
    other = next(machine for machine in REPLICAS.values() if machine != off)

    wait_until(lambda: rounds(other) >= 3, timeout_s=240.0, what="the run is finished without it", poll_s=1.0)
    assert machines.state(other)["leader"] not in {None, number}
    assert all(client.is_alive for client in clients)

    machines.start_zookeeper(off)
    machines.start_replica(number)

    def is_standby() -> bool:
        replicas = {each["id"]: each for each in machines.state(other).get("replicas", [])}
        return (replicas[number]["role"], replicas[number]["state"]) == ("standby", "running")

    wait_until(is_standby, timeout_s=120.0, what="the machine is back as a standby", poll_s=1.0)
