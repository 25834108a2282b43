"""Carry out single faults on a cluster of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from flwr_ha.config import load_secret
from flwr_ha.local.cluster import LocalCluster
from flwr_ha.storage.blobs import BlobStore

BALLAST = "ballast"


def store_of(cluster: LocalCluster, replica_id: int) -> BlobStore:
    """Return the blobs on the disk of a replica, seen by a process that has verified none of them."""
    return BlobStore(cluster.settings.replica_dir(replica_id) / "store")


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of a file and leave its times as they were, as a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position % status.st_size)
        (byte,) = file.read(1)
        file.seek(position % status.st_size)
        file.write(bytes([byte ^ 1 << position % 8]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path, fraction: float) -> None:
    """Cut a file short, to a fraction of its bytes."""
    os.truncate(path, int(path.stat().st_size * fraction))


def ask_switchover(cluster: LocalCluster, candidate: int) -> None:
    """Ask for a planned switchover to a replica."""
    own = cluster.settings.replica(candidate)
    headers = {"Authorization": f"Bearer {load_secret(cluster.settings)}"}
    answer = httpx.post(
        f"http://{own.api}/switchover", json={"candidate": candidate}, headers=headers, timeout=10.0, trust_env=False
    )
    answer.raise_for_status()


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Give a folder a file system of its own, in memory; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, timeout=10.0)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10.0)


def fill_disk(folder: Path, *, free_bytes: int = 0) -> None:
    """Leave no more than `free_bytes` free on the file system of a folder."""
    status = os.statvfs(folder)
    size_bytes = status.f_bavail * status.f_frsize - free_bytes
    with (folder / BALLAST).open("wb") as file, suppress(OSError):
        while size_bytes > 0:
            size_bytes -= file.write(bytes(min(size_bytes, 1 << 20)))


def empty_disk(folder: Path) -> None:
    """Take away what `fill_disk` put there."""
    (folder / BALLAST).unlink(missing_ok=True)
