"""For the tests of your own app: check that its strategy gives the same model when the server dies at any moment."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flwr_ha.serverapp.strategy import HighlyAvailable
from flwr_ha.serverapp.testing import (
    FakeClock,
    FakeGrid,
    FakeNode,
    ServerDiedError,
    Work,
    evaluate,
    some_model,
    some_nodes,
    train,
)

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import Result, Strategy

__all__ = ["FakeClock", "FakeGrid", "FakeNode", "NotResumableError", "ServerDiedError", "Work", "check_resume"]


class NotResumableError(AssertionError):
    """A training that was resumed ended with another result; the message says after which death, and what differs."""


def check_resume(  # noqa: PLR0913  # each is a setting of its own, all but the first by name
    make_strategy: Callable[[], Strategy],
    *,
    initial_arrays: ArrayRecord | None = None,
    num_rounds: int = 3,
    num_nodes: int = 3,
    train: Work = train,
    evaluate: Work = evaluate,
    same_arrays: bool = True,
) -> Result:
    """Let the server die before each single reply of a training, resume it, and compare it with the undisturbed one.

    Nothing is started and nothing waits: nodes, network and time are in memory, each life of the server is a new
    strategy object that knows what the checkpoint holds and no more. State that a strategy keeps where
    `HighlyAvailable` does not see it (a module's global, a random generator) shows here.

    Parameters
    ----------
    make_strategy : callable
        Returns a new Message-API strategy, as the ServerApp makes it; not wrapped.
    initial_arrays : ArrayRecord, optional
        Initial model; without it a small one: ``weight`` (3, 4) float32 and ``bias`` (4,) float64.
    num_rounds, num_nodes : int
        Rounds of the training, and nodes; all of them are ``min_nodes``.
    train, evaluate : callable, optional
        What a node does, deterministic; without them steps and losses that depend on partition, round and model.
    same_arrays : bool
        As for `HighlyAvailable`.

    Returns
    -------
    Result
        Of the undisturbed training.

    Raises
    ------
    NotResumableError
        A resumed training differs: give the strategy ``state_dict()`` and ``load_state_dict()``.
    """
    initial_arrays = some_model() if initial_arrays is None else initial_arrays

    def live(folder: Path, first_id: int, deaths: int | None = None) -> tuple[Result, int]:
        """Run one life of the server, with node ids of its own; return its result and the number of replies."""
        clock = FakeClock()
        grid = FakeGrid(clock, some_nodes(num_nodes, first_id=first_id), work={"train": train, "evaluate": evaluate})
        grid.deaths = deaths
        strategy = HighlyAvailable(make_strategy(), min_nodes=num_nodes, checkpoint_dir=folder, same_arrays=same_arrays)
        strategy.clock = clock  # type: ignore[misc]  # the seam for tests
        result = strategy.start(grid, initial_arrays.copy(), num_rounds=num_rounds)
        return result, len(grid.calls)

    with tempfile.TemporaryDirectory(prefix="flwr-ha-check-") as name:
        wanted, replies = live(Path(name, "undisturbed"), 100)
        for deaths in range(replies):
            folder = Path(name, str(deaths))
            with suppress(ServerDiedError):
                live(folder, 1000, deaths)
            found, _ = live(folder, 2000)
            _compare(found, wanted, f"the server died after reply {deaths} of {replies} and")
    return wanted


def _compare(found: Result, wanted: Result, story: str) -> None:
    if list(found.arrays) != list(wanted.arrays):
        raise NotResumableError(f"{story} the resumed model has arrays {list(found.arrays)}, not {list(wanted.arrays)}")
    for name, array in wanted.arrays.items():
        if found.arrays[name].object_id != array.object_id:
            raise NotResumableError(f"{story} the array {name!r} of the resumed model has other values")
    for part in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        if repr(getattr(found, part)) != repr(getattr(wanted, part)):  # NaN, which a metric may be, equals nothing
            differing = f"{part}: {getattr(found, part)} instead of {getattr(wanted, part)}"
            raise NotResumableError(f"{story} the resumed training has other {differing}")
