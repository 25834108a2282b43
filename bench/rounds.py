"""Round time of the same app: three replicas against a plain ``flower-superlink``."""

from __future__ import annotations

import itertools
import statistics
from contextlib import ExitStack
from pathlib import Path

from bench.plain import PlainFlower
from bench.result import Figure, Scale
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until

APP = Path(__file__).parent / "apps" / "steps"
GOAL = 0.85


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Train turn about on both, some rounds at a time; the first round of each turn does not count."""
    nodes, turns, rounds = 5, scale.pick(1, 3), scale.pick(3, 4)
    with ExitStack() as stack:
        plain = stack.enter_context(PlainFlower(folder / "plain", supernodes=nodes))
        plain.start()
        ours = stack.enter_context(LocalCluster(folder / "ours", Plan(supernodes=nodes, session_timeout_s=4.0)))
        ours.start()
        plain_s: list[float] = []
        ours_s: list[float] = []
        for turn in range(turns):
            plain_s += train(plain, folder / f"plain-{turn}", rounds, nodes, is_plain=True)
            ours_s += train(ours, folder / f"ours-{turn}", rounds, nodes)
    value, against = statistics.median(ours_s), statistics.median(plain_s)
    return [
        Figure(
            name="round, 5 SuperNodes, 4.8 MB model", value=value, unit="s", against=against,
            ratio=value / against, goal=GOAL,
        )
    ]  # fmt: skip


def train(cluster: LocalCluster, notes: Path, rounds: int, nodes: int, **run_config: object) -> list[float]:
    """Return the seconds of each round but the first."""
    cluster.submit(APP, num_server_rounds=rounds, min_nodes=nodes, notes=str(notes), **run_config)
    times = wait_until(lambda: _times(notes, rounds), timeout_s=120.0 * rounds, what="the rounds")
    return [after - before for before, after in itertools.pairwise(times)]


def _times(notes: Path, rounds: int) -> list[float] | None:
    if not notes.exists():
        return None
    times = [float(line.split()[1]) for line in notes.read_text(encoding="utf-8").splitlines()]
    return times if len(times) > rounds else None
