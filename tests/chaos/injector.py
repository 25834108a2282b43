"""Carry a fault plan out on a cluster whose connections run over links, and heal it after each fault."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path as File

from flwr_ha.errors import HaError
from flwr_ha.local.cluster import SERVERAPP, SUPERLINK
from flwr_ha.local.processes import wait_until
from tests.chaos.evidence import NodeKill
from tests.chaos.faults import empty_disk, fill_disk, flip_bit, slow_disk, store_of, truncate
from tests.chaos.linked import LinkedCluster
from tests.chaos.links import Link
from tests.chaos.plans import (
    Corrupt,
    Cut,
    FillDisk,
    FlipInTransfer,
    Freeze,
    Kill,
    LoseMajority,
    LoseReply,
    Part,
    SlowDisk,
    Step,
)

logger = logging.getLogger(__name__)
HEAL_TIMEOUT_S = 240.0
RESUME_S = 10.0  # promised in docs/guarantees.md
PARTS = {Part.SUPERLINK: SUPERLINK, Part.SERVERAPP: SERVERAPP}


class Injector:
    """Break things and heal them.

    Parameters
    ----------
    cluster : LinkedCluster
        Started.
    rng : random.Random
        Chooses what a step leaves open.
    progress : callable
        Returns the newest committed round of the run that commits all the time.
    """

    def __init__(self, cluster: LinkedCluster, rng: random.Random, progress: Callable[[], int]) -> None:
        self.counts: Counter[str] = Counter()
        self.kills: list[NodeKill] = []
        self.violations: list[str] = []
        self.slowest_resume_s = 0.0
        self._cluster = cluster
        self._rng = rng
        self._progress = progress
        self._gone: set[int] = set()

    def carry_out(self, step: Step) -> None:
        """Let a fault come, last, and be healed; returns once all replicas run and one leads.

        Raises
        ------
        HaError
            The cluster did not recover: an invariant is broken.
        """
        target = self._target(step)
        logger.info("%s -> replica %d", step.fault, target)
        self.counts[counted(step)] += 1
        with ExitStack() as healing:
            match step.fault:
                case Kill(part):
                    self._kill(part, target)
                case Freeze(part, sessions):
                    healing.enter_context(self._frozen(part, target))
                    self._last(sessions)
                case Cut(path, sessions):
                    healing.enter_context(_cut(self._cluster.links_of(target, path)))
                    self._last(sessions)
                case Corrupt(is_truncated):
                    self._corrupt(target, is_truncated)
                case FillDisk(sessions):
                    folder = self._cluster.settings.replica_dir(target)
                    fill_disk(folder)
                    healing.callback(empty_disk, folder)
                    self._last(sessions)
                case SlowDisk(sessions, stall_s):
                    folder = self._cluster.settings.replica_dir(target)
                    healing.enter_context(slow_disk(folder, stall_s=stall_s))
                    self._last(sessions)
                case LoseReply():
                    for link in self._cluster.to_zookeeper[target]:
                        link.lose_reply()
                case FlipInTransfer(blobs):
                    self._flip(target, blobs)
                case LoseMajority(seconds, is_killed):
                    self._lose_majority(seconds, is_killed)
        self.heal()

    def _target(self, step: Step) -> int:
        leader = self._cluster.wait_leader(timeout_s=HEAL_TIMEOUT_S)
        others = [each for each in self._cluster.replicas if each != leader]
        return leader if step.is_leader_hit else self._rng.choice(others)

    def _last(self, sessions: float) -> None:
        end_s = time.monotonic() + sessions * self._cluster.plan.session_timeout_s
        wait_until(lambda: time.monotonic() >= end_s, timeout_s=HEAL_TIMEOUT_S, what="the end of the fault")

    def _kill(self, part: Part, target: int) -> None:
        cluster = self._cluster
        match part:
            case Part.TREE:
                cluster.replicas[target].kill_tree()
            case Part.AGENT:
                cluster.replicas[target].kill()
            case Part.ZOOKEEPER:
                assert cluster.ensemble is not None
                cluster.ensemble.kill(self._rng.randrange(len(cluster.ensemble.client_ports)))
            case Part.SUPERNODE:
                index = self._rng.choice(sorted(cluster.supernodes))
                self._gone.add(index)
                cluster.supernodes[index].kill_tree()
                self.kills.append(NodeKill(partition=f"partition-{index}", at_s=time.monotonic()))
            case _:
                pid = cluster.replicas[target].find(PARTS[part])
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)

    @contextmanager
    def _frozen(self, part: Part, target: int) -> Iterator[None]:
        cluster = self._cluster
        if part is Part.ZOOKEEPER:
            assert cluster.ensemble is not None
            index = self._rng.randrange(len(cluster.ensemble.client_ports))
            cluster.ensemble.freeze(index)
            yield
            cluster.ensemble.thaw(index)
            return
        program = cluster.replicas[target]
        if part is Part.SUPERNODE:
            program = cluster.supernodes[self._rng.choice(sorted(cluster.supernodes))]
        pids: tuple[int | None, ...] = program.tree()
        if part is Part.AGENT:
            pids = (program.pid,)
        elif part in PARTS:
            pids = (program.find(PARTS[part]),)
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        yield
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    def _corrupt(self, target: int, is_truncated: bool) -> None:
        """Hurt a blob of a checkpoint that was written lately."""
        store = store_of(self._cluster, target)
        paths = sorted((store.path(digest) for digest in store.digests()), key=_mtime)[-6:]
        if not paths:
            return
        path = self._rng.choice(paths)
        try:
            if is_truncated:
                truncate(path, self._rng.random())
            elif path.stat().st_size:
                flip_bit(path, self._rng.randrange(1 << 30))
        except FileNotFoundError:
            return  # collected meanwhile

    def _flip(self, target: int, blobs: int) -> None:
        """Spoil what the leader sends to a standby, or to both of them, until that has happened."""
        leader = self._cluster.wait_leader(timeout_s=HEAL_TIMEOUT_S)
        pairs = [(own, other) for own, other in self._cluster.between if own == leader and target in (own, other)]
        for link in (self._cluster.between[pair] for pair in pairs):
            before = link.flipped_bits
            link.flip_bits(blobs)
            wait_until(
                lambda link=link, before=before: link.flipped_bits > before,  # type: ignore[misc]
                timeout_s=HEAL_TIMEOUT_S,
                what="a blob on its way",
            )

    def _lose_majority(self, seconds: float, is_killed: bool) -> None:
        """Check as well that nobody leads or commits meanwhile, and that it goes on soon afterwards."""
        cluster = self._cluster
        assert cluster.ensemble is not None
        nodes = range(len(cluster.ensemble.client_ports))
        gone = self._rng.sample(nodes, len(nodes) - 1)
        end_s = time.monotonic() + seconds
        for index in gone:
            (cluster.ensemble.kill if is_killed else cluster.ensemble.freeze)(index)
        self._last(1.5)  # until then the lease may hold, and an answer be on its way
        stopped_at = self._progress()
        while time.monotonic() < end_s:
            if (leader := cluster.leader()) is not None:
                self.violations.append(f"replica {leader} leads though ZooKeeper has no majority")
            time.sleep(0.1)
        if self._progress() != stopped_at:
            self.violations.append(f"round {self._progress()} was committed though ZooKeeper has no majority")
        for index in gone:
            (cluster.ensemble.start_node if is_killed else cluster.ensemble.thaw)(index)
        cluster.ensemble.wait_ready(HEAL_TIMEOUT_S)
        back_s = time.monotonic()
        wait_until(lambda: self._progress() > stopped_at, timeout_s=HEAL_TIMEOUT_S, what="the next round")
        took_s = time.monotonic() - back_s
        self.slowest_resume_s = max(self.slowest_resume_s, took_s)
        if took_s > RESUME_S:
            self.violations.append(
                f"the next round came {took_s:.1f} s after ZooKeeper's majority, not within {RESUME_S:g} s"
            )

    def heal(self) -> None:
        """Start what has ended, and wait until all replicas run and one leads; HaError where that does not come."""
        cluster = self._cluster
        assert cluster.ensemble is not None
        for index in range(len(cluster.ensemble.client_ports)):
            cluster.ensemble.start_node(index)
        cluster.ensemble.wait_ready(HEAL_TIMEOUT_S)
        for replica_id, program in list(cluster.replicas.items()):
            if not program.is_alive:
                cluster.start_replica(replica_id)
        for index, program in list(cluster.supernodes.items()):
            if not program.is_alive:
                if index not in self._gone:
                    raise HaError(f"SuperNode {index} has ended by itself: {program.log_text()[-500:]}")
                cluster.start_supernode(index)
        self._gone.clear()
        wait_until(self._is_whole, timeout_s=HEAL_TIMEOUT_S, what="a whole cluster", poll_s=0.1)

    def _is_whole(self) -> bool:
        for replica_id, program in self._cluster.replicas.items():
            if not program.is_alive:
                raise HaError(f"replica {replica_id} has ended by itself: {program.log_text()[-500:]}")
        state = self._cluster.get("/cluster")
        if state is None or state["leader"] is None:
            return False
        is_running = all(replica["state"] == "running" for replica in state["replicas"])
        return is_running and self._cluster.leader() is not None


def counted(step: Step) -> str:
    """Return the words under which a fault is counted."""
    match step.fault:
        case Kill(part):
            return f"kill {part.value}"
        case Freeze(part):
            return f"freeze {part.value}"
        case Cut(path):
            return f"cut {path.value}"
        case Corrupt(is_truncated):
            return "truncate a blob" if is_truncated else "flip a bit of a blob"
        case FillDisk():
            return "fill a disk"
        case SlowDisk(_, stall_s):
            return f"slow disk, up to {stall_s:g} s a write"
        case LoseReply():
            return "lose the answer of a transaction"
        case FlipInTransfer(blobs):
            return f"flip a bit of each of {blobs} blobs in transfer"
        case LoseMajority(seconds, is_killed):
            return f"{'kill' if is_killed else 'freeze'} ZooKeeper's majority for {seconds:g} s"


@contextmanager
def _cut(links: list[Link]) -> Iterator[None]:
    for link in links:
        link.cut()
    yield
    for link in links:
        link.heal()


def _signal(pid: int | None, number: signal.Signals) -> None:
    if pid is not None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def _mtime(path: File) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
