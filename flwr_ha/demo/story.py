"""The course of the demo: start, train, kill leaders in the middle of rounds, watch the takeovers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flwr_ha.demo.report import Kill
from flwr_ha.demo.screen import Screen, changes
from flwr_ha.errors import ConfigError, HaError
from flwr_ha.local.cluster import LocalCluster
from flwr_ha.local.processes import Program, WaitTimeoutError, wait_until

POLL_S = 0.1
START_S = 120.0
TAKEOVER_S = 60.0
STALL_S = 180.0
FIRST_TRAINING_S = 2.0
FINAL_STATES = ("finished", "failed", "stopped")
T = TypeVar("T")


class DemoFailedError(HaError):
    """The demo cannot go on; `log_file` is the log that tells more."""

    def __init__(self, reason: str, log_file: Path | None = None) -> None:
        super().__init__(reason)
        self.log_file = log_file


def kill_rounds(rounds: int, kills: int) -> tuple[int, ...]:
    """Return in which rounds a leader is killed, spread over the run; ConfigError where that cannot be."""
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: at least 1 is needed")
    if not 0 <= kills <= rounds:
        raise ConfigError(f"--kill {kills}: 0 to {rounds} are possible, one in each round")
    return tuple(1 + (2 * index + 1) * rounds // (2 * kills) for index in range(kills))


class Story:
    """Run the demo once in a cluster that is not started yet.

    Parameters
    ----------
    cluster : LocalCluster
        Its coordinator serves.
    screen : Screen
        Shows what happens.
    is_interrupted : callable
        Whether a signal has come, which ends the demo with KeyboardInterrupt.
    rounds : int
        Rounds to train.
    targets : sequence of int
        Rounds in which the leader is killed, ascending.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        screen: Screen,
        is_interrupted: Callable[[], bool],
        *,
        rounds: int,
        targets: Sequence[int],
    ) -> None:
        self._cluster = cluster
        self._screen = screen
        self._is_interrupted = is_interrupted
        self._rounds = rounds
        self._targets = list(targets)
        self._seen: dict[str, Any] | None = None
        self._note = "starting"
        self._training = (0, 0.0)  # which round is in training, and since when
        self._training_takes_s = FIRST_TRAINING_S
        self._moved_s = time.monotonic()
        self._victim: Program | None = None
        self.kills: list[Kill] = []

    def play(self) -> dict[str, Any]:
        """Return the run, as ``GET /cluster`` shows it, once it has ended.

        Raises
        ------
        DemoFailedError
            A process ended, or nothing happened for too long.
        KeyboardInterrupt
            The user wants to stop.
        """
        self._start()
        while (run := self._run()) is None or run["state"] not in FINAL_STATES:
            self._wait(lambda: True, timeout_s=POLL_S, what="the next look")
            if time.monotonic() - self._moved_s > STALL_S:
                raise DemoFailedError(f"nothing has happened for {STALL_S:g} s", self._leader_log())
            if self._is_time_to_kill():
                self._kill_leader()
        return run

    def _start(self) -> None:
        plan = self._cluster.plan
        self._cluster.start_coordinator()
        for replica_id in range(plan.replicas):
            self._start_replica(replica_id)
        self._screen.say(f"{plan.replicas} replicas start, each with a warm SuperLink")
        self._wait(self._cluster.leader, timeout_s=START_S, what="a leader", is_id=True)
        for index in range(plan.supernodes):
            self._cluster.start_supernode(index)
        self._screen.say(f"{plan.supernodes} unmodified flower-supernodes start, all at {self._cluster.address}")
        self._wait(self._run, timeout_s=START_S, what="the submitted run")

    def _start_replica(self, replica_id: int) -> None:
        self._cluster.start_replica(replica_id, "--run-config", f"num-server-rounds={self._rounds}")

    def _wait(self, condition: Callable[[], T | None], *, timeout_s: float, what: str, is_id: bool = False) -> T:
        """Return the first true value of `condition`, or the first id; keep looking at the cluster meanwhile."""

        def look() -> tuple[T] | None:
            self._look()
            value = condition()
            return (value,) if value or (is_id and value is not None) else None

        try:
            return wait_until(look, timeout_s=timeout_s, what=what, poll_s=POLL_S)[0]
        except WaitTimeoutError as error:
            raise DemoFailedError(str(error), self._leader_log()) from error

    def _look(self) -> None:
        if self._is_interrupted():
            raise KeyboardInterrupt
        for program in [*self._cluster.replicas.values(), *self._cluster.supernodes.values()]:
            if not program.is_alive and program is not self._victim:
                raise DemoFailedError(f"{program.name} has ended", program.log_file)
        cluster = self._cluster.get("/cluster")
        if cluster is not None:
            for line, style in changes(self._seen, cluster):
                self._screen.say(line, style)
                self._moved_s = time.monotonic()
            self._seen = cluster
            self._follow_training()
        self._screen.draw(cluster, self._note)

    def _run(self) -> dict[str, Any] | None:
        runs = self._seen["runs"] if self._seen else []
        return runs[0] if runs else None

    def _follow_training(self) -> None:
        """Learn how long a round trains, and when training goes on after a kill."""
        run, now_s = self._run(), time.monotonic()
        if run is None or self._seen is None:
            return
        is_training = run["state"] == "training" and run["min_nodes"] > 0  # the ServerApp itself says so
        server_round, since_s = self._training
        if is_training and server_round != run["server_round"] + 1:
            self._training = (run["server_round"] + 1, now_s)
            self._note = f"round {run['server_round'] + 1} is in training"
        elif not is_training and server_round:
            self._training_takes_s = now_s - since_s
            self._training = (0, 0.0)
        last = self.kills[-1] if self.kills else None
        is_new_term = last is not None and self._seen["term"] > last.term
        if last is not None and is_new_term and last.trained_s is None:
            if not is_training and run["server_round"] < last.server_round:
                return
            last.trained_s = now_s
            self._screen.say(f"training is under way again, {last.pause_s:.1f} s after the kill", "bold green")

    def _is_time_to_kill(self) -> bool:
        run = self._run()
        if not self._targets or run is None or self._seen is None or run["server_round"] < self._targets[0] - 1:
            return False
        is_calm = all(replica["state"] == "running" for replica in self._seen["replicas"])
        server_round, since_s = self._training
        return is_calm and server_round > 0 and time.monotonic() - since_s >= self._training_takes_s / 2

    def _kill_leader(self) -> None:
        leader, run = self._cluster.leader(), self._run()
        if leader is None or run is None or self._seen is None:
            return
        del self._targets[0]
        victim = self._cluster.replicas[leader]
        count = len(victim.tree())
        digest = run["checkpoint"]["digest"] if run["checkpoint"] else ""
        kill = Kill(
            replica_id=leader,
            term=self._seen["term"],
            server_round=run["server_round"] + 1,
            digest=digest,
            at_s=time.monotonic(),
        )
        self.kills.append(kill)
        self._victim = victim
        victim.kill_tree()
        what = f"replica {leader}, the leader, and its SuperLink and ServerApp ({count} processes)"
        self._screen.say(f"kill -9 of {what} in the middle of round {kill.server_round}", "bold red")
        self._training = (0, 0.0)
        self._note = f"replica {leader} is dead; the others take over once its session has run out"
        self._await_takeover(kill)

    def _await_takeover(self, kill: Kill) -> None:
        def other() -> int | None:
            leader = self._cluster.leader()
            return None if leader == kill.replica_id else leader

        leader = self._wait(other, timeout_s=TAKEOVER_S, what="another leader", is_id=True)
        kill.served_s = time.monotonic()
        after_s = kill.served_s - kill.at_s
        self._screen.say(
            f"replica {leader} serves at {self._cluster.address}, {after_s:.1f} s after the kill", "bold green"
        )
        self._start_replica(kill.replica_id)
        self._victim = None
        self._screen.say(f"replica {kill.replica_id} is started again, as a standby")

    def _leader_log(self) -> Path | None:
        """Return where the SuperLink and the ServerApp of the last leader wrote to."""
        leader = self._seen["leader"] if self._seen else None
        if leader is None:
            return next((program.log_file for program in self._cluster.replicas.values()), None)
        path = self._cluster.folder / "data" / f"replica-{leader}" / "superlink.log"
        return path if path.exists() else self._cluster.replicas[leader].log_file
