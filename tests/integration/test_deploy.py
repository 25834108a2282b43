"""What lies in `deploy/`: checked by its own tool or schema, and its settings by our own parser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flwr_ha.config import parse_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
KUBERNETES_VERSION = "1.29"


def documents(file: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [each for each in yaml.safe_load_all(file.read_text(encoding="utf-8")) if each]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool and return what it said."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed (tests/install.sh)")
def test_haproxy_accepts_its_configuration() -> None:
    """`haproxy -c` finds no error and gives no warning."""
    done = run("haproxy", "-c", "-f", str(DEPLOY / "haproxy.cfg"))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda unit: unit.name)
def test_systemd_accepts_its_units(unit: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` knows every key; the programs are put where the unit expects them."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", unit.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / unit.name).write_text(text, encoding="utf-8")
    done = run("systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name))
    ours = [line for line in done.stderr.splitlines() if unit.name.split("@")[0] in line]
    assert not ours, ours


@pytest.mark.parametrize("manifest", documents(DEPLOY / "kubernetes" / "flwr-ha.yaml"), ids=lambda each: each["kind"])
def test_kubernetes_accepts_its_manifest(manifest: dict[str, Any]) -> None:
    """Each object follows Kubernetes' own schema, strictly: unknown keys are errors."""
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


def test_kubernetes_settings_are_settings() -> None:
    """The table in the ConfigMap is one that a replica takes, with one replica for each pod."""
    objects = {each["kind"]: each for each in documents(DEPLOY / "kubernetes" / "flwr-ha.yaml")}
    settings = parse_settings(tomllib.loads(objects["ConfigMap"]["data"]["flwr-ha.toml"]), folder=ROOT)
    pods = objects["StatefulSet"]
    names = [f"{pods['metadata']['name']}-{index}" for index in range(pods["spec"]["replicas"])]
    assert [replica.address.host.split(".")[0] for replica in settings.replicas] == names


def test_only_the_leader_gets_connections_on_kubernetes() -> None:
    """The Service follows readiness, readiness asks `/leader`, and nothing waits for a standby to become ready."""
    found = documents(DEPLOY / "kubernetes" / "flwr-ha.yaml")
    spec = next(each for each in found if each["kind"] == "StatefulSet")["spec"]
    assert spec["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/leader"
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "OnDelete"}
    headless = next(each for each in found if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None")
    assert headless["metadata"]["name"] == spec["serviceName"]
    assert headless["spec"]["publishNotReadyAddresses"] is True


def test_compose_fits_its_settings_and_haproxy() -> None:
    """Each replica of the settings is a service under the name and the address that the other files use."""
    (compose,) = documents(DEPLOY / "compose.yaml")
    settings = parse_settings(tomllib.loads((DEPLOY / "flwr-ha.toml").read_text()), folder=ROOT)
    servers = dict(re.findall(r"^\s+server (\S+) (\S+):8000$", (DEPLOY / "haproxy.cfg").read_text(), re.MULTILINE))
    for replica in settings.replicas:
        service = compose["services"][replica.address.host]
        assert service["command"] == ["flwr-ha", "replica", "--id", str(replica.id)]
        assert service["networks"]["cluster"]["ipv4_address"] == servers[replica.address.host]
    hosts = [host.split(":")[0] for host in settings.zookeeper_hosts.split(",")]
    assert all(host in compose["services"] for host in hosts)
    used = {mount.split(":")[0] for each in compose["services"].values() for mount in each.get("volumes", [])}
    assert {name for name in used if not name.startswith(".")} == set(compose["volumes"])


def test_compose_can_train_the_example() -> None:
    """Its image has torch, and the run that its header names waits for no more SuperNodes than there are."""
    (compose,) = documents(DEPLOY / "compose.yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (args,) = [each["build"]["args"] for each in compose["services"].values() if "build" in each]
    extras = set(args["EXTRAS"].split(","))
    assert "torch" in extras
    assert extras <= set(project["optional-dependencies"])
    supernodes = [name for name in compose["services"] if name.startswith("supernode-")]
    run = re.search(r"^#\s+flwr run .*min-nodes=(\d+)", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    assert run is not None
    assert int(run[1]) == len(supernodes)


COMPOSE_FILES = [DEPLOY / "compose.yaml", ROOT / "zookeeper" / "compose.yaml"]


def check_compose(file: Path) -> subprocess.CompletedProcess[str]:
    """Hold a file against the schema of compose files that Docker publishes."""
    return run(str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file))


@pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda file: file.parent.name)
def test_compose_file_follows_its_schema(file: Path) -> None:
    """Every key is one that compose knows, with a value of its kind."""
    done = check_compose(file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_schema_refuses_what_compose_does_not_know(tmp_path: Path) -> None:
    """The check above can fail: a misspelt key of a service."""
    wrong = COMPOSE_FILES[1].read_text(encoding="utf-8").replace("healthcheck:", "healthchek:")
    (tmp_path / "compose.yaml").write_text(wrong, encoding="utf-8")
    done = check_compose(tmp_path / "compose.yaml")
    assert done.returncode == 1
    assert "'healthchek' was unexpected" in done.stdout + done.stderr


def test_dockerfile_pleases_its_linter() -> None:
    """`hadolint` parses it, the shell of its RUN lines included, and has nothing to say."""
    done = run(str(BIN / "hadolint"), str(DEPLOY / "Dockerfile"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_dockerfile_copies_what_exists() -> None:
    """Without an engine it cannot be built here; what it copies is there, and the extras are known."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
