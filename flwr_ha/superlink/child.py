"""The SuperLink child: Flower's own app in a process of its own, public only while its replica leads.

Started by `flwr_ha.superlink.process` as ``python -m flwr_ha.superlink.child SETTINGS`` with SETTINGS a JSON object.
It talks with the agent in JSON lines over an inherited socket:

* agent to child: ``open`` (address), ``close``, ``replicated`` (id, ok), ``ping``
* child to agent: ``ready`` (port), ``opened``, ``open-failed`` (errno, why), ``closed`` (why, is_asked),
  ``replicate`` (id), ``serverapp-died`` (task_id, run_id, status), ``pong``

When the agent goes away the child, SuperExec and every ServerApp go with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import sqlite3
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr_ha.superlink.database import connect, data_version
from flwr_ha.superlink.gate import Gate, Replication
from flwr_ha.superlink.lease import Lease
from flwr_ha.superlink.public import PublicListener, listening_sockets
from flwr_ha.superlink.tasks import WITHDRAWN, stop_run
from flwr_ha.superlink.taskwait import PendingTasks
from flwr_ha.superlink.tether import die_with_parent
from flwr_ha.superlink.watch import unsigned

logger = logging.getLogger(__name__)
_FILES = 65_536


class Channel:
    """Exchange JSON lines with the agent; the end of the channel is the end of this process.

    Parameters
    ----------
    descriptor : int
        Inherited end of the socket pair.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = threading.Lock()

    def send(self, op: str, **fields: Any) -> None:
        """Send one message; may be called by any thread."""
        with self._lock:
            self._socket.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the agent sends until it goes away."""
        with self._socket.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)


class Child:
    """Tie Flower's server, the public socket and the agent together; lives in the event loop's thread.

    Parameters
    ----------
    settings : dict
        What `flwr_ha.superlink.process` passes on the command line.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._database = Path(settings["database"])
        self._lease = Lease(settings["lease_fd"])
        self._channel = Channel(settings["channel_fd"])
        self._loop = asyncio.get_running_loop()
        (self._private,) = listening_sockets(f"127.0.0.1:{settings['private_port']}")
        self._private_port: int = self._private.getsockname()[1]

    async def serve(self) -> None:
        """Serve until the process is told to end."""
        from flwr_ha.superlink import flower

        app = flower.create_app(
            database=self._database,
            port=self._private_port,
            has_supernode_auth=self._settings["has_supernode_auth"],
            on_report=self._report_death,
        )
        connection = connect(self._database)
        self._replication = Replication(
            lambda serial: self._channel.send("replicate", id=serial),
            lambda: data_version(connection),
            self._settings["replicate_timeout_s"],
        )
        gate = Gate(
            app,
            lease=self._lease,
            private_port=self._private_port,
            replication=self._replication,
            withdraw=lambda answer: self._withdraw(flower.started_run(answer)),
            has_task=PendingTasks(self._database),
        )
        self._server = flower.Server(gate, on_started=self._started)
        await self._server.serve(sockets=[self._private])

    def _started(self) -> None:
        self._public = PublicListener(
            lease=self._lease,
            make_protocol=self._server.make_protocol,
            connections=self._public_connections,
            on_closed=lambda why: self._channel.send("closed", why=why, is_asked=False),
            tls=_tls(self._settings["tls"]),
        )
        threading.Thread(target=self._listen, name="agent-channel", daemon=True).start()
        self._channel.send("ready", port=self._private_port)

    def _listen(self) -> None:
        """Pass the agent's messages on; end the process with the agent."""
        for message in self._channel.messages():
            self._loop.call_soon_threadsafe(self._handle, message)
        # SuperExec and the ServerApps are tethered to this process, so nothing is left to tidy up.
        os._exit(0)

    def _handle(self, message: dict[str, Any]) -> None:
        match message:
            case {"op": "ping"}:
                self._channel.send("pong")
            case {"op": "replicated", "id": serial, "ok": is_replicated}:
                self._replication.answer(serial, is_replicated=is_replicated)
            case {"op": "open", "address": address}:
                self._opening = self._loop.create_task(self._open(address))
            case {"op": "close"}:
                self._public.close()
                self._channel.send("closed", why="the agent closed it", is_asked=True)
            case _:
                logger.error("the agent sent an unknown message: %s", message)

    async def _open(self, address: str) -> None:
        if not self._lease.is_valid:
            self._channel.send("open-failed", errno=0, why="the lease has run out")
            return
        try:
            await self._public.open(address)
        except OSError as error:
            self._channel.send("open-failed", errno=error.errno or 0, why=error.strerror or str(error))
        else:
            self._channel.send("opened")

    def _withdraw(self, run_id: str) -> None:
        """End a run whose submission is not acknowledged; in a thread of its own."""
        try:
            stop_run(self._database, run_id, reason=WITHDRAWN)
        except sqlite3.Error as error:  # its answer is a refusal all the same
            logger.error("run %s was not acknowledged and cannot be withdrawn: %s", run_id, error)
        else:
            logger.warning("run %s was withdrawn: %s", run_id, WITHDRAWN)

    def _public_connections(self) -> Iterator[asyncio.Transport]:
        for transport in self._server.transports():
            if transport.get_extra_info("sockname")[1] != self._private_port:
                yield transport

    def _report_death(self, report: dict[str, Any] | None) -> None:
        """Tell the agent of a ServerApp that ended without a result; called by the thread that reads the reports."""
        if report is None:
            logger.error("SuperExec has ended: this SuperLink ends too, a warm standby takes over faster")
            os._exit(1)
        # A finished task has no token any more, so what is found here has not reported a result.
        with closing(connect(self._database)) as connection:
            query = "SELECT task_id, run_id FROM task WHERE token = ? AND finished_at IS NULL"
            row = connection.execute(query, (report["token"],)).fetchone()
        if row is not None:
            task_id, run_id = unsigned(row[0]), unsigned(row[1])
            logger.warning("the ServerApp of run %s ended without a result, status %s", run_id, report["status"])
            self._channel.send("serverapp-died", task_id=task_id, run_id=run_id, status=report["status"])


def _tls(files: dict[str, str] | None) -> ssl.SSLContext | None:
    if files is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["cert"], files["key"])
    return context


async def _serve(settings: dict[str, Any]) -> None:
    await Child(settings).serve()


def _raise_file_limit() -> None:
    """Allow a connection for each of thousands of SuperNodes: shells give 1,024 files, and may give more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Run the child until its agent goes away."""
    settings = json.loads(sys.argv[1])
    die_with_parent(settings["agent_pid"])
    _raise_file_limit()
    handler = logging.StreamHandler()  # to the log file, beside what Flower writes there
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("flwr_ha").addHandler(handler)
    logging.getLogger("flwr_ha").setLevel(logging.INFO)
    asyncio.run(_serve(settings))


if __name__ == "__main__":
    main()
