"""What a replica counts and measures, as Prometheus reads it; docs/metrics.md explains each name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flwr_ha.model import RunState, RunStatus

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MISSING = "metrics need the package prometheus-client: pip install 'flwr-ha[metrics]'"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PHASE_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)
_COUNTED = {  # kind of event: name and help of the counter
    "leading": ("takeovers", "Times that this replica has begun to serve as the leader"),
    "commit": ("rounds_committed", "Rounds that this replica has committed"),
    "not-committed": ("commits_refused", "Commits that could not be made safe and are tried again"),
    "reply-rejected": ("replies_rejected", "Replies of nodes that could not be used"),
    "reply-replayed": ("replies_replayed", "Replies that nodes gave from their cache instead of computing again"),
    "serverapp-died": ("serverapp_restarts", "ServerApps that were killed and are started again"),
    "error": ("errors", "Events that need a person"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Hold what is true of a replica at one moment; None is left out.

    Attributes
    ----------
    cluster : str
        Name of the cluster.
    is_leader, has_leader, is_paused, is_ready : bool
        Whether this replica leads, anybody leads, automatic failover is off, this replica could lead.
    term : int
        Newest leadership number that it knows of.
    replicas : mapping of str to int
        Number of replicas in each state, as this one sees it.
    lease_age_s : float or None
        Seconds since the leadership was last proved; None on a standby.
    coordinator_age_s : float
        Seconds since the coordinator was last read.
    lag_rounds : int
        Committed rounds that are missing here.
    copies_missing : int or None
        Copies of the newest checkpoints of unfinished runs that replicas lack; None on a standby.
    nodes_online : int or None
        SuperNodes; None on a standby.
    runs : tuple of dict
        Unfinished runs as ``GET /cluster`` shows them; empty on a standby.
    disk_free_bytes, disk_bytes : int
        Free space and size of the file system of ``data-dir``.
    """

    cluster: str
    is_leader: bool = False
    has_leader: bool = False
    is_paused: bool = False
    is_ready: bool = False
    term: int = 0
    replicas: Mapping[str, int] = field(default_factory=dict)
    lease_age_s: float | None = None
    coordinator_age_s: float = 0.0
    lag_rounds: int = 0
    copies_missing: int | None = None
    nodes_online: int | None = None
    runs: tuple[Mapping[str, Any], ...] = ()
    disk_free_bytes: int = 0
    disk_bytes: int = 0


class Meter(Protocol):
    """Take what the parts of a replica tell; safe from any thread, never fails, never blocks."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Count an entry of the event log."""
        ...

    def on_status(self, status: RunStatus) -> None:
        """Learn what a run does now."""
        ...

    def on_push(self, peer: int, sent_bytes: int, seconds: float) -> None:
        """Learn that a copy went to a peer."""
        ...

    def on_coordinator_error(self) -> None:
        """Count a call that the coordinator did not answer."""
        ...

    def text(self, gauges: Gauges) -> bytes | None:
        """Return the Prometheus text; None where the library is missing."""
        ...


class NoMeter:
    """Count nothing."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Count nothing."""

    def on_status(self, status: RunStatus) -> None:
        """Count nothing."""

    def on_push(self, peer: int, sent_bytes: int, seconds: float) -> None:
        """Count nothing."""

    def on_coordinator_error(self) -> None:
        """Count nothing."""

    def text(self, gauges: Gauges) -> bytes | None:
        """Return None: there is no library to make the text."""


