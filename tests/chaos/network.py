"""Cut hosts from each other on a real network: ``python -m tests.chaos.network --seconds 300 --seed 7``; needs root.

Each part has a network namespace of its own. The proxies of `tests.chaos.links` hold back what was sent and deliver it
later; here packets are lost, and the kernels of both sides find out by themselves.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File

from flwr_ha.errors import HaError
from flwr_ha.local.processes import wait_until
from tests.chaos.campaign import conclude, seeds
from tests.chaos.injector import counted
from tests.chaos.invariants import broken, repeats
from tests.chaos.plans import FaultPlan, Path, draw_cuts
from tests.chaos.reference import expected_model
from tests.chaos.runner import NUMPY_APP, STEP_S, STRATEGY, Report
from tests.chaos.verdict import JudgedRun, gather
from tests.network import REPLICAS, Network, NetworkCluster, address

logger = logging.getLogger("tests.chaos.network")
NODES = 2
ENDLESS = 1_000_000
HEAL_TIMEOUT_S = 180.0  # Flower's pauses between its tries grow up to 20 s
STEPS = 3


@contextmanager
def cut(cluster: NetworkCluster, replica_id: int, path: Path) -> Iterator[None]:
    """Let no packet through on a path of a replica."""
    host = REPLICAS[replica_id]
    if path is Path.TO_ALL:
        cluster.network.cut(host)
        yield
        cluster.network.heal(host)
        return
    ends = {
        Path.TO_ZOOKEEPER: [name for name in cluster.network.hosts if name.startswith("zookeeper")],
        Path.TO_REPLICAS: [name for name in REPLICAS.values() if name != host],
        Path.OF_CLIENTS: [name for name in cluster.network.hosts if name.startswith(("client", "haproxy"))],
    }
    for other in ends[path]:
        cluster.network.part(host, other)
    yield
    for other in ends[path]:
        cluster.network.join(host, other)


class NetworkChaos:
    """Let SuperNodes train without end, and cut.

    Parameters
    ----------
    cluster : NetworkCluster
        Started.
    seed : int
        Chooses what a step leaves open.
    """

    def __init__(self, cluster: NetworkCluster, seed: int) -> None:
        self.cluster = cluster
        self.calls = cluster.folder / "calls"
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._plans = 0
        self._failures: list[str] = []
        cluster.wait_haproxy()
        self._nodes = [
            cluster.start_supernode(
                f"client-{index}",
                f"{address('haproxy')}:8000",
                index,
                environment={"FLWR_HA_TEST_CALLS": str(self.calls)},
            )
            for index in range(NODES)
        ]
        self.run_id = cluster.submit(
            NUMPY_APP,
            num_server_rounds=ENDLESS,
            min_nodes=NODES,
            strategy=STRATEGY,
            fraction_evaluate=0.0,
            step_s=STEP_S,
        )
        self.wait_rounds(1)

    @property
    def round(self) -> int:
        """The newest committed round."""
        return self.cluster.committed_round(self.run_id)

    def wait_rounds(self, count: int) -> None:
        """Wait for further rounds."""
        goal = max(self.round, 0) + count
        wait_until(lambda: self.round >= goal, timeout_s=HEAL_TIMEOUT_S, what=f"round {goal}", poll_s=0.1)

    def carry_out(self, plan: FaultPlan) -> bool:
        """Carry a plan out; False where the cluster did not recover."""
        self._plans += 1
        try:
            for step in plan.steps:
                self.wait_rounds(step.after_commits)
                leader = self.cluster.wait_leader(timeout_s=HEAL_TIMEOUT_S)
                standbys = [replica_id for replica_id in REPLICAS if replica_id != leader]
                target = leader if step.is_leader_hit else self._rng.choice(standbys)
                logger.info("%s -> replica %d", step.fault, target)
                self.counts[counted(step)] += 1
                with cut(self.cluster, target, step.fault.path):
                    time.sleep(step.fault.sessions * self.cluster.session_timeout_s)  # as long as the plan says
                wait_until(self._is_whole, timeout_s=HEAL_TIMEOUT_S, what="a whole cluster", poll_s=0.2)
            self.wait_rounds(2)
        except HaError as error:
            self._failures.append(f"seed {plan.seed}: {error}")
            return False
        return True

    def _is_whole(self) -> bool:
        if dead := [each.name for each in (*self._nodes, *self.cluster.replicas.values()) if not each.is_alive]:
            raise HaError(f"{', '.join(dead)} ended by itself")
        state = self.cluster.get("/cluster")
        is_running = state is not None and all(replica["state"] == "running" for replica in state["replicas"])
        return is_running and self.cluster.leader() is not None

    def report(self) -> Report:
        """End the SuperNodes, judge the evidence, and return the verdict."""
        for node in self._nodes:
            node.stop(timeout_s=30.0)
        run = JudgedRun(
            run_id=self.run_id,
            expected=lambda rounds: expected_model(STRATEGY, rounds=rounds, nodes=NODES),
            min_nodes=NODES,
        )
        evidence = gather(self.cluster, [run], calls=self.calls, kills=())
        return Report(
            plans=self._plans,
            faults=self.counts,
            takeovers=max(0, len(evidence.history) - 1),
            rounds=sum(map(len, evidence.commits.values())),
            trained=sum(map(len, evidence.trainings.values())),
            repeated=Counter(str(reason or "for no good reason") for _, reason in repeats(evidence)),
            slowest_resume_s=0.0,
            violations=(*self._failures, *broken(evidence)),
        )


def main() -> int:
    """Run plans until the time is over; return 1 where an invariant is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.network", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long plans are begun")
    parser.add_argument("--seed", type=int, default=7, help="of the first plan; the next ones count up")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    folder = File(tempfile.mkdtemp(prefix="flwr-ha-network-"))
    print(f"cuts with seed {options.seed} for {options.seconds} s; data and logs in {folder}", flush=True)
    with Network() as network, NetworkCluster(folder, network, session_timeout_s=3.0) as cluster:
        cluster.start()
        cluster.wait_leader(timeout_s=HEAL_TIMEOUT_S)
        chaos = NetworkChaos(cluster, options.seed)
        for seed in seeds(options.seed, seconds=options.seconds):
            if not chaos.carry_out(draw_cuts(seed, steps=STEPS)):
                break
        report = chaos.report()
    return conclude(report, seed=options.seed, folder=folder)


if __name__ == "__main__":
    sys.exit(main())
