"""The agent: one loop thread that feeds the state machine and does what it says."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr_ha.coordination.coordinator import Leadership
from flwr_ha.errors import CoordinationError, HaError
from flwr_ha.failpoints import reach
from flwr_ha.replica.duties import Duties, Tools
from flwr_ha.replica.machine import MachineState, Phase, Timing, step
from flwr_ha.replica.messages import (
    Action,
    Campaign,
    Elected,
    Event,
    Exit,
    ExtendLease,
    NotElected,
    Resign,
    StandDown,
    StartSuperLink,
    SuperLinkGone,
    SuperLinkReady,
    TakeOver,
    TakeoverFailed,
    Tick,
    TookOver,
)
from flwr_ha.replica.restarts import growing_pause_s
from flwr_ha.settings import ReplicaSettings
from flwr_ha.superlink import events
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.procfs import ChildRecord

log = logging.getLogger(__name__)
TICK_S = 0.05
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Hold one life of the SuperLink; nothing of it is used by the next one.

    Attributes
    ----------
    superlink : SuperLinkProcess
        The process.
    database : Path
        Its database. Another life has another one, so that duties of a term that is over cannot take
        the fresh, empty database of the next life for a control plane.
    token : str
        Opens the session API to the ServerApps of this life.
    """

    superlink: SuperLinkProcess
    database: Path
    token: str


MakeLife = Callable[[Callable[[events.Event], None]], Life]
"""Make a SuperLink, not started, from the receiver of its events."""


@dataclass(frozen=True, slots=True)
class Office:
    """Hold what belongs to one term of this replica.

    Attributes
    ----------
    leadership : Leadership
        What the coordinator granted.
    duties : Duties
        What is done with it.
    """

    leadership: Leadership
    duties: Duties


