"""The agent's handle of its SuperLink child: start it, open and close its public socket, notice its end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from flwr_ha.errors import ConfigError, HaError
from flwr_ha.superlink import events, procfs
from flwr_ha.superlink.lease import Lease
from flwr_ha.superlink.settings import SuperLinkSettings

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_S = 5.0


class SuperLinkProcess:
    """Run one SuperLink child; a new one is made for each start.

    Parameters
    ----------
    settings : SuperLinkSettings
        How it is run.
    on_event : callable
        Gets each event, in order, from the thread that owns the child: it must return at once (put the event on a
        queue) and must not call the blocking methods of this object.

    Notes
    -----
    The child is started by a thread of its own that lives exactly as long: the kernel kills the child when the
    thread that started it ends (prctl(2), PR_SET_PDEATHSIG), and that must be never too early and never too late.
    """

    def __init__(self, settings: SuperLinkSettings, *, on_event: Callable[[events.Event], None]) -> None:
        self._settings = settings
        self._on_event = on_event
        self._lease = Lease.create()
        self._channel, self._child_end = socket.socketpair()
        self._sending = threading.Lock()
        self._opened: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._spawned = threading.Event()
        self._ready = threading.Event()
        self._exited = threading.Event()
        self._is_wanted = False
        self._private_port = 0
        self._error: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._record: procfs.ChildRecord | None = None
        self._thread = threading.Thread(target=self._own, name="superlink-child", daemon=True)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self.record.pid

    @property
    def private_port(self) -> int:
        """Port on 127.0.0.1 that the SuperLink serves; 0 until it is ready."""
        return self._private_port

    @property
    def record(self) -> procfs.ChildRecord:
        """Identify the child to the other replicas of this machine, see `procfs.kill_stale_child`."""
        if self._record is None:
            raise RuntimeError("the SuperLink child was not started")
        return self._record

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self._spawned.is_set() and not self._exited.is_set()

    def start(self) -> None:
        """Start the child on a fresh database; does not wait until it is ready.

        Raises
        ------
        ConfigError
            The database or the log file cannot be written: change ``data-dir``.
        """
        self._settings.prepare()
        self._thread.start()
        self._spawned.wait()
        if self._error is not None:
            self._thread.join()
            self.close()
            raise ConfigError(f"the SuperLink cannot be started: {self._error}.") from self._error

    def wait_ready(self, timeout_s: float) -> int:
        """Wait until the SuperLink serves its private port.

        Parameters
        ----------
        timeout_s : float
            Seconds to wait at most; a cold start takes about 3.

        Returns
        -------
        int
            The private port.

        Raises
        ------
        HaError
            It ended or is not ready in time: look into its log file, start a new one.
        """
        if not self._ready.wait(timeout_s) or self._exited.is_set():
            raise HaError(
                f"the SuperLink has ended or is not ready after {timeout_s:g} s; see {self._settings.log_file}."
            )
        return self._private_port

    def set_lease(self, deadline_s: float) -> None:
        """Let the child lead until then; 0 takes the leadership from it within milliseconds.

        Parameters
        ----------
        deadline_s : float
            ``time.monotonic()`` seconds, counted from before the request that renewed the lease.
        """
        self._lease.deadline_s = deadline_s

    def open_public(self, address: str, timeout_s: float) -> None:
        """Have the child listen on the public address; the lease must have been set before.

        Parameters
        ----------
        address : str
            ``host:port``.
        timeout_s : float
            Seconds to go on trying while another process, such as the last leader's, holds the port.

        Raises
        ------
        ConfigError
            The address is not one of this machine, or may not be used: change ``address``.
        HaError
            The port is still taken, the lease has run out, or the child does not answer: see `procfs.kill_stale_child`
            for an old leader on this machine, else give the leadership up.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._opened = queue.SimpleQueue()  # an answer to an earlier try is of no interest
            self._send("open", address=address)
            try:
                answer = self._opened.get(timeout=max(0.05, deadline_s - time.monotonic()))
            except queue.Empty:
                raise HaError(f"the SuperLink does not answer; see {self._settings.log_file}.") from None
            if answer["op"] == "opened":
                return
            why = f"the public address {address} cannot be listened on: {answer['why']}"
            if answer["errno"] not in (errno.EADDRINUSE, 0):
                raise ConfigError(f"{why} (see address in [[tool.flwr-ha.replicas]]).")
            if answer["errno"] == 0 or time.monotonic() >= deadline_s:
                raise HaError(f"{why}.")
            self._exited.wait(0.01)

    def close_public(self, timeout_s: float) -> bool:
        """End the lease, close the public socket and abort its connections.

        Parameters
        ----------
        timeout_s : float
            Seconds to wait for the child's word.

        Returns
        -------
        bool
            Whether it is closed for certain; if not, `kill` the child.
        """
        self._lease.deadline_s = 0.0
        self._closed.clear()
        self._send("close")
        return self._closed.wait(timeout_s) or self._exited.is_set()

    def answer(self, serial: int, *, is_replicated: bool) -> None:
        """Answer a `ReplicateRequested`: no turns the waiting answers into 503."""
        self._send("replicated", id=serial, ok=is_replicated)

    def kill(self, timeout_s: float) -> None:
        """Kill the child and all that it started, and wait until they are gone; may be called again.

        Parameters
        ----------
        timeout_s : float
            Seconds to wait at most.

        Raises
        ------
        HaError
            A process is still there: it hangs in the kernel, the machine needs a person.
        """
        self._is_wanted = True
        self._lease.deadline_s = 0.0
        # Only the thread that waits for the child kills it: nobody else knows that its number is still its own.
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise HaError(f"process {self.pid} of the SuperLink cannot be killed.")

    def close(self) -> None:
        """Kill the child and give the shared memory back; the object is of no use afterwards."""
        self.kill(_KILL_TIMEOUT_S)
        with self._sending:
            self._channel.close()
            self._child_end.close()
        self._lease.close()

    def _send(self, op: str, **fields: Any) -> None:
        line = json.dumps({"op": op, **fields}).encode() + b"\n"
        # The child's end may be gone or, when it is frozen, full; both show in other events.
        with self._sending, contextlib.suppress(OSError):
            self._channel.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _own(self) -> None:
        """Start the child, pass its messages on, and see it end; the whole life of the thread."""
        try:
            self._process = self._spawn()
            self._record = procfs.record_of(self._process.pid)
        except OSError as error:
            self._error = error
            self._spawned.set()
            return
        self._child_end.close()
        self._spawned.set()
        try:
            self._listen()
        finally:
            if not procfs.kill_tree(self._process.pid, _KILL_TIMEOUT_S):
                logger.error("a process that SuperLink %d started cannot be killed", self._process.pid)
            returncode = self._process.wait()
            self._exited.set()
            self._ready.set()  # whoever waits for it need not wait any longer
            self._on_event(events.ChildExited(returncode=returncode, is_wanted=self._is_wanted))

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptors = (self._child_end.fileno(), self._lease.descriptor)
        with self._settings.log_file.open("ab") as log:
            return subprocess.Popen(
                self._settings.command(channel_fd=descriptors[0], lease_fd=descriptors[1]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env=self._settings.environment(os.environ),
                start_new_session=True,  # Ctrl-C on the terminal is the agent's to handle
            )

    def _listen(self) -> None:
        buffer, heard_s, pinged_s, is_frozen = b"", time.monotonic(), 0.0, False
        while True:
            now_s = time.monotonic()
            if self._ready.is_set() and now_s - pinged_s >= self._settings.ping_interval_s:
                pinged_s = now_s
                self._send("ping")
            readable, _, _ = select.select([self._channel], [], [], self._settings.ping_interval_s)
            if readable:
                try:
                    data = self._channel.recv(65536)
                except ConnectionResetError:  # it died before it had read all that we sent
                    return
                if not data:
                    return
                heard_s, is_frozen = time.monotonic(), False
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._handle(json.loads(line))
            elif self._ready.is_set() and not is_frozen and now_s - heard_s > self._settings.frozen_after_s:
                is_frozen = True
                self._on_event(events.ChildFrozen(silent_s=now_s - heard_s))

    def _handle(self, message: dict[str, Any]) -> None:
        match message:
            case {"op": "ready", "port": port}:
                self._private_port = port
                self._ready.set()
                self._on_event(events.ChildReady(private_port=port))
            case {"op": "opened" | "open-failed"}:
                self._opened.put(message)
            case {"op": "closed", "why": why, "is_asked": is_asked}:
                self._closed.set()
                if not is_asked:
                    self._on_event(events.PublicClosed(why=why))
            case {"op": "replicate", "id": serial}:
                self._on_event(events.ReplicateRequested(serial=serial))
            case {"op": "serverapp-died", "task_id": task_id, "run_id": run_id, "status": status}:
                self._on_event(events.ServerAppDied(task_id=task_id, run_id=run_id, status=status))
