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


def report_table(
    run: Mapping[str, Any],
    commits: Sequence[Mapping[str, Any]],
    kills: Sequence[Kill],
    trainings: Trainings,
    *,
    elapsed_s: float,
) -> Table:
    """Return the closing report."""
    metrics = run["metrics"].get(str(run["server_round"]), {})
    table = Table(title="Report", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("rounds", f"{run['server_round']} of {run['num_rounds']}, run {run['run_id']} throughout")
    if "accuracy" in metrics:
        table.add_row("accuracy on held-out digits", f"{metrics['accuracy']:.4f}")
    table.add_row("leaders killed with -9", str(len(kills)))
    for number, kill in enumerate(kills, 1):
        serving = f"another leader after {(kill.served_s or kill.at_s) - kill.at_s:.1f} s"
        what = f"replica {kill.replica_id} in round {kill.server_round}; {serving}"
        table.add_row(f"seconds without training, kill {number}", f"{kill.pause_s:.1f} ({what})")
    table.add_row("rounds lost", str(len(lost_rounds(commits, kills))))
    replays = f" ({trainings.replayed} requests were answered from the clients' cache)" if trainings.replayed else ""
    table.add_row("trainings repeated", f"{trainings.repeated} of {trainings.needed}{replays}")
    table.add_row("model digest", run["checkpoint"]["model_digest"] if run["checkpoint"] else "-")
    table.add_row("seconds in all", f"{elapsed_s:.0f}")
    return table
