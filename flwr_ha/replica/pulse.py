"""The heartbeat of a replica: renew the lease, publish the own record, read the cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from flwr_ha.coordination.coordinator import Coordinator, View
from flwr_ha.coordination.values import Record
from flwr_ha.errors import ConfigError, CoordinationError, FencedError
from flwr_ha.model import Head, LeadershipChange
from flwr_ha.replica.agent import Agent
from flwr_ha.replica.clusterview import running_replicas
from flwr_ha.replica.disk import DiskWatch, needed_bytes
from flwr_ha.replica.holdings import Holdings
from flwr_ha.replica.messages import Crashed, Fenced, FitnessChanged, Renewed, Seen, StopAsked
from flwr_ha.superlink.procfs import ChildRecord

log = logging.getLogger(__name__)
SHORTEST_GAP_S = 0.05
FOLLOW_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Hold what was last read of the cluster, for everybody who answers from memory.

    Attributes
    ----------
    view : View
        What the coordinator held.
    history : tuple of LeadershipChange
        Newest last.
    logs : mapping of str to tuple of Head
        Newest commits of each run, oldest first; `CommitLogs.is_read` says whether they are all here.
    read_s : float
        Monotonic time before it was read; minus infinity before the first time.
    """

    view: View = field(default_factory=View)
    history: tuple[LeadershipChange, ...] = ()
    logs: Mapping[str, tuple[Head, ...]] = field(default_factory=dict)
    read_s: float = float("-inf")


class Pulse:
    """Talk to the coordinator at least every `interval_s`, sooner when something changed there.

    Parameters
    ----------
    agent : Agent
        Gets the events.
    coordinator : Coordinator
        Joined already.
    holdings : Holdings
        Follows the committed heads, in a thread of its own: it may pull large blobs.
    make_record : callable
        Returns what this replica publishes.
    wake : threading.Event
        Set when the coordinator may have news.
    interval_s : float
        A fraction of the session timeout.
    """

    def __init__(
        self,
        agent: Agent,
        coordinator: Coordinator,
        holdings: Holdings,
        *,
        make_record: Callable[[], Record],
        wake: threading.Event,
        interval_s: float,
    ) -> None:
        self.sight = Sight()
        self.renewed_s = time.monotonic()  # before the leadership was last proved
        self._agent = agent
        self._coordinator = coordinator
        self._holdings = holdings
        self._make_record = make_record
        self._interval_s = interval_s
        self._wake = wake
        self._stop = threading.Event()
        self._trouble = ""
        self._disk = DiskWatch(agent.tools.store.root)
        self._superlinks: dict[int, ChildRecord] = {}
        self._published: Record | None = None
        self._published_s = float("-inf")
        self._threads = [
            threading.Thread(target=self._beat_for_ever, name="pulse"),
            threading.Thread(target=self._follow_for_ever, name="holdings"),
            threading.Thread(target=self._read_for_ever, name="commit-logs"),
        ]

    def wake(self) -> None:
        """Look at the coordinator soon; from any thread."""
        self._wake.set()

    def __enter__(self) -> Pulse:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()

    def is_alive(self) -> bool:
        """Whether its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def last_superlinks(self) -> tuple[ChildRecord, ...]:
        """Return the SuperLinks that the other replicas were last seen with, also of those that are gone."""
        return tuple(self._superlinks.values())

    def _beat_for_ever(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._interval_s)
            self._wake.clear()
            try:
                self._beat()
                self._settle_trouble("")
            except CoordinationError as error:
                self._agent.tools.meter.on_coordinator_error()
                self._settle_trouble(str(error))
            except ConfigError as error:
                self._agent.post(StopAsked(str(error)))
            except Exception as error:
                log.exception("the pulse failed in a way that was not foreseen")
                self._agent.post(Crashed(f"{type(error).__name__}: {error}"))
            self._stop.wait(SHORTEST_GAP_S)  # many changes at once are read once

    def _settle_trouble(self, trouble: str) -> None:
        """Say once that the coordinator is away, and once that it is back."""
        if bool(trouble) != bool(self._trouble):
            message = f"the coordinator does not answer: {trouble}" if trouble else "the coordinator answers again"
            self._agent.tools.events.add("coordinator", message)
        self._trouble = trouble

    def _beat(self) -> None:
        office = self._agent.office
        record = self._make_record()
        if office is not None:
            leadership = office.leadership
            try:
                before_s = time.monotonic()
                until_s = self._coordinator.renew(leadership, record)
                self.renewed_s = before_s
                self._agent.post(Renewed(leadership.term, until_s))
                self._published = None
            except FencedError as error:
                self._agent.post(Fenced(leadership.term, str(error)))
        else:
            self._publish(record)
        read_s = time.monotonic()
        view = self._coordinator.view()
        self._remember(view, read_s)
        self._agent.post(self._seen(view))

    def _publish(self, record: Record) -> None:
        """Write the own record when it changed, and look now and then whether it is still there."""
        now_s = time.monotonic()
        if record != self._published or now_s - self._published_s > 4 * self._interval_s:
            self._coordinator.publish(record)
            self._published, self._published_s = record, now_s

    def _remember(self, view: View, read_s: float) -> None:
        for replica_id, record in view.replicas.items():
            if replica_id != self._agent.settings.id and record.get("superlink"):
                self._superlinks[replica_id] = ChildRecord.from_json(record["superlink"])
        old = self.sight
        logs = self._holdings.logs.follow(view.heads)
        is_new_term = view.term != old.view.term or old.read_s == float("-inf")
        history = self._coordinator.history() if is_new_term else old.history
        self.sight = Sight(view=view, history=history, logs=logs, read_s=read_s)

    def _seen(self, view: View) -> Seen:
        switchover = view.switchover
        candidate = switchover.candidate if switchover is not None else None
        if candidate not in running_replicas(view):
            candidate = None
        return Seen(
            leader=view.leader.replica_id if view.leader is not None else None,
            term=view.term,
            is_paused=view.is_paused and switchover is None,
            candidate=candidate,
        )

    def _follow_for_ever(self) -> None:
        while not self._stop.wait(FOLLOW_EVERY_S):
            try:
                self._look_at_disk()
                before = self._holdings.holds
                self._holdings.follow(self.sight.view, is_leader=self._agent.office is not None)
                if self._holdings.holds != before:
                    self.wake()  # publish it
            except Exception:
                log.exception("the holdings cannot be followed this time")

    def _read_for_ever(self) -> None:
        """Read what a heartbeat leaves of long commit logs, as after a start."""
        while not self._stop.wait(FOLLOW_EVERY_S):
            try:
                while not self._stop.is_set() and self._holdings.logs.read_rest():
                    self.wake()  # show it
            except CoordinationError:
                continue  # the pulse tells
            except Exception:
                log.exception("the commit logs cannot be read this time")

    def _look_at_disk(self) -> None:
        if self._disk.look(needed_bytes(self.sight.view.heads.values())):
            self._agent.tools.events.add("disk", self._disk.trouble or "the disk has room again")
            self._agent.post(FitnessChanged(self._disk.trouble))
