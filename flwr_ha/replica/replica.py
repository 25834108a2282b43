"""One replica as its API shows it: answers from memory, and the ServerApps' way to a commit."""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr_ha.coordination.values import Record
from flwr_ha.errors import CoordinationError, FencedError
from flwr_ha.model import Head, ReplicaState, RunState, RunStatus
from flwr_ha.replica.agent import Agent, Life, Office
from flwr_ha.replica.api import RefusedError
from flwr_ha.replica.clusterview import cluster_json, running_replicas
from flwr_ha.replica.duties import Tools
from flwr_ha.replica.measure import measure
from flwr_ha.replica.messages import RunSettled, SuperLinkGone, SwitchoverAsked
from flwr_ha.replica.pulse import Pulse
from flwr_ha.replica.restarts import Restarts
from flwr_ha.replica.runs import RunBoard
from flwr_ha.settings import Settings
from flwr_ha.superlink.events import ReplicateRequested, ServerAppDied
from flwr_ha.superlink.watch import Watch

WATCH_EVERY_S = 0.5
LOOP_PATIENCE_S = 5.0


class Replica:
    """Answer for one replica; safe from any thread.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    agent : Agent
        Decides and acts.
    tools : Tools
        The parts of this replica.
    wake : threading.Event
        Set when the coordinator may have news.
    pulse_s : float
        How often the lease is renewed, in seconds.
    """

    def __init__(
        self, settings: Settings, agent: Agent, tools: Tools, *, wake: threading.Event, pulse_s: float
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._tools = tools
        self._board = RunBoard()
        self._restarts = Restarts(limit=settings.serverapp_restarts, events=tools.events)
        self._control = ThreadPoolExecutor(max_workers=1, thread_name_prefix="control-plane")
        self._observed: Future[bool] | None = None
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch_for_ever, name="watch")
        agent.when_replicate = self._on_replicate
        agent.when_serverapp_died = self._on_serverapp_died
        self.pulse = Pulse(
            agent,
            tools.coordinator,
            tools.holdings,
            make_record=self.record,
            wake=wake,
            interval_s=pulse_s,
        )
        agent.list_stale = self.pulse.last_superlinks

    def __enter__(self) -> Replica:
        self.pulse.__enter__()
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._restarts.close()
        self._control.shutdown(wait=True, cancel_futures=True)
        self.pulse.__exit__(None, None, None)

    # --- what is published and shown ---

    def record(self) -> Record:
        """Return what this replica publishes in the coordinator."""
        is_elected = self._agent.office is not None
        is_up = is_elected or self._agent.state.is_warm
        return {
            "id": self._tools.replica_id,
            "state": (ReplicaState.RUNNING if is_up else ReplicaState.STARTING).value,
            "lag_rounds": self._tools.holdings.lag_rounds,
            "checked": self._tools.holdings.checked,
            "holds": self._tools.holdings.holds,
            "runs": [status.to_json() for status in self._board.statuses()] if is_elected else [],
            "knows_runs": is_elected and self._board.is_complete,
            "superlink": _identity(self._agent.life),
        }

    def is_leader(self) -> bool:
        """Whether this replica leads and its lease has not run out."""
        return self._agent.is_leader

    def is_standby(self) -> bool:
        """Whether this replica runs and does not lead."""
        return self._agent.office is None and self._agent.state.is_warm

    def lag_rounds(self) -> int:
        """Return how many committed rounds are missing here."""
        return self._tools.holdings.lag_rounds

    def why_not_alive(self) -> str:
        """Return why the process should be restarted, or an empty text."""
        if time.monotonic() - self._agent.beat_s > LOOP_PATIENCE_S:
            return "the loop thread does not answer"
        return "" if self.pulse.is_alive() else "the coordination thread has ended"

    def why_not_ready(self) -> str:
        """Return why this replica could not lead, or an empty text."""
        if time.monotonic() - self.pulse.sight.read_s > self._settings.session_timeout_s:
            return "the coordinator does not answer"
        if self._agent.state.unfit:
            return self._agent.state.unfit
        if not self._agent.state.is_warm and not self._agent.state.is_elected:
            return "the SuperLink is not ready"
        return ""

    def cluster(self) -> dict[str, Any]:
        """Return the answer of ``GET /cluster``."""
        sight = self.pulse.sight
        return cluster_json(self._settings, sight.view, sight.logs)

    def commits(self, run_id: str) -> list[dict[str, Any]] | None:
        """Return the newest commits of a run, oldest first; None where the cluster has no commit of it."""
        log = self.pulse.sight.logs.get(run_id)
        if log is not None and not self._tools.holdings.logs.is_read(run_id):
            raise CoordinationError(f"the rounds of run {run_id} are still being read, try again in a few seconds")
        return None if log is None else [head.to_json() for head in log]

    def history(self) -> list[dict[str, Any]]:
        """Return the leadership changes, newest last."""
        return [change.to_json() for change in self.pulse.sight.history]

    def events_after(self, number: int) -> list[dict[str, Any]]:
        """Return the newer events, oldest first."""
        return self._tools.events.after(number)

    def metrics(self) -> bytes | None:
        """Return the Prometheus text; None where its library is missing."""
        is_ready = not self.why_not_ready()
        return self._tools.meter.text(measure(self._settings, self._agent, self.pulse, self._board, is_ready=is_ready))

    # --- what operators ask for ---

    def ask_switchover(self, candidate: int | None) -> None:
        """Write the request where the leader sees it; RefusedError where nobody could take over."""
        view = self.pulse.sight.view
        if view.leader is None:
            raise RefusedError("there is no leader to take over from")
        if candidate == view.leader.replica_id:
            raise RefusedError(f"replica {candidate} leads already")
        standbys = running_replicas(view) - {view.leader.replica_id}
        if candidate is not None and candidate not in standbys:
            raise RefusedError(f"replica {candidate} is not a healthy standby")
        if not standbys:
            raise RefusedError("no healthy standby could take over")
        self._tools.coordinator.request_switchover(candidate)
        self.pulse.wake()

    def set_paused(self, is_paused: bool) -> None:
        """Forbid or allow automatic failover."""
        self._tools.coordinator.set_paused(is_paused)
        self._tools.events.add("pause" if is_paused else "resume", "an operator asked for it")
        self.pulse.wake()

    # --- what ServerApps ask for ---

    def session_token(self) -> str:
        """Return the token of the present SuperLink life; empty where there is none."""
        life = self._agent.life
        return "" if life is None else life.token

    def _office(self) -> Office:
        office = self._agent.office
        if office is None:
            raise FencedError("this replica does not lead any more")
        return office

    def open_session(self, run_id: str) -> dict[str, Any]:
        """Return term, replica, blob folder and committed head."""
        office = self._office()
        head = self._tools.coordinator.head(run_id)
        server_round = head.position.server_round if head is not None else 0
        self._tools.events.add("session", f"the ServerApp goes on after round {server_round}", run_id=run_id)
        previous = self._tools.coordinator.committed_round(run_id, server_round - 1) if server_round > 1 else None
        return {
            "term": office.leadership.term,
            "replica": self._tools.replica_id,
            "blobs": str(Path(self._tools.store.root).absolute()),
            "head": None if head is None else head.to_json(),
            "previous": None if previous is None else previous.to_json(),
        }

    def offer(self, digests: Sequence[str]) -> None:
        """Begin to copy parts of a checkpoint that will be committed soon."""
        self._office()
        self._tools.storage.offer(digests)

    def commit(self, run_id: str, body: dict[str, Any]) -> Head:
        """Commit a round; while a switchover drains, the answer waits for the end of this leadership."""
        office = self._office()

        def check() -> None:
            if self._agent.office is not office:
                raise FencedError(f"term {office.leadership.term} was given up")

        metrics = {name: value for name, value in body["metrics"].items() if _is_finite(value)}
        head = office.duties.commit(run_id, {**body, "metrics": metrics}, check)
        self.pulse.wake()
        if self._agent.state.drain is not None:
            self._agent.post(RunSettled(run_id))
            while self._agent.office is office and self._agent.state.drain is not None:
                self._stop.wait(0.02)  # the next round belongs to the next leader
        return head

    def report(self, status: RunStatus) -> None:
        """Take note of what a run does."""
        before = self._board.report(status)
        self._tools.meter.on_status(status)
        self._note_pause(status, was_waiting=before is not None and before.state is RunState.WAITING)
        self.pulse.wake()

    def _note_pause(self, status: RunStatus, *, was_waiting: bool) -> None:
        """Log when a run begins to wait, and when it goes on."""
        is_waiting = status.state is RunState.WAITING
        if is_waiting and not was_waiting:
            self._tools.events.add("run-waits", status.reason, run_id=status.run_id)
        elif was_waiting and not is_waiting:
            self._tools.events.add("run-goes-on", f"run {status.run_id} goes on", run_id=status.run_id)

    def note(self, run_id: str, body: dict[str, Any]) -> None:
        """Append an event of a run."""
        fields = {key: value for key, value in body.items() if key not in ("kind", "message", "run_id")}
        self._tools.events.add(str(body["kind"]), str(body["message"]), run_id=run_id, **fields)

    def repair(self, digest: str) -> None:
        """Replace a corrupt blob by a copy of a peer."""
        self._tools.storage.fetch([digest], timeout_s=60.0)
        self._tools.events.add("repaired", f"{digest} was fetched again from a peer")

    # --- what the SuperLink says ---

    def _on_replicate(self, life: Life, event: ReplicateRequested) -> None:
        self._control.submit(self._replicate, life, event)

    def _replicate(self, life: Life, event: ReplicateRequested) -> None:
        office = self._agent.office
        is_safe = office is not None and office.duties.replicate_control(is_asked=True)
        life.superlink.answer(event.serial, is_replicated=is_safe)

    def _on_serverapp_died(self, life: Life, event: ServerAppDied) -> None:
        office = self._agent.office
        if office is not None:
            self._restarts.restart(life.database, event, term=office.leadership.term)

    def _watch_for_ever(self) -> None:
        """Follow what happens in the leader's database without a request that could be held."""
        while not self._stop.wait(WATCH_EVERY_S):
            office, life = self._agent.office, self._agent.life
            if office is None or life is None or not self._agent.is_leader:
                continue
            self._board.clear()
            try:
                with Watch(life.database) as watch:
                    while self._agent.office is office:
                        self._watch(watch, office)
                        if self._stop.wait(WATCH_EVERY_S):
                            return
            except (OSError, sqlite3.Error) as error:
                if self._agent.office is office:
                    self._agent.post(SuperLinkGone(f"its database cannot be read: {error}"))
            finally:
                self._board.clear()  # the next leadership of this replica knows nothing of its runs at first

    def _watch(self, watch: Watch, office: Office) -> None:
        seen = (watch, watch.version())  # a version means something to the one that has read it only
        for run_id in self._board.observe(watch.summary()):
            self._agent.post(RunSettled(run_id))
        if self._observed is None or self._observed.done():
            self._observed = self._control.submit(office.duties.replicate_control, seen=seen)
        self._obey_switchover(office)

    def _obey_switchover(self, office: Office) -> None:
        """Hand over if an operator asks for it.

        A view of an older term may still hold the request that this very leadership has fulfilled.
        """
        view = self.pulse.sight.view
        if view.switchover is None or view.term != office.leadership.term:
            return
        if self._agent.is_leader and self._agent.state.drain is None:
            self._agent.post(SwitchoverAsked(self._board.in_training(), view.switchover.candidate))


def _identity(life: Life | None) -> dict[str, Any] | None:
    """Return which process serves, so that a new leader on this machine can end it when it is frozen."""
    return life.superlink.record.to_json() if life is not None and life.superlink.is_alive else None


def _is_finite(value: object) -> bool:
    """Whether a metric can be shown: JSON has no NaN; the checkpoint keeps it."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return isinstance(value, int | float) and math.isfinite(value)
