"""Files by which the processes of one machine see each other die."""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from pathlib import Path

EXPIRY = struct.Struct("d")


def session_path(folder: Path, session: str) -> Path:
    """Return the file of the session: locked by its process, with the time at which its lease ends in it."""
    return folder / f"session-{session}.lock"


def is_alive(folder: Path, session: str, *, now_s: float) -> bool:
    """Return whether the process that began the session lives and is not frozen for too long.

    Parameters
    ----------
    folder : Path
        Where its file is.
    session : str
        Which session.
    now_s : float
        The time of ``time.monotonic()``, which is the same for all processes since the machine started.
    """
    try:
        with session_path(folder, session).open("rb", buffering=0) as file:
            # A shared lock, so that two processes that look at the same time do not take each other for the owner.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _expiry(folder, session) > now_s
    except FileNotFoundError:
        return False
    return False


def _expiry(folder: Path, session: str) -> float:
    try:
        expires_s: float = EXPIRY.unpack(session_path(folder, session).read_bytes())[0]
    except (FileNotFoundError, struct.error):
        return 0.0
    return expires_s


class SessionFile:
    """Hold the lock of a new session; the kernel frees it when the process ends.

    It is a ``flock``, which belongs to the open file: child processes made by `subprocess` do not
    inherit it, and two sessions of one process see each other's locks.
    """

    def __init__(self, folder: Path, *, expires_s: float) -> None:
        self.session = uuid.uuid4().hex
        self._path = session_path(folder, self.session)
        self._file = self._path.open("wb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.extend(expires_s)

    def extend(self, expires_s: float) -> None:
        """Let the lease end at `expires_s` of ``time.monotonic()``."""
        os.pwrite(self._file.fileno(), EXPIRY.pack(expires_s), 0)

    def release(self) -> None:
        """Free the lock and remove the file."""
        self._path.unlink(missing_ok=True)
        self._file.close()
