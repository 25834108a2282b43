"""A ZooKeeper ensemble on this machine, for a first try, the demo and the tests.

For production see `zookeeper/compose.yaml` and `zookeeper/zoo.cfg`: there each node belongs on a
machine of its own.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.superlink.tether import tethered

LOGGER = logging.getLogger(__name__)

DEBIAN_JAR = Path("/usr/share/java/zookeeper.jar")
MAIN_CLASS = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
JAVA_OPTIONS = ("-Xmx96m", "-Xss512k", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")
HOW_TO_GET_IT = (
    "install it with `apt-get install zookeeper`, or install Java, unpack a release of Apache ZooKeeper "
    "and set ZOOKEEPER_HOME to its folder"
)
# The kernel hands out ports from 32768 on for outgoing connections; those below stay free until we bind them.
PORT_RANGE = (15000, 32000)
ANSWER_TIMEOUT_S = 0.5
POLL_S = 0.05


def free_ports(count: int) -> tuple[int, ...]:
    """Return `count` different TCP ports of 127.0.0.1 on which nobody listens."""
    with ExitStack() as probes:
        ports: list[int] = []
        while len(ports) < count:
            port = PORT_RANGE[0] + secrets.randbelow(PORT_RANGE[1] - PORT_RANGE[0])
            probe = probes.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports.append(port)
    return tuple(ports)


def find_zookeeper(home: Path | None = None) -> str | None:
    """Return the Java class path of an installed ZooKeeper, or None where there is none.

    Parameters
    ----------
    home : Path, optional
        Folder of an unpacked release (the caller reads ZOOKEEPER_HOME); it wins over Debian's package.
    """
    if home is not None and any((home / "lib").glob("zookeeper-*.jar")):
        return f"{home / 'conf'}:{home / 'lib'}/*"
    if DEBIAN_JAR.exists():
        return f"{DEBIAN_JAR}:{DEBIAN_JAR.with_name('slf4j-nop.jar')}"
    return None


def require_zookeeper(home: Path | None = None) -> str:
    """Return the class path as `find_zookeeper` does.

    Raises
    ------
    ConfigError
        Java or ZooKeeper is missing; the message says how to get them, show it to the user.
    """
    class_path = find_zookeeper(home)
    if class_path is None:
        raise ConfigError(f"ZooKeeper was not found on this machine: {HOW_TO_GET_IT}")
    if shutil.which("java") is None:
        raise ConfigError(f"Java was not found on the PATH, ZooKeeper needs it: {HOW_TO_GET_IT}")
    return class_path


def four_letter_word(port: int, word: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
    """Return what the ZooKeeper node on 127.0.0.1:`port` answers; empty where it does not."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(word.encode())
            with connection.makefile("rb") as answer:
                return answer.read().decode(errors="replace")
    except OSError:
        return ""


def node_mode(port: int) -> str:
    """Return ``leader``, ``follower``, ``standalone``, or empty when the node does not serve."""
    lines = four_letter_word(port, "srvr").splitlines()
    return next((line.removeprefix("Mode: ").strip() for line in lines if line.startswith("Mode: ")), "")


