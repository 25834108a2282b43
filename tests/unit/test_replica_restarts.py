"""A killed ServerApp is started again, a few times per term."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.replica import restarts
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.restarts import Restarts
from flwr_ha.superlink.events import ServerAppDied

Done = list[tuple[str, Path, str, str]]
KILLED = ServerAppDied(task_id="5", run_id="17", status=-9)


class FakeTimer:
    """Stand in for threading.Timer; it goes off when the test says so."""

    made: list[FakeTimer] = []  # noqa: RUF012 emptied by the fixture

    def __init__(self, pause_s: float, act: object, args: tuple[object, ...]) -> None:
        self.pause_s, self.act, self.args, self.is_cancelled, self.name = pause_s, act, args, False, ""

    def start(self) -> None:
        self.made.append(self)

    def cancel(self) -> None:
        self.is_cancelled = True

    def join(self) -> None:
        assert self.is_cancelled

    def fire(self) -> None:
        self.act(*self.args)  # type: ignore[operator]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """Return what was written into the database; timers wait for the test."""
    calls: Done = []
    FakeTimer.made = []
    monkeypatch.setattr(restarts.threading, "Timer", FakeTimer)
    link = restarts.linkstate
    monkeypatch.setattr(link, "requeue_task", lambda file, task, note: calls.append(("requeue", file, task, note)))
    monkeypatch.setattr(link, "fail_task", lambda file, task, reason: calls.append(("fail", file, task, reason)))
    return calls


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    """Give an event log."""
    return EventLog(tmp_path / "events.jsonl", replica_id=0)


def test_serverapp_starts_again_after_growing_pauses(log: EventLog, done: Done) -> None:
    """The first one soon; one that dies again and again gets time."""
    book = Restarts(limit=3, events=log)
    for _ in range(3):
        book.restart(Path("db"), KILLED, term=1)
    assert [timer.pause_s for timer in FakeTimer.made] == pytest.approx([0.1, 0.5, 2.5])
    assert done == []  # not before its time
    FakeTimer.made[0].fire()
    why = "the ServerApp of run 17 was ended by signal 9 without a result"
    assert done == [("requeue", Path("db"), "5", f"{why}: it starts again (restart 1 of 3 in term 1)")]


def test_limit_lets_the_run_fail_and_says_so(log: EventLog, done: Done) -> None:
    """A ServerApp that kills itself each time must not do so for ever."""
    book = Restarts(limit=1, events=log)
    book.restart(Path("db"), KILLED, term=1)
    book.restart(Path("db"), KILLED, term=1)
    assert len(FakeTimer.made) == 1
    kinds = [(event["kind"], event["run_id"]) for event in log.after(0)]
    assert kinds == [("serverapp-died", "17"), ("error", "17")]
    reason = log.after(1)[0]["message"]
    assert "it was started again once in term 1, the limit: the run fails" in reason
    assert done == [("fail", Path("db"), "5", reason)]


def test_count_is_of_one_run_in_one_term(log: EventLog, done: Done) -> None:
    """Another run, or a new leader, has its own."""
    book = Restarts(limit=1, events=log)
    book.restart(Path("db"), KILLED, term=1)
    book.restart(Path("db"), KILLED, term=2)
    book.restart(Path("db"), ServerAppDied(task_id="6", run_id="18", status=1), term=1)
    assert [event["kind"] for event in log.after(0)] == ["serverapp-died"] * 3
    assert "ended with status 1 without a result" in log.after(2)[0]["message"]


def test_stop_calls_off_what_waits(log: EventLog, done: Done) -> None:
    """Nothing is written into a database whose SuperLink has ended."""
    book = Restarts(limit=3, events=log)
    book.restart(Path("db"), KILLED, term=1)
    book.close()
    assert FakeTimer.made[0].is_cancelled


def test_database_that_refuses_is_told(log: EventLog, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would hang without a word."""

    def refuse(_: Path, __: str, *, note: str) -> None:
        raise ConfigError("unknown schema")

    monkeypatch.setattr(restarts.linkstate, "requeue_task", refuse)
    Restarts(limit=3, events=log).restart(Path("db"), KILLED, term=1)
    FakeTimer.made[0].fire()
    assert log.after(1)[0]["message"] == "the death of a ServerApp cannot be dealt with: unknown schema"


def test_pause_stays_a_number_after_any_number_of_restarts(log: EventLog, done: Done) -> None:
    """The limit is the user's, and may be thousands."""
    book = Restarts(limit=10_000, events=log)
    for _ in range(1_000):
        book.restart(Path("state.db"), KILLED, term=1)
    assert FakeTimer.made[-1].pause_s == restarts.LONGEST_PAUSE_S