class PhaseClock:
    """Measure how long each run spends in each phase of a round; guarded by its owner."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[str, float]] = {}
        self._spent: dict[str, dict[str, float]] = {}

    def enter(self, run_id: str, phase: str, now_s: float) -> None:
        """Learn in which phase a run is from now on."""
        before, since_s = self._since.get(run_id, (phase, now_s))
        spent = self._spent.setdefault(run_id, {})
        spent[before] = spent.get(before, 0.0) + max(now_s - since_s, 0.0)
        self._since[run_id] = (phase, now_s)

    def commit(self, run_id: str, seconds: float, now_s: float) -> dict[str, float]:
        """Return the seconds of each phase of the round that was committed in the last `seconds`."""
        phase, _ = self._since.get(run_id, ("commit", now_s))
        self.enter(run_id, "commit", now_s - seconds)
        self.enter(run_id, phase, now_s)
        return {name: spent_s for name, spent_s in self._spent.pop(run_id).items() if spent_s > 0}

    def forget(self, run_id: str) -> None:
        """Drop a run that has ended."""
        self._since.pop(run_id, None)
        self._spent.pop(run_id, None)


class PrometheusMeter:
    """Count for Prometheus.

    Raises
    ------
    ImportError
        prometheus-client is not installed: use `NoMeter`.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call] # a second line for each counter tells nothing
        own = CollectorRegistry()
        self._registry = own
        self._lock = threading.Lock()
        self._phases = PhaseClock()
        ProcessCollector(namespace="flwr_ha", registry=own)
        self._counters = {
            kind: Counter(f"flwr_ha_{name}", text, registry=own) for kind, (name, text) in _COUNTED.items()
        }
        self._coordinator_errors = Counter(
            "flwr_ha_coordinator_errors", "Calls that the coordinator did not answer", registry=own
        )
        self._commit_s = Histogram(
            "flwr_ha_commit_seconds",
            "Time from a finished round to its commit, copies on a majority included",
            buckets=_SECONDS,
            registry=own,
        )
        self._phase_s = Histogram(
            "flwr_ha_round_phase_seconds",
            "Time that a committed round spent in a phase: waiting, training, evaluating, commit",
            ["phase"],
            buckets=_PHASE_SECONDS,
            registry=own,
        )
        self._sent_bytes = Counter(
            "flwr_ha_replication_bytes", "Bytes of copies sent to a peer", ["peer"], registry=own
        )
        self._push_s = Histogram(
            "flwr_ha_replication_seconds", "Time to copy one blob to a peer", ["peer"], buckets=_SECONDS, registry=own
        )

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Count an entry of the event log; a commit also says how long it took."""
        if event["kind"] == "commit":
            self._on_commit(event)
        elif (counter := self._counters.get(event["kind"])) is not None:
            counter.inc()

    def _on_commit(self, event: Mapping[str, Any]) -> None:
        self._commit_s.observe(event["seconds"])
        with self._lock:
            spent = self._phases.commit(event["run_id"], event["seconds"], time.monotonic())
        if event["server_round"] == 0:
            return  # the initial model is committed, but nobody has trained it
        self._counters["commit"].inc()
        for phase, seconds in spent.items():
            self._phase_s.labels(phase).observe(seconds)

    def on_status(self, status: RunStatus) -> None:
        """Learn what a run does now."""
        with self._lock:
            if status.state.is_final:
                self._phases.forget(status.run_id)
            else:
                self._phases.enter(status.run_id, status.state.value, time.monotonic())

    def on_push(self, peer: int, sent_bytes: int, seconds: float) -> None:
        """Learn that a copy went to a peer."""
        self._sent_bytes.labels(str(peer)).inc(sent_bytes)
        self._push_s.labels(str(peer)).observe(seconds)

    def on_coordinator_error(self) -> None:
        """Count a call that the coordinator did not answer."""
        self._coordinator_errors.inc()

    def text(self, gauges: Gauges) -> bytes | None:
        """Return the Prometheus text."""
        from prometheus_client import CollectorRegistry, generate_latest

        now = CollectorRegistry()  # a registry of its own for each call: two scrapes at once do not mix
        now.register(_Moment(gauges))
        return generate_latest(self._registry) + generate_latest(now)


class _Moment:
    """Turn gauges into Prometheus's own values."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        from flwr_ha import __version__

        now = self._gauges
        info = GaugeMetricFamily("flwr_ha_info", "Constant 1; names cluster and version", labels=["cluster", "version"])
        info.add_metric([now.cluster, __version__], 1)
        yield info
        replicas = GaugeMetricFamily("flwr_ha_replicas", "Replicas in a state, as this one sees it", labels=["state"])
        for state, count in now.replicas.items():
            replicas.add_metric([state], count)
        yield replicas
        for name, text, value in _plain(now):
            if value is not None:
                yield GaugeMetricFamily(f"flwr_ha_{name}", text, value=float(value))
        for name, text, read in _OF_RUNS:
            family = GaugeMetricFamily(f"flwr_ha_run_{name}", text, labels=["run_id"])
            for run in now.runs:
                family.add_metric([run["run_id"]], read(run))
            yield family


_OF_RUNS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("rounds_done", "Last committed round of an unfinished run; only from the leader", lambda run: run["server_round"]),
    ("rounds", "Rounds that the run is to have; only from the leader", lambda run: run["num_rounds"]),
    ("nodes_needed", "Threshold min_nodes of the run; only from the leader", lambda run: run["min_nodes"]),
    (
        "waiting",
        "1 while the run waits, for nodes or otherwise; only from the leader",
        lambda run: float(run["state"] == RunState.WAITING.value),
    ),
)


def _plain(now: Gauges) -> tuple[tuple[str, str, float | None], ...]:
    return (
        ("leader", "1 while this replica leads", now.is_leader),
        ("has_leader", "1 while this replica sees a leader, itself or another one", now.has_leader),
        ("paused", "1 while automatic failover is off", now.is_paused),
        ("ready", "1 while this replica leads or could lead", now.is_ready),
        ("term", "Newest leadership number", now.term),
        ("lease_age_seconds", "Time since the leadership was last proved; only from the leader", now.lease_age_s),
        ("coordinator_age_seconds", "Time since the coordinator was last read", now.coordinator_age_s),
        ("lag_rounds", "Committed rounds whose checkpoint is missing here", now.lag_rounds),
        ("copies_missing", "Copies that replicas lack of unfinished runs; only from the leader", now.copies_missing),
        ("nodes_online", "SuperNodes that are online; only from the leader", now.nodes_online),
        ("disk_free_bytes", "Free space of the file system of data-dir", now.disk_free_bytes),
        ("disk_bytes", "Size of the file system of data-dir", now.disk_bytes),
    )


def make_meter() -> Meter:
    """Return what counts: for Prometheus where its library is installed."""
    try:
        return PrometheusMeter()
    except ImportError:
        return NoMeter()
