"""Inject random faults for a while: ``python -m tests.chaos --seconds 1800 --seed 7``."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import conclude, seeds
from tests.chaos.plans import draw
from tests.chaos.runner import started

STEPS = 4


def main() -> int:
    """Run plans until the time is over; return 1 where an invariant is broken."""
    options = _options()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("tests.chaos").setLevel(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="flwr-ha-chaos-"))
    print(f"chaos with seed {options.seed} for {options.seconds} s; data and logs in {folder}", flush=True)
    with started(
        folder, seed=options.seed, supernodes=options.supernodes, session_timeout_s=options.session_timeout
    ) as chaos:
        for seed in seeds(options.seed, seconds=options.seconds):
            plan = draw(seed, steps=STEPS, has_supernodes=options.supernodes > 0)
            print(f"plan of seed {seed}", flush=True)
            if not chaos.carry_out(plan):
                break
        report = chaos.report()
    return conclude(report, seed=options.seed, folder=folder)


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
