"""Do something now and then beside everything else."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Periodic(ABC):
    """Act again and again in a thread of its own; a context manager.

    Parameters
    ----------
    name : str
        Of the thread, and in the log.
    first_s, every_s : float
        Seconds until it acts first, and from the end of one time to the next.
    """

    def __init__(self, name: str, *, first_s: float, every_s: float) -> None:
        self._name = name
        self._first_s = first_s
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()  # the thread is not waited for: a store or a peer may not answer it

    @abstractmethod
    def act(self) -> None:
        """Do it once; an error is logged, and it is done again the next time."""

    def _run(self) -> None:
        pause_s = self._first_s
        while not self._stop.wait(pause_s):
            pause_s = self._every_s
            try:
                self.act()
            except Exception:
                log.exception("%s: not this time", self._name)
