"""What the demo has shown: figures, and what is not as it must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

_RECEIVED = re.compile(r"Receiving: train message.*\n.*Received successfully")
_REPLAYED = re.compile(r"train(?:\.\w+)? of round \S+: answered from the cache")


@dataclass(slots=True, kw_only=True)
class Kill:
    """Record one leader that was killed; times are seconds of ``time.monotonic()``.

    Attributes
    ----------
    replica_id : int
        The leader.
    term : int
        Its term.
    server_round : int
        Round in the middle of which it was killed.
    digest : str
        Of the newest checkpoint that was committed then.
    at_s : float
        When it was killed.
    served_s : float or None
        When another one served; None before.
    trained_s : float or None
        When training was seen under way again; None before.
    """

    replica_id: int
    term: int
    server_round: int
    digest: str
    at_s: float
    served_s: float | None = None
    trained_s: float | None = None

    @property
    def pause_s(self) -> float:
        """Seconds without training, as far as it was seen."""
        return (self.trained_s or self.at_s) - self.at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainings:
    """Count what the clients did.

    Attributes
    ----------
    real : int
        Trainings that were computed.
    replayed : int
        Requests that the clients answered from their cache.
    needed : int
        Rounds times clients.
    """

    real: int
    replayed: int
    needed: int

    @property
    def repeated(self) -> int:
        """How many trainings were computed more than once."""
        return max(0, self.real - self.needed)


def count_trainings(logs: Sequence[str], *, rounds: int) -> Trainings:
    """Count trainings in the logs of the SuperNodes."""
    replayed = sum(len(_REPLAYED.findall(log)) for log in logs)
    received = sum(len(_RECEIVED.findall(log)) for log in logs)
    return Trainings(real=received - replayed, replayed=replayed, needed=rounds * len(logs))


def lost_rounds(commits: Sequence[Mapping[str, Any]], kills: Sequence[Kill]) -> tuple[int, ...]:
    """Return the rounds that were committed before a kill and are not, or not the same, in the commit log."""
    final = {entry["server_round"]: entry["digest"] for entry in commits}
    return tuple(
        kill.server_round - 1
        for kill in kills
        if kill.digest and kill.server_round > 1 and final.get(kill.server_round - 1) != kill.digest
    )


def problems(run: Mapping[str, Any], commits: Sequence[Mapping[str, Any]], kills: Sequence[Kill]) -> list[str]:
    """Return what is not as promised, one sentence each."""
    found = []
    if run["state"] != "finished":
        found.append(f"the run is {run['state']}: {run['reason']}")
    rounds = [entry["server_round"] for entry in commits if entry["server_round"] > 0]
    if rounds != list(range(1, run["num_rounds"] + 1)):
        found.append(f"the commit log holds rounds {rounds}, not 1 to {run['num_rounds']}, each once")
    found += [f"round {lost} was committed and is lost" for lost in lost_rounds(commits, kills)]
    return found


def report(
    run: Mapping[str, Any],
    commits: Sequence[Mapping[str, Any]],
    kills: Sequence[Kill],
    trainings: Trainings,
    *,
    elapsed_s: float,
) -> dict[str, Any]:
    """Return the closing report as a JSON object."""
    return {
        "run_id": run["run_id"],
        "server_round": run["server_round"],
        "num_rounds": run["num_rounds"],
        "metrics": run["metrics"].get(str(run["server_round"]), {}),
        "model_digest": run["checkpoint"]["model_digest"] if run["checkpoint"] else None,
        "kills": [
            {
                "replica": kill.replica_id,
                "server_round": kill.server_round,
                "seconds_without_leader": (kill.served_s or kill.at_s) - kill.at_s,
                "seconds_without_training": kill.pause_s,
            }
            for kill in kills
        ],
        "rounds_lost": list(lost_rounds(commits, kills)),
        "trainings": {
            "needed": trainings.needed,
            "repeated": trainings.repeated,
            "answered_from_cache": trainings.replayed,
        },
        "seconds": elapsed_s,
    }


def report_table(told: Mapping[str, Any]) -> Table:
    """Return the closing report as a table."""
    table = Table(title="Report", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("rounds", f"{told['server_round']} of {told['num_rounds']}, run {told['run_id']} throughout")
    if "accuracy" in told["metrics"]:
        table.add_row("accuracy on held-out digits", f"{told['metrics']['accuracy']:.4f}")
    table.add_row("leaders killed with -9", str(len(told["kills"])))
    for number, kill in enumerate(told["kills"], 1):
        serving = f"another leader after {kill['seconds_without_leader']:.1f} s"
        what = f"replica {kill['replica']} in round {kill['server_round']}; {serving}"
        table.add_row(f"seconds without training, kill {number}", f"{kill['seconds_without_training']:.1f} ({what})")
    table.add_row("rounds lost", str(len(told["rounds_lost"])))
    trainings = told["trainings"]
    cached = trainings["answered_from_cache"]
    replays = f" ({cached} requests were answered from the clients' cache)" if cached else ""
    table.add_row("trainings repeated", f"{trainings['repeated']} of {trainings['needed']}{replays}")
    table.add_row("model digest", told["model_digest"] or "-")
    table.add_row("seconds in all", f"{told['seconds']:.0f}")
    return table
