"""Wrong use, wrong settings, and what the machine refuses: one sentence, exit status 2, nothing written half."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.zookeeper import free_ports
from tests.integration.observed import MakeCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
Complain = Callable[..., str]


@pytest.fixture
def table(tmp_path: Path) -> dict[str, object]:
    """Return good settings of one replica on the embedded coordinator."""
    address, api = (f"127.0.0.1:{port}" for port in free_ports(2))
    return {
        "cluster": "test",
        "coordinator": "embedded:coordinator",
        "session-timeout": 1.0,
        "data-dir": "data",
        "replicas": [{"id": 0, "address": address, "api": api}],
    }


def write(file: Path, table: Mapping[str, object]) -> None:
    """Write a settings file: values as JSON, which TOML takes, too."""
    pairs = [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "replicas"]
    for replica in table.get("replicas", ()):  # type: ignore[attr-defined]
        pairs += ["[[replicas]]", *(f"{key} = {json.dumps(value)}" for key, value in replica.items())]
    file.write_text("\n".join(pairs) + "\n", encoding="utf-8")


@pytest.fixture
def complain(tmp_path: Path) -> Complain:
    """Return a function that starts a replica which must refuse, and returns its one sentence."""

    def run(
        table: Mapping[str, object],
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        command: tuple[str, ...] = ("-m", "flwr_ha", "replica"),
    ) -> str:
        config = tmp_path / "settings.toml"
        write(config, table)
        done = subprocess.run(
            [sys.executable, *command, *(arguments or ("--id", "0")), "--config", str(config)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert done.stdout == ""
        return done.stderr.strip()

    return run


@pytest.mark.parametrize("command", [("-m", "flwr_ha", "replica"), ("server_app.py",)])
def test_unknown_id(complain: Complain, table: dict[str, object], command: tuple[str, ...]) -> None:
    """The ids that exist are named; by both ways to start a replica."""
    assert complain(table, "--id", "7", command=command) == (
        "flwr-ha: --id 7 is not among the replicas of cluster 'test': 0"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sesion-timeout": 4.0}, r"sesion-timeout is not a setting; the nearest is session-timeout$"),
        ({"coordinator": None}, r"coordinator is missing$"),
        ({"session-timeout": "4 s"}, r"session-timeout = '4 s' is not a number$"),
        ({"coordinator": "redis://h:1"}, r"coordinator = 'redis://h:1' is neither"),
        ({"storage": "a folder"}, r"storage = 'a folder' is neither"),
        (
            {"replicas": [{"id": 0, "address": "10.0.0.1:8000", "api": "10.0.0.1:8010"}]},
            r'coordinator = "embedded:…" serves one machine',
        ),
        ({"secret-file": "no-such-file"}, r"secret-file '.*no-such-file' cannot be read: No such file or directory$"),
    ],
)
def test_settings_that_are_wrong(
    complain: Complain, table: dict[str, object], change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """Unknown, missing, of the wrong kind, contradictory: the setting is named."""
    changed = {key: value for key, value in {**table, **change}.items() if value is not None}
    assert re.search(sentence, complain(changed))


def test_settings_file_that_is_missing(tmp_path: Path) -> None:
    """The file is named."""
    done = subprocess.run(
        [sys.executable, "-m", "flwr_ha", "replica", "--id", "0", "--config", str(tmp_path / "none.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr == f"flwr-ha: settings file '{tmp_path / 'none.toml'}' cannot be read: No such file or directory\n"
    )


def test_api_port_that_is_taken(complain: Complain, table: dict[str, object]) -> None:
    """The setting and the address are named."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        replicas = [{**table["replicas"][0], "api": address}]  # type: ignore[index]
        assert complain({**table, "replicas": replicas}) == (
            f"flwr-ha: api = {address} cannot be listened on: Address already in use"
        )


