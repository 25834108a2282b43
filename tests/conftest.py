"""Fixtures that several kinds of tests share."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flwr_ha.local.zookeeper import LocalEnsemble

READY_TIMEOUT_S = 60.0  # on a busy machine

# A shell that starts the suite in its background ignores Ctrl-C for it, and so for all that the tests start and end so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail CI where a test was skipped: what is missing there is a missing install step."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    if reporter.stats.get("skipped"):
        reporter.write_line("a test was skipped, which CI does not allow", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEnsemble]:
    """Run three ZooKeeper nodes for the whole test session; leave all of them running."""
    with _running(tmp_path_factory.mktemp("ensemble"), size=3) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEnsemble]:
    """Run one ZooKeeper node for the whole test session."""
    with _running(tmp_path_factory.mktemp("standalone"), size=1) as nodes:
        yield nodes


@pytest.fixture
def own_ensemble(tmp_path: Path) -> Iterator[LocalEnsemble]:
    """Run three ZooKeeper nodes for one test, which may kill them."""
    with _running(tmp_path / "ensemble", size=3) as nodes:
        yield nodes


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Return a function that waits until a condition is true, and fails at its deadline."""

    def wait_until(condition: Callable[[], object], *, timeout_s: float = 10.0, what: str = "the condition") -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{what} did not come true within {timeout_s:g} s"
            time.sleep(0.01)

    return wait_until


@contextmanager
def _running(folder: Path, *, size: int) -> Iterator[LocalEnsemble]:
    home = os.environ.get("ZOOKEEPER_HOME")
    with LocalEnsemble(folder, size=size, home=Path(home) if home else None) as nodes:
        nodes.wait_ready(READY_TIMEOUT_S)
        yield nodes
