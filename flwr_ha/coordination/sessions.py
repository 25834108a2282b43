"""Locks by which the processes of one machine see each other die."""

from __future__ import annotations

import fcntl
import uuid
from pathlib import Path


def lock_path(folder: Path, session: str) -> Path:
    """Return the file that the process of the session holds a lock on."""
    return folder / f"session-{session}.lock"


def is_lock_held(folder: Path, session: str) -> bool:
    """Return whether the process that began the session lives, frozen or not."""
    try:
        with lock_path(folder, session).open("rb") as file:
            # A shared lock, so that two processes that look at the same time do not take each other for the owner.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


class SessionLock:
    """Hold the lock of a new session; the kernel frees it when the process ends.

    It is a ``flock``, which belongs to the open file: child processes made by `subprocess` do not
    inherit it, and two sessions of one process see each other's locks.
    """

    def __init__(self, folder: Path) -> None:
        self.session = uuid.uuid4().hex
        self._path = lock_path(folder, self.session)
        self._file = self._path.open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Free the lock and remove its file."""
        self._path.unlink(missing_ok=True)
        self._file.close()
