"""Start a ServerApp again that was killed: a few times per term, with growing pauses."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from flwr_ha.errors import HaError
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.superlink import linkstate
from flwr_ha.superlink.events import ServerAppDied

FIRST_PAUSE_S = 0.1
PAUSE_FACTOR = 5.0
LONGEST_PAUSE_S = 15.0  # Flower itself fails a run whose ServerApp has been silent for half a minute
_MOST_FACTORS = 64  # the power of a thousand failures, some hours of them, is no float any more


def growing_pause_s(failures: int, *, first_s: float, factor: float, longest_s: float) -> float:
    """Return how long to wait before the next attempt, in seconds, after any number of earlier failures from 0."""
    return min(first_s * factor ** min(failures, _MOST_FACTORS), longest_s)


class Restarts:
    """Count and carry out the restarts of one replica.

    Parameters
    ----------
    limit : int
        Restarts of one run in one term, from 0.
    events : EventLog
        Gets one entry per death.
    """

    def __init__(self, *, limit: int, events: EventLog) -> None:
        self._limit = limit
        self._events = events
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, str], int] = {}
        self._timers: set[threading.Timer] = set()

    def restart(self, database: Path, death: ServerAppDied, *, term: int) -> None:
        """Put the run's task back to pending after a pause, or let the run fail where the limit is reached."""
        with self._lock:
            count = self._counts.get((term, death.run_id), 0)
            self._counts[term, death.run_id] = count + 1
        if count >= self._limit:
            times = "once" if count == 1 else f"{count} times"
            reason = f"{_why(death)}; it was started again {times} in term {term}, the limit: the run fails"
            self._events.add("error", reason, run_id=death.run_id)
            self._act(death, lambda: linkstate.fail_task(database, death.task_id, reason=reason))
            return
        pause_s = growing_pause_s(count, first_s=FIRST_PAUSE_S, factor=PAUSE_FACTOR, longest_s=LONGEST_PAUSE_S)
        self._events.add("serverapp-died", f"{_why(death)}; it starts again in {pause_s:g} s", run_id=death.run_id)
        note = f"{_why(death)}: it starts again (restart {count + 1} of {self._limit} in term {term})"
        timer = threading.Timer(
            pause_s, self._act, (death, lambda: linkstate.requeue_task(database, death.task_id, note=note))
        )
        timer.name = f"restart-{death.run_id}"
        with self._lock:
            self._timers.add(timer)
        timer.start()

    def _act(self, death: ServerAppDied, act: Callable[[], bool]) -> None:
        try:
            act()
        except (HaError, sqlite3.Error, OSError) as error:
            self._events.add("error", f"the death of a ServerApp cannot be dealt with: {error}", run_id=death.run_id)

    def close(self) -> None:
        """Call off the restarts that wait."""
        with self._lock:
            timers = list(self._timers)
            self._timers.clear()
        for timer in timers:
            timer.cancel()
            timer.join()


def _why(death: ServerAppDied) -> str:
    how = f"was ended by signal {-death.status}" if death.status < 0 else f"ended with status {death.status}"
    return f"the ServerApp of run {death.run_id} {how} without a result"
