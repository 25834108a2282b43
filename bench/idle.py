"""Processor time that a cluster takes while it has nothing to do, against a plain ``flower-superlink``."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

from bench.plain import PlainFlower
from bench.result import Figure, Scale
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.superlink.procfs import descendants, stat_fields

SETTLED_S = 15.0  # imports are over, caches are filled
_TICKS = os.sysconf("SC_CLK_TCK")


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Let both run without SuperNodes and without a run, at the same time."""
    seconds = scale.pick(5, 60)
    with ExitStack() as stack:
        plain = stack.enter_context(PlainFlower(folder / "plain", supernodes=0))
        plain.start()
        ours = stack.enter_context(LocalCluster(folder / "ours", Plan(supernodes=0, session_timeout_s=4.0)))
        ours.start()
        leader = ours.wait_leader(timeout_s=60.0)
        trees = {
            "the leader": ours.replicas[leader].pid,
            "a standby": ours.replicas[next(number for number in ours.replicas if number != leader)].pid,
        }
        time.sleep(SETTLED_S)
        pids = [*trees.values(), plain.replicas[0].pid]
        before = [processor_s(pid) for pid in pids]
        start_s = time.monotonic()
        time.sleep(seconds)
        spent_s = time.monotonic() - start_s
        *shares, against = [(processor_s(pid) - old) / spent_s for pid, old in zip(pids, before, strict=True)]
    return [
        Figure(name=f"idle processor time of {name}", value=share, unit="cores", against=against)
        for name, share in zip(trees, shares, strict=True)
    ]


def processor_s(pid: int) -> float:
    """Return the processor time of a process and of all that it has started, in seconds."""
    return sum(_own_s(each) for each in (pid, *descendants(pid)))


def _own_s(pid: int) -> float:
    fields = stat_fields(pid) or []  # none: it has ended
    return sum(map(int, fields[11:13])) / _TICKS
