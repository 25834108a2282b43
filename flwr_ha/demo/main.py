"""Run the demo: choose a coordinator, play the story, report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import queue
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from flwr_ha.config import load_settings, zookeeper_home_from_environment
from flwr_ha.demo.coordinators import Choice, choose, running
from flwr_ha.demo.report import count_trainings, problems, report, report_table
from flwr_ha.demo.screen import Screen
from flwr_ha.demo.story import DemoFailedError, Story, kill_rounds
from flwr_ha.errors import ConfigError, HaError
from flwr_ha.local.cluster import LocalCluster, Plan

DONE, FAILED, INTERRUPTED = 0, 1, 130
SUPERNODES = 5
SESSION_TIMEOUT_S = 4.0
TAIL_LINES = 20
PLAIN_WIDTH = 120


def run_demo(
    root: Path, *, rounds: int, kills: int, coordinator: str, config: Path | None = None, as_json: bool = False
) -> int:
    """Train the example of `root` on a cluster of this machine while leaders are killed.

    Parameters
    ----------
    root : Path
        Folder of the project, with ``server_app.py``; logs and data go to ``.flwr-ha/demo`` below it.
    rounds : int
        Rounds to train, from 1.
    kills : int
        Leaders to kill, 0 to `rounds`.
    coordinator : str
        ``zookeeper``, ``embedded`` or ``auto``.
    config : Path or None
        TOML file that names the ZooKeeper to use; None for the ``pyproject.toml`` of `root`.
    as_json : bool
        Print the report as JSON on standard output, and all else on standard error.

    Returns
    -------
    int
        Exit status: 0 all is as promised, 1 it is not, 130 the user has ended it.

    Raises
    ------
    ConfigError
        An argument cannot be, or the folder holds no example.
    """
    targets = kill_rounds(rounds, kills)
    if not (root / "server_app.py").is_file():
        raise ConfigError(f"the demo runs the example of the project, but {str(root)!r} has no server_app.py")
    home = zookeeper_home_from_environment()
    choice = choose(coordinator, load_settings(config or root / "pyproject.toml"), root=root, home=home)
    console = Console(highlight=False, stderr=as_json)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(str(choice), soft_wrap=True)
    with _fresh_folder(root / ".flwr-ha") as folder, _signals() as is_interrupted:
        try:
            with running(choice, root=root, folder=folder, home=home) as hosts:
                cluster = _cluster(choice, hosts, root=root, folder=folder)
                told = _play(console, is_interrupted, cluster, rounds, targets)
            if as_json:
                print(json.dumps(told, indent=2), flush=True)
            return DONE
        except KeyboardInterrupt:
            console.print(f"interrupted; all processes are ended, their logs are in {folder}", soft_wrap=True)
            return INTERRUPTED
        except HaError as error:
            _explain(console, error, folder)
            return FAILED


def _cluster(choice: Choice, hosts: str, *, root: Path, folder: Path) -> LocalCluster:
    plan = Plan(
        supernodes=SUPERNODES,
        is_embedded=not hosts,
        zookeeper=hosts,
        session_timeout_s=SESSION_TIMEOUT_S,
        app=root,
        settings={"cluster": f"demo-{secrets.token_hex(4)}"},
    )
    return LocalCluster(folder, plan)


def _play(
    console: Console,
    is_interrupted: Callable[[], bool],
    cluster: LocalCluster,
    rounds: int,
    targets: tuple[int, ...],
) -> dict[str, Any]:
    """Return the report; DemoFailedError where something is not as promised."""
    with cluster, Screen(console) as screen:
        story = Story(cluster, screen, is_interrupted, rounds=rounds, targets=targets)
        run = story.play()
        commits = cluster.get(f"/runs/{run['run_id']}/commits") or []
        elapsed_s = screen.elapsed_s
    logs = [program.log_text() for program in cluster.supernodes.values()]
    found = problems(run, commits, story.kills)
    if len(story.kills) < len(targets):
        found.append(f"only {len(story.kills)} of {len(targets)} leaders could be killed: the rounds were too short")
    trainings = count_trainings(logs, rounds=rounds)
    told = report(run, commits, story.kills, trainings, elapsed_s=elapsed_s)
    console.print(report_table(told))
    console.print(f"logs and data: {cluster.folder}", soft_wrap=True)
    if found:
        raise DemoFailedError("; ".join(found), _app_log(cluster))
    return told


def _app_log(cluster: LocalCluster) -> Path | None:
    """Return the log of the SuperLink and ServerApp that ran last."""
    logs = sorted(cluster.folder.glob("data/replica-*/superlink.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def _explain(console: Console, error: HaError, folder: Path) -> None:
    console.print(f"the demo failed: {error}", style="bold red", soft_wrap=True)
    log_file = error.log_file if isinstance(error, DemoFailedError) else None
    if log_file is not None and log_file.exists():
        console.print(f"the last lines of {log_file}:", soft_wrap=True)
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print(f"all logs: {folder}", soft_wrap=True)


@contextlib.contextmanager
def _fresh_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder of the demo's own; ConfigError where another demo uses it now."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / "demo"
    with (parent / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another demo is running in {str(folder)!r}: wait for its end, or stop it") from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and its like into an answer to whether one has come, so that none can cut the cleaning up short.

    A handler runs in the middle of what the main thread does, in a wait for an event, too, whose lock it holds then:
    `threading.Event.set` would wait for ever. `queue.SimpleQueue.put` may be called at any moment.
    """
    received: queue.SimpleQueue[int] = queue.SimpleQueue()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: received.put(number)) for number in numbers}
    try:
        yield lambda: not received.empty()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
