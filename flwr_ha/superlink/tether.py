"""Tie the life of a process to the life of its parent.

Run as a script, ``python -I -S tether.py PARENT_PID COMMAND …`` becomes COMMAND: the parent-death signal survives
``execve``. That is how a ServerApp gets it without running Python code between ``fork`` and ``exec``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone.

    Parameters
    ----------
    parent_pid : int
        Process id of the parent that must live. When it is gone already, this process ends at once.

    Raises
    ------
    OSError
        The kernel refused the request: do not go on, an orphan could outlive its term.

    Notes
    -----
    The signal is sent when the *thread* that started this process ends (prctl(2), PR_SET_PDEATHSIG), so a parent
    starts such a process from a thread that lives as long as the process may.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    # The parent may have died before the call; the kernel does not make up for that.
    if os.getppid() != parent_pid:
        os._exit(1)


def tethered(command: list[str]) -> list[str]:
    """Return the command line that runs a command tethered to the calling process.

    Parameters
    ----------
    command : list of str
        Program, found on the PATH, and its arguments.

    Returns
    -------
    list of str
        Arguments for ``subprocess.Popen``.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - a list that we build, no shell
