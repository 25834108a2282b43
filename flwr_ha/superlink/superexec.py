"""Run Flower's SuperExec so that its ServerApps die with it and their deaths are noticed.

Run as ``python -m flwr_ha.superlink.superexec PARENT_PID REPORT_FD …``, followed by the arguments of
``flower-superexec``. Each process that it started and that has ended is reported as one JSON line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

from flwr_ha.superlink.tether import die_with_parent, tethered


class TetheredPopen:
    """Start processes as ``subprocess.Popen`` does, tethered to this one, and report how they end.

    Parameters
    ----------
    report_fd : int
        Descriptor that the JSON lines ``{"token": …, "status": …}`` are written to.
    """

    def __init__(self, report_fd: int) -> None:
        self._report_fd = report_fd

    def __call__(self, args: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        """Start a process; must be called by a thread that lives as long as the process may."""
        process: subprocess.Popen[bytes] = subprocess.Popen(tethered(args), stdin=subprocess.DEVNULL, **kwargs)
        token = args[args.index("--token") + 1]
        threading.Thread(target=self._report, args=(process, token), name=f"wait-{process.pid}", daemon=True).start()
        return process

    def _report(self, process: subprocess.Popen[bytes], token: str) -> None:
        line = json.dumps({"token": token, "pid": process.pid, "status": process.wait()})
        os.write(self._report_fd, f"{line}\n".encode())  # shorter than PIPE_BUF: lines of two threads do not mix


def main() -> None:
    """Run SuperExec until it is killed."""
    parent_pid, report_fd = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    sys.argv = ["flower-superexec", *sys.argv[3:]]
    executor = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    # The executor builds Flower's command line and starts it with `subprocess.Popen`; only the start is ours.
    vars(executor)["subprocess"] = SimpleNamespace(Popen=TetheredPopen(report_fd), DEVNULL=subprocess.DEVNULL)
    importlib.import_module("flwr.supercore.cli.flower_superexec").flower_superexec()


if __name__ == "__main__":
    main()
