"""Run fault plans one after the other on one cluster, and judge what is left."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr_ha.errors import HaError
from flwr_ha.local.cluster import Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.storage.checkpoint import model_digest
from tests.chaos.committer import Committer, model_after
from tests.chaos.faults import own_disk
from tests.chaos.injector import HEAL_TIMEOUT_S, Injector
from tests.chaos.invariants import broken, repeats
from tests.chaos.linked import LinkedCluster
from tests.chaos.links import Links
from tests.chaos.plans import FaultPlan
from tests.chaos.reference import expected_model
from tests.chaos.verdict import JudgedRun, gather

logger = logging.getLogger(__name__)
NUMPY_APP = Path(__file__).parents[1] / "apps" / "numpy_app"
COMMITTED_RUN = "4000000000000000001"
MODEL_SIZE = 2_000
DISK_BYTES = 600 * 1024**2
ENDLESS = 1_000_000
TRAINING_TIMEOUT_S = 240.0  # a SuperNode that was killed counts as online for a minute
STRATEGY = "fedadam"
STEP_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Say what was done and what broke.

    Attributes
    ----------
    plans : int
        Fault plans carried out.
    faults : mapping of str to int
        How often each fault came.
    takeovers : int
        Terms after the first.
    rounds : int
        Committed rounds of all runs.
    trained : int
        Trainings that real clients have begun.
    repeated : mapping of str to int
        How many of these were done again, by reason.
    slowest_resume_s : float
        Longest time from ZooKeeper's majority to the next round, in seconds.
    violations : tuple of str
        What does not hold; empty where all is well.
    """

    plans: int
    faults: Counter[str]
    takeovers: int
    rounds: int
    trained: int
    repeated: Counter[str]
    slowest_resume_s: float
    violations: tuple[str, ...]


class Chaos:
    """Hold a cluster in which a run commits all the time; use `started`."""

    def __init__(self, cluster: LinkedCluster, committer: Committer, calls: Path, seed: int) -> None:
        self.cluster = cluster
        self.injector = Injector(cluster, random.Random(seed), lambda: committer.round)
        self._committer = committer
        self._calls = calls
        self._run_id = ""
        self._plans = 0
        self._failures: list[str] = []

    @property
    def committed_round(self) -> int:
        """The newest round of the run that commits all the time, as its ServerApp knows it."""
        return self._committer.round

    def submit(self) -> None:
        """Let the SuperNodes train, too."""
        config = {"num_server_rounds": ENDLESS, "strategy": STRATEGY, "fraction_evaluate": 0.0, "step_s": STEP_S}

        def submitted() -> str | None:
            try:
                return self.cluster.submit(NUMPY_APP, min_nodes=self.cluster.plan.supernodes, **config)
            except HaError as error:  # the leadership has changed meanwhile, which a busy machine brings about
                logger.info("%s", error)
                return None

        self._run_id = wait_until(submitted, timeout_s=HEAL_TIMEOUT_S, what="a submitted run", poll_s=1.0)

    def carry_out(self, plan: FaultPlan) -> bool:
        """Carry a plan out; False where the cluster did not recover, so that it makes no sense to go on."""
        self._plans += 1
        try:
            for step in plan.steps:
                self._wait_commits(step.after_commits)
                time.sleep(step.delay_s)  # the moment is part of the plan
                self.injector.carry_out(step)
            self._wait_commits(3)
            self._wait_training()
        except HaError as error:
            self._failures.append(f"seed {plan.seed}: {error}")
            return False
        return True

    def _wait_training(self) -> None:
        """Wait for a round of the real SuperNodes: a plan that only stops them shows nothing."""
        if self._run_id:
            goal = self._trained_round() + 1
            wait_until(lambda: self._trained_round() >= goal, timeout_s=TRAINING_TIMEOUT_S, what=f"training {goal}")

    def _trained_round(self) -> int:
        run = self.cluster.run(self._run_id)
        return 0 if run is None else int(run["server_round"])

    def _wait_commits(self, count: int) -> None:
        goal = self._committer.round + count

        def is_there() -> bool:
            if self._committer.errors:
                raise HaError(f"the ServerApp has ended: {self._committer.errors[0]}")
            return self._committer.round >= goal

        wait_until(is_there, timeout_s=HEAL_TIMEOUT_S, what=f"round {goal}")

    def report(self) -> Report:
        """Stop committing, judge the evidence, and return the verdict."""
        self._committer.stop()
        runs = [JudgedRun(run_id=COMMITTED_RUN, expected=_committed_model)]
        if self._run_id:
            nodes = self.cluster.plan.supernodes
            trained = partial(_trained_model, nodes=nodes)
            runs.append(JudgedRun(run_id=self._run_id, expected=trained, min_nodes=nodes))
        evidence = gather(self.cluster, runs, calls=self._calls, kills=self.injector.kills)
        return Report(
            plans=self._plans,
            faults=self.injector.counts,
            takeovers=max(0, len(evidence.history) - 1),
            rounds=sum(map(len, evidence.commits.values())),
            trained=sum(map(len, evidence.trainings.values())),
            repeated=Counter(str(reason or "for no good reason") for _, reason in repeats(evidence)),
            slowest_resume_s=self.injector.slowest_resume_s,
            violations=(*self._failures, *self.injector.violations, *broken(evidence)),
        )


def _committed_model(rounds: int) -> str:
    return model_digest({"model": model_after(rounds, size=MODEL_SIZE)})


def _trained_model(rounds: int, *, nodes: int) -> str:
    return expected_model(STRATEGY, rounds=rounds, nodes=nodes)


def _keep_logs(disk: Path, folder: Path) -> None:
    for file in (*disk.glob("events.jsonl*"), *disk.glob("superlink.log")):
        shutil.copy(file, folder / f"{disk.name}-{file.name}")


@contextmanager
def started(folder: Path, *, seed: int, supernodes: int, session_timeout_s: float = 2.0) -> Iterator[Chaos]:
    """Start a cluster with small disks and links, and let a run commit."""
    calls = folder / "calls"
    plan = Plan(
        supernodes=supernodes,
        session_timeout_s=session_timeout_s,
        environment={"FLWR_HA_TEST_CALLS": str(calls)},
    )
    with ExitStack() as stack:
        for replica_id in range(plan.replicas):
            disk = folder / "data" / f"replica-{replica_id}"
            stack.enter_context(own_disk(disk, DISK_BYTES))
            stack.callback(_keep_logs, disk, folder / "logs")  # the disk is gone at the end
        links = stack.enter_context(Links())
        cluster = stack.enter_context(LinkedCluster(folder, plan, links))
        cluster.start()
        committer = Committer(cluster, COMMITTED_RUN, num_rounds=ENDLESS, size=MODEL_SIZE, pause_s=0.2)
        chaos = Chaos(cluster, stack.enter_context(committer), calls, seed)
        if supernodes:
            chaos.submit()
        chaos.injector.heal()
        yield chaos
