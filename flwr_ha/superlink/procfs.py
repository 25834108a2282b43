"""Look at and end processes of this machine without ever hitting the wrong one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD_MODULE = "flwr_ha.superlink.child"

_PROC = Path("/proc")
_LISTENING = "0A"  # TCP_LISTEN of <linux/tcp.h>, as /proc/net/tcp shows it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRecord:
    """Identify a SuperLink child beyond doubt: process ids are used again, this is not.

    Attributes
    ----------
    pid : int
        Process id in its own namespace.
    start_time : int
        When it started, clock ticks since boot.
    boot_id : str
        The kernel's id of this boot.
    namespace : int
        Number of the process-id namespace: containers of one machine count process ids separately.
    """

    pid: int
    start_time: int
    boot_id: str
    namespace: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is published to the other replicas."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChildRecord:
        """Return the record that ``to_json`` described."""
        return cls(**value)


def record_of(pid: int) -> ChildRecord:
    """Return the record of a process.

    Raises
    ------
    ProcessLookupError
        There is no such process.
    """
    start_time = _start_time(pid)
    if start_time is None:
        raise ProcessLookupError(f"there is no process {pid}")
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ChildRecord(pid=pid, start_time=start_time, boot_id=boot_id, namespace=namespace)


def kill_stale_child(record: ChildRecord, timeout_s: float) -> bool:
    """Kill the SuperLink child of an older term that still holds the shared public port of this machine.

    The caller makes sure that the record is of an older term. A frozen child cannot close its socket by itself, and
    with it die SuperExec and the ServerApps of that term.

    Parameters
    ----------
    record : ChildRecord
        What the old leader published of its child.
    timeout_s : float
        Seconds to wait until it is gone.

    Returns
    -------
    bool
        Whether such a child was found and is gone; False when it is of another machine, boot or container, is gone
        already, or is not a SuperLink child of ours.
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except OSError:
        return False
    try:
        # From here on the descriptor names one process for good, whatever becomes of its number.
        with contextlib.suppress(OSError):
            if record_of(record.pid) != record or not _is_child(record.pid):
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return _wait_gone(record.pid, record.start_time, timeout_s)
        return False
    finally:
        os.close(descriptor)


def listens_on(pid: int, port: int) -> bool:
    """Whether a process of this machine, which may be frozen, holds a listening TCP socket of this port."""
    inodes: set[str] = set()
    with contextlib.suppress(OSError):
        for name in ("tcp", "tcp6"):
            for line in (_PROC / str(pid) / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
        return any(_link(file) in inodes for file in (_PROC / str(pid) / "fd").iterdir())
    return False


def _link(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:
        return ""  # closed meanwhile


def kill_tree(pid: int, timeout_s: float) -> bool:
    """Kill a process and all its descendants, and wait until they are gone.

    Parameters
    ----------
    pid : int
        A child of the caller that the caller has not waited for yet, so that its number is its own.
    timeout_s : float
        Seconds to wait at most.

    Returns
    -------
    bool
        Whether all are gone.
    """
    doomed = descendants(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for other, start_time in doomed.items():
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(other)
            try:
                if _start_time(other) == start_time:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
    deadline_s = time.monotonic() + timeout_s
    return all(_wait_gone(other, start_time, deadline_s - time.monotonic()) for other, start_time in doomed.items())


def descendants(pid: int) -> dict[int, int]:
    """Return the processes that a process and its descendants have started, with their start times."""
    parents: dict[int, tuple[int, int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and (fields := stat_fields(int(folder.name))) is not None:
            parents[int(folder.name)] = (int(fields[1]), int(fields[19]))
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for other, (its_parent, start_time) in parents.items():
            if its_parent == parent and other not in found:
                found[other] = start_time
                waiting.append(other)
    return found


def stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on, see proc(5); None when the process is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # a program's name may contain blanks and brackets


def _start_time(pid: int) -> int | None:
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "XZ" else int(fields[19])


def _is_child(pid: int) -> bool:
    return CHILD_MODULE.encode() in (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")


def _wait_gone(pid: int, start_time: int, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while _start_time(pid) == start_time:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True
