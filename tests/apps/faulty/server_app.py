"""A ServerApp that fails in the way that it is told to."""

import os
import signal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Raise an error, or die as the kernel's out-of-memory killer ends a process."""
    if context.run_config["how"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the user's code has a bug in line 42")
