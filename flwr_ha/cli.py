"""The ``flwr-ha`` command."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Group

from flwr_ha import cli_checkpoint, tables
from flwr_ha.config import load_settings, zookeeper_home_from_environment
from flwr_ha.console import ConfigOption, JsonLogOption, JsonOption, WatchOption, run_guarded, set_up_logging, show
from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.operator import Operator, RequestRefusedError
from flwr_ha.settings import Endpoint

if TYPE_CHECKING:
    from flwr_ha.replica.agent import Life
    from flwr_ha.settings import Settings

SWITCHOVER_TIMEOUT_S = 660.0
NOTICE_S = 5.0
POLL_S = 0.2

app = typer.Typer(
    name="flwr-ha",
    help="A highly available Flower: look at a cluster, operate it, run its replicas.",
    epilog="Exit status: 0 done, 1 refused or failed, 2 wrong use or wrong settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_checkpoint.app, name="checkpoint")


def main() -> None:
    """Run the command; errors become one sentence and an exit status."""
    raise SystemExit(run_guarded(app))


@app.command("list")
def list_cluster(config: ConfigOption = None, as_json: JsonOption = False, watch: WatchOption = False) -> None:
    """Show the replicas and the runs.

    Example: flwr-ha list --watch
    """
    operator = Operator(load_settings(config))
    show(
        lambda: operator.get("/cluster"),
        lambda cluster: Group(tables.replica_table(cluster), tables.run_table(cluster)),
        as_json=as_json,
        watch=watch,
    )


@app.command()
def history(config: ConfigOption = None, as_json: JsonOption = False, watch: WatchOption = False) -> None:
    """Show who led from when, and why the leadership changed.

    Example: flwr-ha history --json
    """
    operator = Operator(load_settings(config))
    show(lambda: operator.get("/history"), tables.history_table, as_json=as_json, watch=watch)


@app.command()
def switchover(
    candidate: Annotated[int | None, typer.Option(help="Id of the replica that shall lead; else any standby.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the new leader.")] = SWITCHOVER_TIMEOUT_S,
) -> None:
    """Hand the leadership over after the round that is running: nothing is lost, nothing is trained twice.

    Example: flwr-ha switchover --candidate 1
    """
    operator = Operator(load_settings(config))
    before = operator.get("/cluster")
    operator.post("/switchover", {"candidate": candidate})
    cluster = _wait_cluster(
        operator, lambda seen: seen["term"] > before["term"] and seen["leader"] is not None, timeout
    )
    if cluster is None:
        raise RequestRefusedError(
            f"the leadership has not changed within {timeout:g} s; it will after the running round: `flwr-ha list`"
        )
    if candidate is not None and cluster["leader"] != candidate:
        raise RequestRefusedError(
            f"replica {cluster['leader']} leads in term {cluster['term']}, not replica {candidate}: `flwr-ha history`"
        )
    if candidate is None and cluster["leader"] == before["leader"]:
        raise RequestRefusedError(
            f"replica {cluster['leader']} leads again in term {cluster['term']}: `flwr-ha history`"
        )
    print(json.dumps(cluster) if as_json else f"replica {cluster['leader']} leads in term {cluster['term']}")


def _wait_cluster(
    operator: Operator, condition: Callable[[dict[str, Any]], bool], timeout_s: float
) -> dict[str, Any] | None:
    """Return ``GET /cluster`` once `condition` is true of it, None where that takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        cluster: dict[str, Any] = operator.get("/cluster")
        if condition(cluster):
            return cluster
        if time.monotonic() >= deadline_s:
            return None
        time.sleep(POLL_S)


