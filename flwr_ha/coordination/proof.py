"""How long a ZooKeeper session is safe: the argument behind a leader's lease."""

from __future__ import annotations

import threading
from collections import deque

REPORT_DELAY = 1 / 3
CLOCK_MARGIN = 1 / 20
SPACING = 1 / 24
KEPT = 64  # times SPACING: more than two session timeouts


class SessionProof:
    """Tell until when the session is safe, from the calls that ZooKeeper has answered.

    Notes
    -----
    ZooKeeper's leader ends a session when it has not heard of it for the session timeout T. A
    transaction goes through the leader but does not count as hearing of it: a client's activity is
    noted by the node that it is connected to, which reports it in the answer to the leader's next
    ping, at most tickTime/2 later. By default sessions have at least two ticks, so tickTime/2 <=
    T/4; we allow T/3 for it and the network.

    So one transaction alone proves little: after a pause of this process the session may end the
    moment after. But let an earlier call have begun at `a` and been answered T/3 or more before the
    transaction began. By then the leader had heard of it, and accepted it, for the session was
    alive when the transaction was applied. So the session lives until at least ``a + T``; we take
    off T/20 for clocks that run unequally. Calls every T/12 keep such an `a` at hand, so the
    lease is about T/2. A session that replaced a lost one began after `a` was answered, so the
    argument holds for it too. Connecting, to begin a session or to move it to another node, is
    heard by the leader itself before it is answered: there `a` may be as young as it likes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._connected: deque[float] = deque(maxlen=KEPT)

    def note_connecting(self, started_s: float) -> None:
        """Note a successful connection to a node by the time at which it was begun."""
        with self._lock:
            self._connected.append(started_s)

    def note(self, started_s: float, answered_s: float, timeout_s: float) -> None:
        """Note a call that was answered; times of ``time.monotonic()``, session timeout in seconds."""
        with self._lock:
            # Of many calls in a row a few are enough, so that those kept reach back far enough.
            if not self._answered or started_s >= self._answered[-1][0] + timeout_s * SPACING:
                self._answered.append((started_s, answered_s))

    def until(self, started_s: float, timeout_s: float) -> float:
        """Return until when a successful transaction that began at `started_s` proves the session alive."""
        latest_s = started_s - timeout_s * REPORT_DELAY
        with self._lock:
            starts = [begin_s for begin_s, answered_s in self._answered if answered_s <= latest_s]
            starts += [begin_s for begin_s in self._connected if begin_s <= started_s]
        return max(starts, default=started_s - timeout_s) + timeout_s * (1 - CLOCK_MARGIN)