class LocalEnsemble:
    """Run ZooKeeper nodes as child processes; a context manager that stops them at its end.

    The nodes end with this process, however it ends: each gets SIGKILL when the *thread* that
    started it is gone. So start them from a thread that lives as long as they should.

    Parameters
    ----------
    folder : Path
        Configuration, data and log of each node go into ``node-<index>`` below it. Its data is
        taken up again where it exists.
    size : int
        Number of nodes; 1 makes a standalone server.
    client_ports : sequence of int, optional
        Port for clients of each node on 127.0.0.1; free ones by default.
    tick_time_ms : int
        ZooKeeper's time unit, in milliseconds; sessions of 2 ticks to 60 s are allowed.
    is_durable : bool
        Whether each write reaches the disk before it counts. False is for tests only.
    home : Path, optional
        Folder of an unpacked release, see `find_zookeeper`.

    Raises
    ------
    ConfigError
        Java or ZooKeeper is missing, or the number of ports is not `size`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 3,
        client_ports: Sequence[int] | None = None,
        tick_time_ms: int = 200,
        is_durable: bool = False,
        home: Path | None = None,
    ) -> None:
        if client_ports is not None and len(client_ports) != size:
            raise ConfigError(f"{size} ZooKeeper nodes need {size} client ports, {len(client_ports)} are given")
        self._class_path = require_zookeeper(home)
        self._folder = folder.absolute()
        self._tick_time_ms = tick_time_ms
        self._is_durable = is_durable
        self._peer_ports = free_ports(2 * size)
        self.client_ports: tuple[int, ...] = tuple(client_ports) if client_ports else free_ports(size)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._frozen: set[int] = set()

    @property
    def connect_string(self) -> str:
        """Addresses of all nodes, as ZooKeeper clients take them."""
        return ",".join(f"127.0.0.1:{port}" for port in self.client_ports)

    def __enter__(self) -> Self:
        """Start all nodes."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop all nodes."""
        self.stop()

    def start(self) -> None:
        """Write the configuration and start all nodes; `wait_ready` says when they serve.

        Raises
        ------
        ConfigError
            A port is taken; the message names it.
        """
        for port in self.client_ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise ConfigError(f"port {port} for ZooKeeper is taken on 127.0.0.1: {error.strerror}") from error
        for index in range(len(self.client_ports)):
            self._write_configuration(index)
        for index in range(len(self.client_ports)):
            self.start_node(index)

    def start_node(self, index: int) -> None:
        """Start one node, counted from 0; nothing happens when it runs already."""
        if self.is_running(index):
            return
        folder = self._node_folder(index)
        java = ["java", *JAVA_OPTIONS, "-cp", self._class_path, MAIN_CLASS, str(folder / "zoo.cfg")]
        log: IO[bytes]
        with (folder / "zookeeper.log").open("ab") as log:
            self._processes[index] = subprocess.Popen(
                tethered(java),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, not for the nodes
            )

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until one node leads and all running ones serve.

        Raises
        ------
        CoordinationError
            They do not serve after `timeout_s` seconds, or one has ended; its log tells why.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            for index, process in self._processes.items():
                if process.poll() not in (None, -signal.SIGKILL):
                    raise CoordinationError(
                        f"ZooKeeper node {index} ended, see {self._node_folder(index) / 'zookeeper.log'}"
                    )
            modes = [node_mode(self.client_ports[index]) for index in self._answering()]
            if all(modes) and ("leader" in modes or modes == ["standalone"]):
                LOGGER.info("the local ZooKeeper ensemble is ready: %s", self.connect_string)
                return
            if time.monotonic() >= deadline_s:
                raise CoordinationError(f"the local ZooKeeper ensemble did not serve within {timeout_s:g} s")
            time.sleep(POLL_S)

    def is_running(self, index: int) -> bool:
        """Return whether the node's process lives, frozen or not."""
        return index in self._processes and self._processes[index].poll() is None

    def leader_index(self) -> int | None:
        """Return which node leads, counted from 0; None during an election."""
        for index in self._answering():
            if node_mode(self.client_ports[index]) in ("leader", "standalone"):
                return index
        return None

    def kill(self, index: int) -> None:
        """End one node with SIGKILL and wait until it is gone."""
        self._processes[index].kill()
        self._processes[index].wait()
        self._frozen.discard(index)

    def freeze(self, index: int) -> None:
        """Stop one node with SIGSTOP: its connections stay, it answers nothing."""
        self._processes[index].send_signal(signal.SIGSTOP)
        self._frozen.add(index)

    def thaw(self, index: int) -> None:
        """Let a frozen node go on."""
        self._processes[index].send_signal(signal.SIGCONT)
        self._frozen.discard(index)

    def stop(self) -> None:
        """End all nodes and wait until they are gone; may be called twice."""
        for index in self._processes:
            self.kill(index)  # ZooKeeper is made for it: what it has acknowledged is on disk
        self._processes.clear()

    def _answering(self) -> tuple[int, ...]:
        return tuple(index for index in sorted(self._processes) if index not in self._frozen and self.is_running(index))

    def _node_folder(self, index: int) -> Path:
        return self._folder / f"node-{index}"

    def _write_configuration(self, index: int) -> None:
        folder = self._node_folder(index)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        tick_ms = self._tick_time_ms
        lines = [
            f"tickTime={tick_ms}",
            f"initLimit={max(5, 5000 // tick_ms)}",
            f"syncLimit={max(2, 2000 // tick_ms)}",
            f"minSessionTimeout={2 * tick_ms}",
            "maxSessionTimeout=60000",
            f"dataDir={folder / 'data'}",
            "clientPortAddress=127.0.0.1",
            f"clientPort={self.client_ports[index]}",
            "admin.enableServer=false",
            "4lw.commands.whitelist=srvr,mntr,ruok,conf,cons,wchs",
            "maxClientCnxns=0",
            "autopurge.snapRetainCount=3",
            "autopurge.purgeInterval=24",
        ]
        if not self._is_durable:
            lines += ["forceSync=no", "preAllocSize=1024"]
        size = len(self.client_ports)
        if size > 1:
            (folder / "data" / "myid").write_text(f"{index + 1}\n")
            peers, elections = self._peer_ports[:size], self._peer_ports[size:]
            lines += [f"server.{n + 1}=127.0.0.1:{peers[n]}:{elections[n]}" for n in range(size)]
        (folder / "zoo.cfg").write_text("\n".join(lines) + "\n")