@app.command()
def pause(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Forbid automatic failover, for maintenance of the coordinator, say.

    Example: flwr-ha pause
    """
    _set_paused(True, "automatic failover is paused; `flwr-ha resume` allows it again", config, as_json)


@app.command()
def resume(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Allow automatic failover again.

    Example: flwr-ha resume
    """
    _set_paused(False, "automatic failover is on", config, as_json)


def _set_paused(is_paused: bool, message: str, config: Path | None, as_json: bool) -> None:
    operator = Operator(load_settings(config))
    operator.post("/pause" if is_paused else "/resume", {})
    if _wait_cluster(operator, lambda cluster: cluster["paused"] == is_paused, NOTICE_S) is None:
        raise RequestRefusedError(f"it was asked for, but the replicas do not show it after {NOTICE_S:g} s")
    print(json.dumps({"paused": is_paused}) if as_json else message)


@app.command()
def replica(
    replica_id: Annotated[int, typer.Option("--id", help="Which replica of the settings this process is.")],
    config: ConfigOption = None,
    as_json: JsonLogOption = False,
) -> None:
    """Run one replica in the foreground; SIGTERM and Ctrl-C hand the leadership over.

    Example: flwr-ha replica --id 0
    """
    set_up_logging(as_json=as_json)
    start_replica(load_settings(config), replica_id)


def start_replica(settings: Settings, replica_id: int, *, when_leading: Callable[[Life], bool] | None = None) -> None:
    """Run a replica; an unreachable coordinator is a wrong setting at start."""
    from flwr_ha.replica.main import run_replica

    try:
        run_replica(settings, replica_id, when_leading=when_leading)
    except CoordinationError as error:
        raise ConfigError(f"coordinator = {settings.coordinator!r}: {error}") from error


@app.command()
def zookeeper(
    folder: Annotated[Path, typer.Option(help="Where the nodes keep their data.")] = Path(".flwr-ha/zookeeper"),
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a local ZooKeeper ensemble in the foreground, on the ports of the coordinator setting; Ctrl-C ends it.

    Example: flwr-ha zookeeper
    """
    from flwr_ha.local.zookeeper import LocalEnsemble

    settings = load_settings(config)
    if settings.is_embedded:
        raise ConfigError("coordinator is embedded: no ZooKeeper is needed, start the replicas")
    set_up_logging(as_json=as_json)
    hosts = [Endpoint.parse(host, setting="coordinator") for host in settings.zookeeper_hosts.split(",")]
    if not all(host.is_loopback for host in hosts):
        raise ConfigError(f"coordinator = {settings.coordinator!r} names other machines: start ZooKeeper there")
    ports, home = [host.port for host in hosts], zookeeper_home_from_environment()
    ensemble = LocalEnsemble(
        folder.absolute(), size=len(ports), client_ports=ports, tick_time_ms=1000, is_durable=True, home=home
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ensemble:
            ensemble.wait_ready(60.0)
            hosts_text = ensemble.connect_string
            _tell({"serves": hosts_text}, f"ZooKeeper serves {hosts_text}; Ctrl-C ends it", as_json)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        _tell({"serves": None}, "ZooKeeper is ended; its data stays", as_json)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Folder for ca.crt, ca.key, server.crt, server.key.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A further name or address, a load balancer's say; repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long the certificates are good.", min=1)] = 365,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a development certificate authority, and a certificate for all addresses of the cluster.

    Called again it makes a new certificate, signed by the same authority.

    Example: flwr-ha certs certs --host flower.example.org
    """
    from flwr_ha.certs import write_certificates

    settings = load_settings(config, has_certificates=False)
    hosts = [endpoint.host for each in settings.replicas for endpoint in (each.address, each.api)]
    paths = write_certificates(folder, [*hosts, *(host or [])], days=days)
    if as_json:
        print(json.dumps([str(path) for path in paths]))
        return
    print(*paths, sep="\n")
    print(f'[tool.flwr-ha.tls]\nca = "{folder}/ca.crt"\ncert = "{folder}/server.crt"\nkey = "{folder}/server.key"')


def _tell(value: dict[str, Any], sentence: str, as_json: bool) -> None:
    print(json.dumps(value) if as_json else sentence, flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(help="Rounds to train.")] = 8,
    kill: Annotated[int, typer.Option(help="Leaders to kill on the way.")] = 1,
    coordinator: Annotated[str, typer.Option(help="zookeeper, embedded, or auto.")] = "auto",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show it: a cluster on this machine trains the MNIST CNN while its leader is killed.

    Runs the app of this folder; logs and data go to .flwr-ha/demo. With --json the report goes to
    standard output, and what happens to standard error.

    Example: flwr-ha demo --rounds 8 --kill 2 --coordinator embedded
    """
    from flwr_ha.demo.main import run_demo

    raise SystemExit(
        run_demo(Path.cwd(), rounds=rounds, kills=kill, coordinator=coordinator, config=config, as_json=as_json)
    )
