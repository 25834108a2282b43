"""Fixtures of the tests with real processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from tests.integration.observed import MakeCluster, ObservedRun, heal, start_run


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Return a function that makes a cluster, not started, which ends with the test."""
    with ExitStack() as stack:
        yield lambda plan: stack.enter_context(LocalCluster(tmp_path / "cluster", plan))


@pytest.fixture(scope="module")
def endless_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObservedRun]:
    """Run a cluster on ZooKeeper that trains without end; several tests kill parts of it, one after the other."""
    plan = Plan(supernodes=2, session_timeout_s=4.0)
    with LocalCluster(tmp_path_factory.mktemp("endless"), plan) as made:
        made.start()
        yield start_run(made, num_server_rounds=10_000, min_nodes=2)


@pytest.fixture
def training(endless_run: ObservedRun) -> Iterator[ObservedRun]:
    """Yield the endless run with all replicas up, and check at the end that it goes on and lost nothing."""
    heal(endless_run.cluster)
    endless_run.wait_middle_of_round()
    yield endless_run
    committed = len(endless_run.commit_log())
    endless_run.wait_round(committed + 1)
    endless_run.check_commits()
    endless_run.check_supernodes()


@pytest.fixture(scope="session")
def flower_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a SuperLink's database with Flower's own code, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
    file = tmp_path_factory.mktemp("flower") / "state.db"
    manager = get_federation_manager(is_simulation=False)
    state: Any = get_objectstore_linkstate_factories(str(file), manager)[1].state()
    state._engine.dispose()
    return file
