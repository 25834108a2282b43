"""What all long chaos runs share: seeds until the time is over, and the verdict at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.chaos.runner import Report


def seeds(first: int, *, seconds: float) -> Iterator[int]:
    """Count up from a seed as long as new plans are to be begun."""
    end_s = time.monotonic() + seconds
    for seed in count(first):
        if time.monotonic() >= end_s:
            return
        yield seed


def conclude(report: Report, *, seed: int, folder: Path) -> int:
    """Print the summary and return the exit status; data and logs are kept where an invariant is broken."""
    print(summary(report, seed=seed), flush=True)
    if not report.violations:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if report.violations else 0


def summary(report: Report, *, seed: int) -> str:
    """Return what is printed at the end."""
    lines = [
        f"seed {seed}: {report.plans} plans, {report.faults.total()} faults, {report.takeovers} takeovers, "
        f"{report.rounds} committed rounds, {report.trained} client trainings, {report.repeated.total()} repeated",
        *(f"  {count:4} x {name}" for name, count in sorted(report.faults.items())),
        *(f"  {count:4} trainings repeated: {reason}" for reason, count in sorted(report.repeated.items())),
    ]
    if report.slowest_resume_s:
        lines.append(f"  longest from ZooKeeper's majority to the next round: {report.slowest_resume_s:.1f} s")
    if report.violations:
        lines += ["BROKEN:", *(f"  {sentence}" for sentence in report.violations)]
    else:
        lines.append("every invariant holds")
    return "\n".join(lines)
