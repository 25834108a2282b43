"""Submit the app of a folder to a SuperLink, unless the cluster has a run of this very bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from flwr_ha.superlink import linkstate
from flwr_ha.superlink.tasks import WITHDRAWN
from flwr_ha.superlink.tether import tethered
from flwr_ha.superlink.watch import RunRow, TaskState

log = logging.getLogger(__name__)
TIMEOUT_S = 120.0


def submit(folder: Path, database: Path, private_port: int, *, is_rerun: bool, run_config: str = "") -> bool:
    """Run this module in a process of its own, since the agent does not import Flower.

    Parameters
    ----------
    folder : Path
        Of the Flower app.
    database : Path
        Database of the SuperLink, which knows the runs of the cluster.
    private_port : int
        Port of the SuperLink on 127.0.0.1.
    is_rerun : bool
        Whether to submit the app though there is a run of it.
    run_config : str
        What ``flwr run --run-config`` takes; empty: the app's own values.

    Returns
    -------
    bool
        Whether the cluster has the run now. If not, the log says why: try again later.
    """
    command = [sys.executable, "-m", __name__, str(folder), str(database), str(private_port), str(int(is_rerun))]
    command += [run_config] if run_config else []
    try:
        done = subprocess.run(tethered(command), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        log.error("the app in %s could not be submitted within %.0f s", folder, TIMEOUT_S)
        return False
    if done.returncode == 0:
        log.info("%s", done.stdout.strip())
    else:
        log.error("the app in %s could not be submitted: %s", folder, (done.stdout + done.stderr).strip())
    return done.returncode == 0


def run_of(fab_hash: str, runs: Iterable[RunRow]) -> RunRow | None:
    """Return the first run of an app's bundle, passing over submissions that were not acknowledged."""
    for run in runs:
        is_withdrawn = run.state is TaskState.STOPPED and run.details == WITHDRAWN
        if run.fab_hash == fab_hash and not is_withdrawn:
            return run
    return None


def _main(folder: str, database: str, private_port: str, is_rerun: str, run_config: str = "") -> int:
    from flwr.cli.build import build_fab_from_disk

    fab_hash = hashlib.sha256(build_fab_from_disk(Path(folder))).hexdigest()
    known = run_of(fab_hash, linkstate.summary(Path(database)).runs)
    if known is not None and is_rerun == "0":
        print(f"the cluster has run {known.run_id} ({known.state}) of this very app: nothing is submitted")
        return 0
    with tempfile.TemporaryDirectory() as home:
        connection = (
            f'[superlink]\ndefault = "ha"\n[superlink.ha]\naddress = "127.0.0.1:{private_port}"\ninsecure = true\n'
        )
        (Path(home) / "config.toml").write_text(connection, encoding="utf-8")
        flwr = Path(sys.executable).with_name("flwr")
        options = ["--run-config", run_config] if run_config else []
        done = subprocess.run(
            tethered([str(flwr), "run", folder, "ha", "--format", "json", *options]),
            env={**os.environ, "FLWR_HOME": home},
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        run_id = json.loads(done.stdout)["run-id"]
    except (ValueError, KeyError):
        print(done.stdout, done.stderr)
        return 1
    print(f"submitted the app in {folder} as run {run_id}")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(*sys.argv[1:]))
