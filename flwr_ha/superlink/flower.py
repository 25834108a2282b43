"""Start Flower's own SuperLink app; with `busy`, `repeatable` and `superexec` all that knows Flower's inside."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from flwr.proto.control_pb2 import StartRunResponse
from flwr.superlink import main as superlink
from flwr.superlink.config_loader import SuperLinkLifespanConfig

from flwr_ha.superlink.asgi import App
from flwr_ha.superlink.busy import make_patient
from flwr_ha.superlink.repeatable import make_repeatable

cli = importlib.import_module("flwr.superlink.cli.flower_superlink")  # the package exports a function by this name

OnReport = Callable[[dict[str, Any] | None], None]


def create_app(*, database: Path, port: int, has_supernode_auth: bool, on_report: OnReport) -> App:
    """Return Flower's app on a database; serving it starts SuperExec.

    Parameters
    ----------
    database : Path
        Database file, made and migrated here.
    port : int
        Private port on 127.0.0.1 that SuperExec and the ServerApps use.
    has_supernode_auth : bool
        Whether SuperNodes must be registered with their public keys.
    on_report : callable
        Called by a thread with each report of SuperExec, and with None when SuperExec has ended unasked.

    Returns
    -------
    callable
        ASGI app.
    """

    class Lifespan(_lifespan_class()):  # type: ignore[misc] # a class of Flower's that is only known at run time
        def _start_superexec_if_needed(self) -> None:
            command = cli._get_superexec_command(
                runtime_address=f"127.0.0.1:{port}",
                runtime_certificates=None,
                runtime_root_certificates_path=None,
                parent_pid=os.getpid(),
                runtime_dependency_install=self.config.runtime_dependency_install,
            )
            process: _SuperExec | None = _start_superexec(command[1:], on_report)
            self.superexec_process = process

        def shutdown(self) -> None:
            process, self.superexec_process = self.superexec_process, None
            if process is not None:
                process.is_wanted = False
                process.kill()
            super().shutdown()

    make_repeatable()
    make_patient()
    return cast(App, superlink.create_app(_config(database, port, has_supernode_auth), Lifespan))


def started_run(answer: bytes) -> str:
    """Return the run id in Flower's answer to a new run, unsigned decimal."""
    return str(StartRunResponse.FromString(answer).run_id)


def _lifespan_class() -> type[Any]:
    return cast(type[Any], cli.SuperLinkLifespan)


def _config(database: Path, port: int, has_supernode_auth: bool) -> SuperLinkLifespanConfig:
    """Let Flower parse a command line, so that its defaults and plugins are its own."""
    arguments = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--database", str(database)]
    sys.argv = ["flower-superlink", *arguments]
    config: SuperLinkLifespanConfig = cli._parse_superlink_lifespan_config()
    # Flower's command line wants TLS for it; TLS is on the public socket, which is not Flower's here.
    return dataclasses.replace(config, enable_supernode_auth=has_supernode_auth)


class _SuperExec(subprocess.Popen[bytes]):
    is_wanted = True


def _start_superexec(arguments: list[str], on_report: OnReport) -> _SuperExec:
    """Start SuperExec and a thread that reads its reports; called in the event loop's thread, which lives on."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "flwr_ha.superlink.superexec", str(os.getpid()), str(write_fd), *arguments]
    process = _SuperExec(command, stdin=subprocess.DEVNULL, pass_fds=(write_fd,), start_new_session=True)
    os.close(write_fd)

    def read() -> None:
        with os.fdopen(read_fd, "rb") as lines:
            for line in lines:
                on_report(json.loads(line))
        if process.is_wanted:
            on_report(None)

    threading.Thread(target=read, name="superexec-reports", daemon=True).start()
    return process


class Server(uvicorn.Server):
    """Run uvicorn on the private socket, and offer its protocol for another one.

    Parameters
    ----------
    app : callable
        ASGI app.
    on_started : callable
        Called once in the event loop when the private socket is served.
    """

    def __init__(self, app: App, *, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(cast(Any, app), log_config=None, access_log=False, lifespan="on", ws="none", workers=1)
        )
        self._on_started = on_started

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Start serving, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_started()

    def make_protocol(self) -> asyncio.Protocol:
        """Return a protocol for a new connection."""
        protocol = cast(Any, self.config.http_protocol_class)
        return cast(
            asyncio.Protocol,
            protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state),
        )

    def transports(self) -> Iterator[asyncio.Transport]:
        """Yield the transports of all open connections."""
        for connection in list(self.server_state.connections):
            yield cast(asyncio.Transport, cast(Any, connection).transport)
