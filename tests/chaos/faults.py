"""Carry out single faults on a cluster of this machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from flwr_ha.config import load_secret
from flwr_ha.errors import HaError
from flwr_ha.local.cluster import LocalCluster
from flwr_ha.storage.blobs import BlobStore
from tests.chaos.evidence import Cluster

BALLAST = "ballast"
FREEZE, THAW = 0xC0045877, 0xC0045878  # FIFREEZE and FITHAW of linux/fs.h
BREATH_S = 0.05  # between two stalls, so that some writes get through


def store_of(cluster: Cluster, replica_id: int) -> BlobStore:
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


@contextmanager
def own_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Give a folder a file system of its own, on a file beside it; needs root and loop devices.

    Unlike `small_disk` it can be slowed down, see `slow_disk`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.with_name(f"{folder.name}.ext4")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    for command in (
        ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)],
        ["mount", "-o", "loop", str(image), str(folder)],
    ):
        done = subprocess.run(command, check=False, timeout=30.0, capture_output=True, text=True)
        if done.returncode != 0:
            raise HaError(f"a disk of its own needs root, mkfs.ext4 and loop devices: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30.0)
        image.unlink()


@contextmanager
def slow_disk(folder: Path, *, stall_s: float) -> Iterator[None]:
    """Freeze the file system of a folder again and again: a write to it waits for up to `stall_s` seconds."""
    is_over = threading.Event()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def stall() -> None:
        while not is_over.is_set():
            fcntl.ioctl(descriptor, FREEZE, 0)
            is_over.wait(stall_s)
            fcntl.ioctl(descriptor, THAW, 0)
            is_over.wait(BREATH_S)

    staller = threading.Thread(target=stall, name="slow-disk")
    staller.start()
    try:
        yield
    finally:
        is_over.set()
        staller.join()
        os.close(descriptor)


def fill_disk(folder: Path, *, free_bytes: int = 0) -> None:
    """Leave no more than `free_bytes` free on the file system of a folder."""
    status = os.statvfs(folder)
    left = status.f_bavail * status.f_frsize - free_bytes
    piece = 1 << 26
    with (folder / BALLAST).open("wb") as file:
        while left > 0 and piece >= status.f_frsize:
            size = min(left, piece)
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                left -= size
            except OSError:  # the file system needs some for itself
                piece //= 2


def empty_disk(folder: Path) -> None:
    """Take away what `fill_disk` put there."""
    (folder / BALLAST).unlink(missing_ok=True)
