"""Share one number between the agent and its SuperLink: until when the replica may lead."""

from __future__ import annotations

import mmap
import os
import time
from typing import Self

_SIZE_BYTES = 4096


class Lease:
    """Hold the end of the leadership in memory that two processes share.

    The agent moves it forward; the SuperLink stops by itself once it has passed, though the agent be frozen.

    Parameters
    ----------
    descriptor : int
        Open descriptor of the shared memory; the lease owns it from now on.

    Notes
    -----
    The value is a ``CLOCK_MONOTONIC`` time in seconds, which all processes of a machine share. It is read and
    written as one aligned 8-byte word, so that no reader sees half of a new value.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE_BYTES)
        self._words = memoryview(self._memory).cast("d")

    @classmethod
    def create(cls) -> Self:
        """Return a new lease that has run out already."""
        descriptor = os.memfd_create("flwr-ha-lease")
        os.ftruncate(descriptor, _SIZE_BYTES)
        return cls(descriptor)

    @property
    def deadline_s(self) -> float:
        """Return until when the replica may lead, ``time.monotonic()`` seconds; 0 means not at all."""
        return float(self._words[0])

    @deadline_s.setter
    def deadline_s(self, value: float) -> None:
        self._words[0] = value

    @property
    def is_valid(self) -> bool:
        """Whether the replica may lead at this moment."""
        return time.monotonic() < self.deadline_s

    def close(self) -> None:
        """Give the memory back; the other process keeps its own view."""
        self._words.release()
        self._memory.close()
        os.close(self.descriptor)