def test_public_port_that_is_taken(complain: Complain, table: dict[str, object]) -> None:
    """A foreign process on it is an error, unlike a leader of the cluster."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        replicas = [{**table["replicas"][0], "address": address}]  # type: ignore[index]
        assert complain({**table, "replicas": replicas}) == (
            f"flwr-ha: address = {address} cannot be listened on: Address already in use"
        )


def test_zookeeper_that_is_not_there(complain: Complain, table: dict[str, object], tmp_path: Path) -> None:
    """After 15 s of trying the setting is named, and nobody has to kill anything."""
    (port,) = free_ports(1)
    sentence = complain({**table, "coordinator": f"zookeeper://127.0.0.1:{port}"})
    assert sentence.startswith(f"flwr-ha: coordinator = 'zookeeper://127.0.0.1:{port}': ")
    assert "15 s" in sentence


def test_data_folder_that_cannot_be_used(complain: Complain, table: dict[str, object], tmp_path: Path) -> None:
    """A file lies where the folder should be; the file stays as it is."""
    (tmp_path / "data").write_text("mine")
    assert complain(table) == f"flwr-ha: data-dir: '{tmp_path / 'data' / 'replica-0'}' cannot be used: Not a directory"
    assert (tmp_path / "data").read_text() == "mine"


def fake_flower(folder: Path, version: str, revision: str | None) -> dict[str, str]:
    """Put a Flower of another version, and maybe another schema, in front of the installed one."""
    info = folder / f"flwr-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flwr\nVersion: {version}\n")
    if revision is not None:
        versions = folder / "flwr" / "supercore" / "state" / "alembic" / "versions"
        versions.mkdir(parents=True)
        (folder / "flwr" / "__init__.py").touch()
        (versions / "rev_1.py").write_text(f'revision = "{revision}"\ndown_revision = None\n')
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


def test_unknown_flower(complain: Complain, table: dict[str, object], tmp_path: Path) -> None:
    """What is installed, what is known, what to do: an unknown inside is not touched."""
    sentence = complain(table, environment=fake_flower(tmp_path / "fake", "9.9.0", None))
    assert sentence.startswith("flwr-ha: flwr 9.9.0 is installed, but flwr-ha knows flwr 1.41 and 1.42 only; install ")
    assert not (tmp_path / "data").exists()


def test_unknown_schema(complain: Complain, table: dict[str, object], tmp_path: Path) -> None:
    """A known version with another database: the same."""
    sentence = complain(table, environment=fake_flower(tmp_path / "fake", "1.41.0", "0123456789ab"))
    assert sentence.startswith("flwr-ha: flwr 1.41.0 has the database schema 0123456789ab, but flwr-ha knows ")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def running(cluster: MakeCluster) -> LocalCluster:
    """Run one replica on the embedded coordinator."""
    made = cluster(Plan(replicas=1, supernodes=0, is_embedded=True))
    made.start()
    return made


def test_id_of_a_running_replica(complain: Complain, running: LocalCluster, tmp_path: Path) -> None:
    """On the same machine its folder is locked; elsewhere the coordinator knows it. The running one stays."""
    settings = running.settings
    own = settings.replicas[0]
    (api,) = free_ports(1)
    table = {
        "cluster": settings.cluster,
        "coordinator": settings.coordinator,
        "session-timeout": settings.session_timeout_s,
        "data-dir": str(settings.data_dir),
        "replicas": [{"id": 0, "address": str(own.address), "api": f"127.0.0.1:{api}"}],
    }
    folder = str(settings.replica_dir(0))
    assert complain(table) == f"flwr-ha: --id 0: replica 0 is already running in '{folder}'"

    elsewhere = complain({**table, "data-dir": str(tmp_path / "other")})
    assert re.fullmatch(
        r"flwr-ha: replica 0 is already running \(instance \w+\): stop it, or start this one with another --id",
        elsewhere,
    )
    assert running.leader() == 0
    assert running.get("/cluster")["term"] == 1
