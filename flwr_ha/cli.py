"""The ``flwr-ha`` command."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from flwr_ha import tables
from flwr_ha.config import load_settings, zookeeper_home_from_environment
from flwr_ha.errors import ConfigError, CoordinationError, HaError
from flwr_ha.operator import Operator, RequestRefusedError

if TYPE_CHECKING:
    from flwr_ha.replica.agent import Life
    from flwr_ha.settings import Settings

log = logging.getLogger(__name__)
WATCH_EVERY_S = 1.0
DONE, REFUSED, WRONG_USE = 0, 1, 2

app = typer.Typer(
    name="flwr-ha",
    help="A highly available Flower: look at a cluster, operate it, run its replicas.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoints = typer.Typer(help="List and export the checkpoints of a run.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with the settings; else FLWR_HA_CONFIG, else ./pyproject.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Print it again every second, until Ctrl-C.")]


def main() -> None:
    """Run the command; errors become one sentence and an exit status."""
    raise SystemExit(run_guarded(app))


def run_guarded(act: Callable[[], Any]) -> int:
    """Run `act` and return the exit status: 0 done, 1 refused or failed, 2 wrong use or settings."""
    try:
        act()
    except ConfigError as error:
        return _complain(error, WRONG_USE)
    except HaError as error:
        return _complain(error, REFUSED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
        return REFUSED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else REFUSED if error.code else DONE
    return DONE


def _complain(error: HaError, status: int) -> int:
    print(f"flwr-ha: {error}", file=sys.stderr)
    return status


def _show(make: Callable[[], Any], as_table: Callable[[Any], Any], *, as_json: bool, watch: bool = False) -> None:
    console = Console(highlight=False)
    if as_json:
        while True:
            print(json.dumps(make(), indent=None if watch else 2), flush=True)
            if not watch:
                return
            time.sleep(WATCH_EVERY_S)
    if not watch:
        console.print(as_table(make()))
        return
    with Live(as_table(make()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_EVERY_S)
            try:
                live.update(as_table(make()), refresh=True)
            except CoordinationError as error:
                live.update(str(error), refresh=True)


@app.command("list")
def list_cluster(config: ConfigOption = None, as_json: JsonOption = False, watch: WatchOption = False) -> None:
    """Show the replicas and the runs.

    Example: flwr-ha list --watch
    """
    operator = Operator(load_settings(config))
    _show(
        lambda: operator.get("/cluster"),
        lambda cluster: Group(tables.replica_table(cluster), tables.run_table(cluster)),
        as_json=as_json,
        watch=watch,
    )


@app.command()
def history(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show who led from when, and why the leadership changed."""
    operator = Operator(load_settings(config))
    _show(lambda: operator.get("/history"), tables.history_table, as_json=as_json)


@app.command()
def switchover(
    candidate: Annotated[int | None, typer.Option(help="Id of the replica that shall lead.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the new leader.")] = 660.0,
) -> None:
    """Hand the leadership over after the round that is running: nothing is lost, nothing is trained twice.

    Example: flwr-ha switchover --candidate 1
    """
    operator = Operator(load_settings(config))
    term = operator.get("/cluster")["term"]
    operator.post("/switchover", {"candidate": candidate})
    deadline_s = time.monotonic() + timeout
    while time.monotonic() < deadline_s:
        cluster = operator.get("/cluster")
        if cluster["term"] > term and cluster["leader"] is not None:
            message = f"replica {cluster['leader']} leads in term {cluster['term']}"
            print(json.dumps(cluster) if as_json else message)
            return
        time.sleep(0.2)
    raise RequestRefusedError(f"the leadership has not changed within {timeout:g} s; it will after the running round")


