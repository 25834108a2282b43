"""A ServerApp that says so in the log and then only waits."""

import threading

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for as long as the run is configured to."""
    print("the sleeper sleeps", flush=True)
    threading.Event().wait(float(context.run_config["seconds"]))
    print("the sleeper is done", flush=True)
