"""Whether an app is submitted: not twice, and again where its submission was not acknowledged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.coordination.values import View
from flwr_ha.replica import main
from flwr_ha.superlink.submit import run_of
from flwr_ha.superlink.tasks import WITHDRAWN
from flwr_ha.superlink.watch import RunRow, TaskState


def row(run_id: str, state: TaskState, details: str = "", *, fab_hash: str = "a") -> RunRow:
    """Return a run as Flower has it."""
    return RunRow(
        run_id=run_id, task_id="1", app="a/b", fab_hash=fab_hash, state=state, details=details, submitted_at="2026"
    )


@pytest.mark.parametrize("state", list(TaskState))
def test_a_run_of_this_bundle_is_known_however_it_ended(state: TaskState) -> None:
    """What a user has stopped stays stopped."""
    known = row("7", state, "stopped by a user")
    assert run_of("a", [row("6", state, fab_hash="b"), known]) == known


def test_a_submission_that_was_not_acknowledged_is_no_run() -> None:
    """Its user was told to submit it again."""
    withdrawn = row("7", TaskState.STOPPED, WITHDRAWN)
    assert run_of("a", [withdrawn]) is None
    assert run_of("a", [withdrawn, row("8", TaskState.RUNNING)]) == row("8", TaskState.RUNNING)


class Leadership:
    """A replica that leads, which sees more replicas at each look, and whose app fails to be submitted at first."""

    def __init__(self, *, running: list[int], outcomes: list[bool]) -> None:
        self.life = object()
        self.agent = SimpleNamespace(life=self.life)
        self.acts: list[int] = []  # replicas that ran at each act
        self._running, self._outcomes = running, outcomes

    @property
    def sight(self) -> SimpleNamespace:
        """What the coordinator shows."""
        self.seen = self._running.pop(0) if len(self._running) > 1 else self._running[0]
        return SimpleNamespace(view=View(replicas={number: {"state": "running"} for number in range(self.seen)}))

    def act(self, life: object) -> bool:
        """Submit the app."""
        assert life is self.life
        self.acts.append(self.seen)
        is_done = self._outcomes.pop(0)
        if not self._outcomes:
            self.agent.life = None  # it leads no more
        return is_done

    def run(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Lead to the end."""
        monkeypatch.setattr(main.time, "sleep", lambda seconds: None)
        replica = SimpleNamespace(pulse=self)
        main.act_when_safe(cast(Any, self.act), cast(Any, self.agent), cast(Any, replica), 1, cast(Any, self.life))
        return self.acts


def test_nothing_is_submitted_before_a_majority_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica of three cannot make it safe."""
    assert Leadership(running=[1, 1, 2], outcomes=[True]).run(monkeypatch) == [2]


def test_a_submission_that_failed_is_repeated_while_it_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A majority that was lost at that moment comes back; a leadership does not."""
    assert Leadership(running=[3, 1, 3], outcomes=[False, True]).run(monkeypatch) == [3, 3]
    assert Leadership(running=[3], outcomes=[False, False]).run(monkeypatch) == [3, 3]
