"""Inject random faults for a while: ``python -m tests.chaos --seconds 1800 --seed 7``."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.plans import draw
from tests.chaos.runner import Report, started

STEPS = 4


def main() -> int:
    """Run plans until the time is over; return 1 where an invariant is broken."""
    options = _options()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("tests.chaos").setLevel(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="flwr-ha-chaos-"))
    print(f"chaos with seed {options.seed} for {options.seconds} s; data and logs in {folder}", flush=True)
    end_s = time.monotonic() + options.seconds
    with started(
        folder, seed=options.seed, supernodes=options.supernodes, session_timeout_s=options.session_timeout
    ) as chaos:
        seed = options.seed
        while time.monotonic() < end_s:
            plan = draw(seed, steps=STEPS, has_supernodes=options.supernodes > 0)
            print(f"plan of seed {seed}", flush=True)
            if not chaos.carry_out(plan):
                break
            seed += 1
        report = chaos.report()
    print(summary(report, seed=options.seed), flush=True)
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long plans are begun")
    parser.add_argument("--seed", type=int, default=7, help="of the first plan; the next ones count up")
    parser.add_argument("--supernodes", type=int, default=2, help="real SuperNodes that train as well; 0 for none")
    parser.add_argument(
        "--session-timeout", type=float, default=2.0, help="in seconds; what else runs here must not make leases end"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
