"""Flower as it is: one ``flower-superlink`` and its SuperNodes."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import Program, wait_until


class PlainFlower(LocalCluster):
    """Run a plain SuperLink where `LocalCluster` runs replicas.

    Parameters
    ----------
    folder : Path
        Data and logs.
    supernodes : int
        Their number.
    """

    def __init__(self, folder: Path, *, supernodes: int) -> None:
        super().__init__(folder, Plan(replicas=1, supernodes=supernodes, is_embedded=True))

    def start(self) -> None:
        """Start everything, and wait until the SuperLink answers."""
        self.start_coordinator()  # for Flower's configuration alone
        self.start_superlink()
        for index in range(self.plan.supernodes):
            self.start_supernode(index)

    def start_superlink(self) -> float:
        """Start the SuperLink and return the seconds until it serves."""
        start_s = time.monotonic()
        port = self.address.rpartition(":")[2]
        command = [str(self._bin / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", port]
        self.replicas[0] = Program(
            "flower-superlink",
            [*command, "--database", str(self.folder / "state.db")],
            log_file=self.folder / "logs" / "superlink.log",
            environment=self.environment,
        )
        wait_until(lambda: is_serving(self.address), timeout_s=120.0, what="flower-superlink", poll_s=0.01)
        return time.monotonic() - start_s


def is_serving(address: str) -> bool:
    """Whether a SuperLink answers requests there."""
    try:
        return httpx.get(f"http://{address}/", timeout=5.0, trust_env=False).status_code < 500
    except httpx.HTTPError:
        return False
