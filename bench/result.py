"""One measured figure, and the table of all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Hold one figure.

    Attributes
    ----------
    name : str
        What was measured.
    value : float
        In `unit`.
    unit : str
        Unit of `value` and `against`.
    against : float or None
        The same of what it is compared to, measured in the same call; None: nothing.
    ratio : float or None
        What the goal is about, where that is a ratio.
    goal : float or None
        Upper bound, or lower bound where `is_more_better`, of the ratio, else of the value.
    is_more_better : bool
        Which way the goal points.
    """

    name: str
    value: float
    unit: str
    against: float | None = None
    ratio: float | None = None
    goal: float | None = None
    is_more_better: bool = False

    @property
    def is_ok(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        measured = self.value if self.ratio is None else self.ratio
        return measured >= self.goal if self.is_more_better else measured <= self.goal

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``bench/results.json``."""
        fields = asdict(self)
        is_more_better = fields.pop("is_more_better")
        sign = ">=" if is_more_better else "<="
        fields["goal"] = None if self.goal is None else f"{sign} {self.goal:g}"
        return {**fields, "ok": self.is_ok}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Say how much time a benchmark may take.

    Attributes
    ----------
    is_quick : bool
        A first impression in seconds instead of figures to rely on.
    is_long : bool
        The soak tests too.
    """

    is_quick: bool = False
    is_long: bool = False

    def pick(self, quick: int, full: int) -> int:
        """Return how often, or how big."""
        return quick if self.is_quick else full


def interleaved(times: int, *actions: Callable[[], float]) -> list[list[float]]:
    """Run actions in turn, so that a change of the machine's load meets all of them.

    Returns
    -------
    list of list of float
        For each action its `times` results.
    """
    results: list[list[float]] = [[] for _ in actions]
    for _ in range(times):
        for values, action in zip(results, actions, strict=True):
            values.append(action())
    return results


def median_ratio(values: Sequence[float], against: Sequence[float]) -> float:
    """Return the median of the ratios of neighbours: both of a pair saw the same load."""
    return statistics.median(a / b for a, b in zip(values, against, strict=True))
