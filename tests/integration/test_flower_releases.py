"""Each release of Flower that we support, beside the installed one.

Its package alone is put before the installed one on ``PYTHONPATH``; the other packages are those of the environment.
So a release is tested here even where one of its requirements cannot be had.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.operator import Operator
from flwr_ha.superlink import schema
from flwr_ha.superlink.database import opened
from tests.integration.observed import ROUND_TIMEOUT_S, heal, start_run, wait_next_term

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
RELEASES = {"1.41.0": "d90a2f91f23c", "1.42.0": "d9bd9d502cf9"}  # -> the schema of its database
INSTALLED = importlib.metadata.version("flwr")
OTHERS = sorted(set(RELEASES) - {INSTALLED})
GUARDS = [
    "tests/unit/test_superlink_parts.py",
    "tests/unit/test_superlink_parking.py",
    "tests/unit/test_serverapp_aggregation.py",
    "tests/integration/test_linkstate.py",
    "tests/integration/test_busy_database.py",
    "tests/integration/test_old_message.py",
    "tests/integration/test_superlink_child.py::test_standby_refuses_the_public",
    "tests/integration/test_superlink_child.py::test_registration_is_acknowledged_only_when_replicated",
    "tests/integration/test_superlink_child.py::test_killed_serverapp_is_started_again",
    "tests/integration/test_superlink_child.py::test_finished_serverapp_is_not_reported_as_dead",
    "tests/unit/test_superlink_gate.py",
]


def python_path(release: str) -> str:
    """Return a ``PYTHONPATH`` on which this release of Flower comes first; it is fetched once."""
    folder = ROOT / ".flwr-releases" / release
    if not (folder / f"flwr-{release}.dist-info" / "RECORD").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*install, "--upgrade", "--target", str(folder), f"flwr=={release}"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return os.pathsep.join([str(folder), str(ROOT)])


def revision_of(cluster: LocalCluster, replica_id: int) -> str:
    """Return the schema that a replica's SuperLink has given to its database."""
    lives = (cluster.settings.data_dir / f"replica-{replica_id}").rglob("state.db")
    newest = max(lives, key=lambda file: file.stat().st_mtime)
    with opened(newest, "BEGIN", is_read_only=True) as connection:
        return schema.fingerprint(connection)[0]


def test_all_known_releases_are_tested() -> None:
    """What a replica accepts is what is tried here, schema for schema."""
    assert INSTALLED in RELEASES
    assert {tuple(map(int, release.split(".")[:2])) for release in RELEASES} == set(schema.KNOWN_VERSIONS)
    assert set(RELEASES.values()) == set(schema.KNOWN_SCHEMAS)


@pytest.mark.parametrize("release", OTHERS)
def test_guards_hold_with_the_other_release(release: str) -> None:
    """The tests that notice a change of Flower's inside (docs/flower-internals.md) pass with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = python_path(release)
    asked = "import importlib.metadata as m, flwr; print(m.version('flwr'), flwr.__file__)"
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{release} {ROOT}")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *GUARDS],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-20_000:]
    assert " skipped" not in done.stdout


@pytest.mark.parametrize("release", OTHERS)
def test_run_goes_on_at_a_replica_with_the_other_release(tmp_path: Path, release: str) -> None:
    """The leader is killed, one with the other release goes on, and hands back again: an upgrade in a run."""
    other = {"PYTHONPATH": python_path(release)}
    calls = tmp_path / "calls"
    plan = Plan(supernodes=2, is_embedded=True, environment={"FLWR_HA_TEST_CALLS": str(calls)})
    with LocalCluster(tmp_path / "cluster", plan) as cluster:
        cluster.start_coordinator()
        cluster.start_replica(0)
        assert cluster.wait_leader(timeout_s=60.0) == 0
        for replica_id in (1, 2):
            cluster.start_replica(replica_id, environment=other)
        for index in range(2):
            cluster.start_supernode(index)
        run = start_run(cluster, num_server_rounds=4, min_nodes=2, step_s=0.5)
        run.wait_middle_of_round(1)

        cluster.replicas[0].kill_tree()
        leading = wait_next_term(cluster, after=1)
        assert leading["replica"] != 0
        assert revision_of(cluster, leading["replica"]) == RELEASES[release]
        assert heal(cluster) == leading["replica"]
        run.wait_middle_of_round(2)
        Operator(cluster.settings).post("/switchover", {"candidate": 0})
        assert wait_next_term(cluster, after=2, timeout_s=ROUND_TIMEOUT_S)["replica"] == 0
        assert revision_of(cluster, 0) == RELEASES[INSTALLED]

        run.wait_finished()
        run.check_finished(4)
        trained = [line for file in calls.glob("partition-*") for line in file.read_text().splitlines()]
        assert len(trained) == len(set(trained)) * 2 == 8