class Agent:
    """Run one replica until it is asked to stop.

    Parameters
    ----------
    settings : ReplicaSettings
        Of this replica.
    tools : Tools
        Its parts.
    make_life : callable
        Makes one life of the SuperLink.
    proven_until : callable
        Says until when an election that began at a monotonic time proves the leadership, see `Store`.
    timing : Timing
        Waits of the state machine.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        tools: Tools,
        make_life: MakeLife,
        *,
        proven_until: Callable[[float], float],
        timing: Timing,
    ) -> None:
        self.settings = settings
        self.tools = tools
        self.state = MachineState(replica_id=settings.id)
        self.office: Office | None = None
        self.life: Life | None = None
        self.beat_s = time.monotonic()
        self.list_stale: Callable[[], Sequence[ChildRecord]] = tuple
        self.when_leading: Callable[[Life], None] | None = None
        self.when_replicate: Callable[[Life, events.ReplicateRequested], None] | None = None
        self.when_serverapp_died: Callable[[Life, events.ServerAppDied], None] | None = None
        self._make_life = make_life
        self._proven_until = proven_until
        self._timing = timing
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker = ThreadPoolExecutor(max_workers=4, thread_name_prefix="office")
        self._start_due_s: float | None = None
        self._failed_starts = 0
        self._is_done = threading.Event()

    def post(self, event: Event) -> None:
        """Tell the state machine what happened; from any thread."""
        self._events.put(event)

    @property
    def is_leader(self) -> bool:
        """Whether this replica serves and its lease has not run out."""
        state = self.state
        return state.phase is Phase.LEADING and time.monotonic() < state.lease_until_s

    def run(self) -> None:
        """Loop until `Exit`; ends the SuperLink in any case."""
        self._perform(StartSuperLink("first start"))
        try:
            while not self._is_done.is_set():
                self._advance(self._next_event())
                self._start_superlink_if_due()
        finally:
            self._end_superlink()
            self.tools.storage.close()  # a takeover may be in the middle of a big checkpoint
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _next_event(self) -> Event:
        try:
            return self._events.get(timeout=TICK_S)
        except queue.Empty:
            return Tick()

    def _advance(self, event: Event) -> None:
        now_s = time.monotonic()
        self.beat_s = now_s
        before = self.state
        # A lease that has run out counts first, whatever else waits in the queue.
        for each in (Tick(), event) if not isinstance(event, Tick) else (event,):
            self.state, actions = step(self.state, each, now_s=now_s, timing=self._timing)
            for action in actions:
                self._perform(action)
        if self.state.phase is not before.phase:
            self._note_role(before)

    def _note_role(self, before: MachineState) -> None:
        after = self.state
        self.tools.events.add(
            "role", f"{before.phase.value} -> {after.phase.value} (term {after.term})", term=after.term
        )

    def _perform(self, action: Action) -> None:
        log.debug("replica %s: %s", self.settings.id, action)
        match action:
            case Campaign(reason=reason):
                self._worker.submit(self._campaign, reason)
            case TakeOver(term=term):
                self._worker.submit(self._take_over, term)
            case ExtendLease(until_s=until_s):
                if self.life is not None:
                    self.life.superlink.set_lease(until_s)
            case StandDown(term=term, reason=reason):
                self._stand_down(term, reason)
            case Resign(term=term, reason=reason):
                self._worker.submit(self._resign, partial(self.tools.coordinator.disown, term), reason)
            case StartSuperLink():
                failed = self._failed_starts
                pause_s = growing_pause_s(failed, first_s=FIRST_PAUSE_S, factor=2.0, longest_s=LONGEST_PAUSE_S)
                self._start_due_s = time.monotonic() + (pause_s if failed else 0.0)
            case Exit(reason=reason):
                self.tools.events.add("stop", reason)
                self._is_done.set()

    def _campaign(self, reason: str) -> None:
        before_s = time.monotonic()
        coordinator = self.tools.coordinator
        try:
            leadership = coordinator.campaign(reason)
        except HaError as error:
            self.post(NotElected(str(error)))
            return
        except Exception as error:
            log.exception("the campaign failed in a way that was not foreseen")
            self.post(NotElected(f"{type(error).__name__}: {error}"))
            return
        life = self.life
        if leadership is None or life is None:
            self.post(NotElected("another replica leads"))
            return
        self.office = Office(leadership, Duties(self.tools, leadership, life.superlink, life.database))
        reach("takeover.elected")
        self.tools.events.add("elected", f"term {leadership.term}: {reason}", term=leadership.term)
        self.post(Elected(leadership.term, self._proven_until(before_s)))
        try:
            coordinator.forget_history(leadership.term)
        except HaError as error:
            log.debug("the history is shortened at the next election: %s", error)

    def _take_over(self, term: int) -> None:
        office, life = self.office, self.life
        if office is None or life is None or office.leadership.term != term:
            return  # the leadership was given up before its duties began
        try:
            office.duties.take_over(str(self.settings.address), self.list_stale())
        except HaError as error:
            self.post(TakeoverFailed(term, str(error)))
            return
        except Exception as error:
            log.exception("takeover failed in a way that was not foreseen")
            self.post(TakeoverFailed(term, f"{type(error).__name__}: {error}"))
            return
        self.tools.events.add("leading", f"serves {self.settings.address} in term {term}", term=term)
        self.post(TookOver(term))
        if self.when_leading is not None:
            # A daemon: the end of this process does not wait for what it does, and ends its programs.
            threading.Thread(target=self.when_leading, args=(life,), name="when-leading", daemon=True).start()

    def _stand_down(self, term: int, reason: str) -> None:
        office, self.office = self.office, None
        reach("stand-down.begin")
        self._end_superlink()  # first, so that nobody else serves before this one has ended
        reach("stand-down.after-kill")
        self.tools.events.add("stand-down", f"term {term}: {reason}", term=term)
        if office is not None:
            self._worker.submit(self._resign, partial(self.tools.coordinator.resign, office.leadership), reason)

    def _resign(self, act: Callable[[], None], reason: str) -> None:
        try:
            act()
        except CoordinationError as error:
            log.warning("the resignation (%s) did not get through, the session will end it: %s", reason, error)

    def _end_superlink(self) -> None:
        life, self.life = self.life, None
        if life is not None:
            life.superlink.close()

    def _start_superlink_if_due(self) -> None:
        if self._start_due_s is None or time.monotonic() < self._start_due_s or self._is_done.is_set():
            return
        self._start_due_s = None
        self._end_superlink()
        life = self._make_life(lambda event: self._on_superlink(life, event))
        self.life = life
        try:
            life.superlink.start()
        except HaError as error:
            self._failed_starts += 1
            self.post(SuperLinkGone(f"its SuperLink cannot be started: {error}"))

    def _on_superlink(self, life: Life, event: events.Event) -> None:
        """Pass on what the SuperLink of the present life says; from any thread."""
        if life is not self.life:
            return
        match event:
            case events.ChildReady():
                self._failed_starts = 0
                self.post(SuperLinkReady())
            case events.ChildExited(returncode=status):
                self._lose_superlink(f"its SuperLink ended with status {status}")
            case events.ChildFrozen(silent_s=silent_s):
                self._lose_superlink(f"its SuperLink has not answered for {silent_s:.1f} s")
            case events.PublicClosed(why=why):
                self._lose_superlink(f"its SuperLink closed the public address: {why}")
            case events.ReplicateRequested():
                if self.when_replicate is not None:
                    self.when_replicate(life, event)
            case events.ServerAppDied():
                if self.when_serverapp_died is not None:
                    self.when_serverapp_died(life, event)

    def _lose_superlink(self, reason: str) -> None:
        self._failed_starts += 1
        self.post(SuperLinkGone(reason))
