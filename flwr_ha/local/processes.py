"""Programs that a cluster on this machine consists of: started with a log file, ended for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from flwr_ha.errors import HaError
from flwr_ha.superlink.procfs import descendants
from flwr_ha.superlink.tether import tethered

POLL_S = 0.02
T = TypeVar("T")


class WaitTimeoutError(HaError):
    """What was waited for did not happen in time; the message says what it was and what was seen last."""


def wait_until(condition: Callable[[], T | None], *, timeout_s: float, what: str, poll_s: float = POLL_S) -> T:
    """Return the first true value of `condition`.

    Parameters
    ----------
    condition : callable
        Returns something false while it is not so yet.
    timeout_s : float
        Seconds to wait at most.
    what : str
        What is waited for, for the message.
    poll_s : float
        Pause between two looks, in seconds.

    Raises
    ------
    WaitTimeoutError
        It did not happen; the message names the last value.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline_s:
            raise WaitTimeoutError(f"{what}: not within {timeout_s:g} s (last seen: {value!r})")
        time.sleep(poll_s)


class Program:
    """Run one program; a context manager is not needed, since it ends with the thread that started it.

    Parameters
    ----------
    name : str
        For messages and the log file.
    command : sequence of str
        The program and its arguments.
    log_file : Path
        Gets its output, appended.
    environment : mapping
        Added to this process's environment.
    folder : Path, optional
        Where it runs.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                tethered(list(command)),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                cwd=folder,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def log_text(self) -> str:
        """Return what it has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def tree(self) -> tuple[int, ...]:
        """Return the process ids of the program and all that it has started, directly or not."""
        return (self.pid, *descendants(self.pid))

    def kill_tree(self) -> None:
        """Kill the program and all that it has started with SIGKILL, and wait."""
        pids = self.tree()
        for pid in pids:  # stopped first, so that none can react to the death of another
            _send(pid, signal.SIGSTOP)
        for pid in pids:
            _send(pid, signal.SIGKILL)
        self._process.wait()

    def kill(self) -> None:
        """Kill the program alone with SIGKILL, and wait."""
        _send(self.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone."""
        _send(self.pid, number)

    def stop(self, timeout_s: float) -> int:
        """Ask it to end with SIGTERM, and return its exit status; kill the tree when it does not in time."""
        _send(self.pid, signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_tree()
            raise WaitTimeoutError(f"{self.name} did not end within {timeout_s:g} s of SIGTERM") from None

    def wait(self, timeout_s: float) -> int:
        """Return the exit status once it has ended by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise WaitTimeoutError(f"{self.name} did not end within {timeout_s:g} s") from None

    def freeze(self) -> None:
        """Stop the whole tree with SIGSTOP."""
        for pid in self.tree():
            _send(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the whole tree go on."""
        for pid in self.tree():
            _send(pid, signal.SIGCONT)

    def find(self, words: str) -> int | None:
        """Return the process id of the first descendant whose command line holds `words`."""
        for pid in self.tree()[1:]:
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in line:
                    return pid
        return None


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