@app.command()
def pause(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Forbid automatic failover, for maintenance of the coordinator, say."""
    _set_paused("/pause", "automatic failover is paused", config, as_json)


@app.command()
def resume(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Allow automatic failover again."""
    _set_paused("/resume", "automatic failover is on", config, as_json)


def _set_paused(path: str, message: str, config: Path | None, as_json: bool) -> None:
    Operator(load_settings(config)).post(path, {})
    print(json.dumps({"message": message}) if as_json else message)


@app.command()
def replica(
    replica_id: Annotated[int, typer.Option("--id", help="Which replica of the settings this process is.")],
    config: ConfigOption = None,
) -> None:
    """Run one replica in the foreground; SIGTERM and Ctrl-C hand the leadership over.

    Example: flwr-ha replica --id 0
    """
    start_replica(load_settings(config), replica_id)


def start_replica(settings: Settings, replica_id: int, *, when_leading: Callable[[Life], None] | None = None) -> None:
    """Run a replica with its log on standard error; an unreachable coordinator is a wrong setting at start."""
    from flwr_ha.replica.main import run_replica

    set_up_logging()
    try:
        run_replica(settings, replica_id, when_leading=when_leading)
    except CoordinationError as error:
        raise ConfigError(f"coordinator = {settings.coordinator!r}: {error}") from error


def set_up_logging() -> None:
    """Send the log to standard error, one line an entry."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("kazoo", "httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.command()
def zookeeper(
    folder: Annotated[Path, typer.Option(help="Where the nodes keep their data.")] = Path(".flwr-ha/zookeeper"),
    config: ConfigOption = None,
) -> None:
    """Run a local ZooKeeper ensemble in the foreground, on the ports of the coordinator setting."""
    from flwr_ha.local.zookeeper import LocalEnsemble

    settings = load_settings(config)
    if settings.is_embedded:
        raise ConfigError("coordinator is embedded: no ZooKeeper is needed")
    set_up_logging()
    ports = [int(host.rsplit(":", 1)[1]) for host in settings.zookeeper_hosts.split(",")]
    home = zookeeper_home_from_environment()
    with LocalEnsemble(
        folder.absolute(), size=len(ports), client_ports=ports, tick_time_ms=1000, is_durable=True, home=home
    ) as ensemble:
        ensemble.wait_ready(60.0)
        print(f"ZooKeeper serves {ensemble.connect_string}; Ctrl-C ends it", flush=True)
        wait_for_signal()


def wait_for_signal() -> None:
    """Return when SIGTERM or SIGINT is received."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)


@checkpoints.command("list")
def list_checkpoints(
    run: Annotated[str, typer.Argument(help="Flower's run id.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the committed rounds of a run."""
    from flwr_ha.exporting import committed_rounds

    settings = load_settings(config)
    _show(
        lambda: committed_rounds(settings, run),
        lambda entries: tables.checkpoint_table(run, entries),
        as_json=as_json,
    )


@checkpoints.command("export")
def export_checkpoint(
    run: Annotated[str, typer.Argument(help="Flower's run id.")],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    server_round: Annotated[int | None, typer.Option("--round", help="Round; the newest if not given.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model of a committed round into one safetensors file; works with the cluster down, too.

    Example: flwr-ha checkpoint export 1951071765553103618 --out model.safetensors
    """
    from flwr_ha.exporting import export_round

    entry = export_round(load_settings(config), run, server_round, out)
    print(json.dumps(entry) if as_json else f"round {entry['server_round']} of run {run} is in {out}")


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(help="Rounds to train.")] = 8,
    kill: Annotated[int, typer.Option(help="Leaders to kill on the way.")] = 1,
    coordinator: Annotated[str, typer.Option(help="zookeeper, embedded, or auto.")] = "auto",
) -> None:
    """Show it: a cluster on this machine trains the MNIST CNN while its leader is killed."""
    from flwr_ha.demo.main import run_demo

    raise SystemExit(run_demo(Path.cwd(), rounds=rounds, kills=kill, coordinator=coordinator))


def run_example(folder: Path) -> int:
    """Run a replica that submits the app of `folder` once it leads: the main of ``server_app.py``.

    Parameters
    ----------
    folder : Path
        Of the Flower app; its ``pyproject.toml`` holds the settings unless ``--config`` names others.

    Returns
    -------
    int
        Exit status.
    """
    example = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @example.command()
    def run(
        replica_id: Annotated[int, typer.Option("--id", help="Which replica of the settings this process is.")],
        config: ConfigOption = None,
        rerun: Annotated[
            bool, typer.Option("--rerun", help="Submit the app though the cluster has a run of it.")
        ] = False,
        run_config: Annotated[
            str, typer.Option("--run-config", help="Values for the run, as `flwr run --run-config` takes them.")
        ] = "",
    ) -> None:
        """Run one replica; the leader submits this app unless the cluster has a run of it already."""
        from flwr_ha.superlink.submit import submit

        is_submitted = False

        def when_leading(life: Life) -> None:
            nonlocal is_submitted
            is_again = rerun and not is_submitted
            submit(folder, life.database, life.superlink.private_port, is_rerun=is_again, run_config=run_config)
            is_submitted = True

        named = config or (None if "FLWR_HA_CONFIG" in os.environ else folder / "pyproject.toml")
        start_replica(load_settings(named), replica_id, when_leading=when_leading)

    return run_guarded(example)
