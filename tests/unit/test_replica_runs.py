"""What the leader says of its runs, from Flower's database and the ServerApps' reports."""

from __future__ import annotations

import pytest

from flwr_ha.model import RunState, RunStatus
from flwr_ha.replica.runs import MAX_RUNS, RunBoard
from flwr_ha.superlink.watch import RunRow, Summary, TaskState


def row(run_id: str, state: TaskState, details: str = "") -> RunRow:
    """Return a run as Flower has it."""
    return RunRow(
        run_id=run_id, task_id="1", app="a/b", fab_hash="", state=state, details=details, submitted_at="2026-11-24"
    )


def summary(*rows: RunRow, nodes_online: int = 4) -> Summary:
    """Return what the database says."""
    return Summary(nodes_online=nodes_online, nodes_total=5, runs=rows)


def report(run_id: str, state: RunState = RunState.TRAINING) -> RunStatus:
    """Return what a ServerApp says."""
    return RunStatus(run_id=run_id, app="?", state=state, reason="2 of 5 replies", num_rounds=8, min_nodes=5)


def test_report_tells_the_rounds_and_flower_the_nodes() -> None:
    """Each source counts for what it knows best."""
    board = RunBoard()
    board.report(report("7"))
    board.observe(summary(row("7", TaskState.RUNNING)))
    (status,) = board.statuses()
    assert (status.state, status.reason, status.min_nodes) == (RunState.TRAINING, "2 of 5 replies", 5)
    assert (status.app, status.nodes_online) == ("a/b", 4)


@pytest.mark.parametrize(
    ("flower", "shown"),
    [
        (TaskState.FINISHED, RunState.FINISHED),
        (TaskState.FAILED, RunState.FAILED),
        (TaskState.STOPPED, RunState.STOPPED),
    ],
)
def test_end_of_a_run_overrides_its_last_report(flower: TaskState, shown: RunState) -> None:
    """A ServerApp that was stopped or has failed cannot report it."""
    board = RunBoard()
    board.report(report("7"))
    board.observe(summary(row("7", flower, "why")))
    assert [(status.state, status.reason) for status in board.statuses()] == [(shown, "why")]
    assert board.in_training() == frozenset()


def test_app_without_reports_is_shown_by_what_flower_knows() -> None:
    """An app that does not use HighlyAvailable trains, too."""
    board = RunBoard()
    board.observe(summary(row("7", TaskState.STARTING), row("8", TaskState.RUNNING)))
    assert [(status.state, status.reason) for status in board.statuses()] == [
        (RunState.WAITING, "the ServerApp starts"),
        (RunState.TRAINING, ""),
    ]


def test_end_of_a_run_is_told_once() -> None:
    """The agent settles a switchover with it."""
    board = RunBoard()
    assert board.observe(summary(row("7", TaskState.RUNNING), row("8", TaskState.RUNNING))) == ()
    assert board.observe(summary(row("7", TaskState.FINISHED), row("8", TaskState.RUNNING))) == ("7",)
    assert board.observe(summary(row("7", TaskState.FINISHED), row("8", TaskState.FAILED))) == ("8",)
    assert board.observe(summary(row("7", TaskState.FINISHED), row("8", TaskState.FAILED))) == ()


def test_only_runs_in_a_round_are_waited_for() -> None:
    """A run that waits for nodes has no round that a switchover could break."""
    board = RunBoard()
    for run_id, state in (("7", RunState.TRAINING), ("8", RunState.EVALUATING), ("9", RunState.WAITING)):
        board.report(report(run_id, state))
    board.observe(summary(*(row(run_id, TaskState.RUNNING) for run_id in "789")))
    assert board.in_training() == {"7", "8"}


def test_old_runs_are_left_out_and_live_ones_never() -> None:
    """A record in the coordinator has a limit; the oldest run may still train."""
    board = RunBoard()
    ended = [row(str(number), TaskState.FINISHED) for number in range(1, MAX_RUNS + 11)]
    board.observe(summary(row("0", TaskState.RUNNING), *ended))
    shown = [status.run_id for status in board.statuses()]
    assert shown == ["0", *(str(number) for number in range(11, MAX_RUNS + 11))]


def test_runs_are_listed_as_they_were_submitted() -> None:
    """Flower's ids are random, and a run that has ended does not change its place."""
    board = RunBoard()
    board.observe(summary(row("9", TaskState.FINISHED), row("1", TaskState.RUNNING), row("5", TaskState.FAILED)))
    assert [status.run_id for status in board.statuses()] == ["9", "1", "5"]


def test_next_leadership_starts_with_nothing() -> None:
    """What was reported under another term is not true any more."""
    board = RunBoard()
    board.report(report("7"))
    board.observe(summary(row("7", TaskState.RUNNING)))
    board.clear()
    assert board.statuses() == ()
