"""Whether the disk of this replica can keep what a leader writes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flwr_ha.model import Head

LEAST_BYTES = 8 * 1024**2  # the databases and logs of a SuperLink need some room as well
RECOVERY_FACTOR = 1.5  # a disk at the limit must not make the leadership go to and fro


def needed_bytes(heads: Iterable[Head]) -> int:
    """Return the bytes that must be free: room for the next checkpoint of each run that goes on."""
    going_on = (head.size_bytes for head in heads if head.position.server_round < head.num_rounds)
    return max(LEAST_BYTES, sum(going_on))


@dataclass(slots=True)
class DiskWatch:
    """Look at the free space of a folder now and then.

    Attributes
    ----------
    folder : Path
        Where the blobs lie.
    trouble : str
        Why the disk is no good, a sentence; empty where it is good.
    """

    folder: Path
    trouble: str = ""

    def look(self, needed_bytes: int) -> bool:
        """Look again, and return whether `trouble` began or ended.

        Parameters
        ----------
        needed_bytes : int
            Free bytes without which the disk counts as full; half as many again make it good again.
        """
        was_good = not self.trouble
        self.trouble = self._why_bad(needed_bytes if was_good else int(needed_bytes * RECOVERY_FACTOR))
        return was_good != (not self.trouble)

    def _why_bad(self, needed_bytes: int) -> str:
        try:
            status = os.statvfs(self.folder)
        except OSError as error:
            return f"the disk of {self.folder} does not answer: {error.strerror}"
        if status.f_flag & os.ST_RDONLY:
            return f"the disk of {self.folder} is mounted read-only"
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes < needed_bytes:
            free_mb, needed_mb = free_bytes / 1e6, needed_bytes / 1e6
            return f"the disk of {self.folder} is full: {free_mb:.1f} MB are free, {needed_mb:.1f} MB are needed"
        return ""
