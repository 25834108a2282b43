"""The event log: numbered, in memory and on disk, and never in the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.replica.eventlog import EventLog


def numbers(events: list[dict[str, object]]) -> list[object]:
    """Return the numbers of events."""
    return [event["number"] for event in events]


def test_event_has_number_time_replica_and_its_own_fields(tmp_path: Path) -> None:
    """One line of JSON a line, the same as in memory."""
    log = EventLog(tmp_path / "events.jsonl", replica_id=2)
    log.add("commit", "round 3 is committed", server_round=3)
    (event,) = log.after(0)
    assert {key: event[key] for key in ("number", "replica", "kind", "message", "server_round")} == {
        "number": 1,
        "replica": 2,
        "kind": "commit",
        "message": "round 3 is committed",
        "server_round": 3,
    }
    assert event["at"].endswith("Z")
    assert json.loads((tmp_path / "events.jsonl").read_text()) == event


def test_reader_goes_on_where_it_was(tmp_path: Path) -> None:
    """``GET /events?after=N``."""
    log = EventLog(tmp_path / "events.jsonl", replica_id=0)
    for number in range(5):
        log.add("role", f"event {number}")
    assert numbers(log.after(3)) == [4, 5]
    assert log.after(5) == []


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    """Also when the last line was cut off by a crash: a reader's ``after=`` stays good."""
    file = tmp_path / "events.jsonl"
    first = EventLog(file, replica_id=0)
    first.add("start", "one")
    first.add("start", "two")
    with file.open("a") as text:
        text.write('{"number": 3, "at": "2026')
    second = EventLog(file, replica_id=0)
    second.add("start", "three")
    assert numbers(second.after(0)) == [3]


def test_line_after_a_cut_line_can_be_read(tmp_path: Path) -> None:
    """The cut line must not swallow the next event."""
    file = tmp_path / "events.jsonl"
    file.write_text('{"number": 3, "at": "2026')
    EventLog(file, replica_id=0).add("start", "again")
    assert json.loads(file.read_text().splitlines()[-1])["message"] == "again"


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The newest are kept."""
    log = EventLog(tmp_path / "events.jsonl", replica_id=0, size=3)
    for number in range(10):
        log.add("role", f"event {number}")
    assert numbers(log.after(0)) == [8, 9, 10]


def test_file_is_rotated(tmp_path: Path) -> None:
    """Two files of the given size at most; the numbers go on over the border."""
    file = tmp_path / "events.jsonl"
    log = EventLog(file, replica_id=0, max_bytes=300)
    for number in range(20):
        log.add("role", f"event {number}")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"events.jsonl", "events.jsonl.1"}
    assert max(sizes.values()) < 300 + 200
    kept = [json.loads(line)["number"] for path in (f"{file}.1", file) for line in Path(path).read_text().splitlines()]
    assert kept == list(range(kept[0], 21))


def test_numbers_go_on_when_the_file_was_just_rotated(tmp_path: Path) -> None:
    """The restart finds no line in the new file, and looks into the old one."""
    file = tmp_path / "events.jsonl"
    log = EventLog(file, replica_id=0)
    for number in range(3):
        log.add("role", f"event {number}")
    file.rename(tmp_path / "events.jsonl.1")
    again = EventLog(file, replica_id=0)
    again.add("start", "again")
    assert numbers(again.after(0)) == [4]


def test_disk_that_refuses_does_not_stop_the_replica(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The event stays in memory, and the log says what is wrong."""
    folder = tmp_path / "gone"
    folder.mkdir()
    log = EventLog(folder / "events.jsonl", replica_id=0)
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        log.add("commit", "round 3 is committed")
    assert numbers(log.after(0)) == [1]
    assert "cannot be written: No such file or directory" in caplog.text


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The user must change it."""
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"data-dir: '.*events.jsonl' cannot be read: Is a directory"):
        EventLog(tmp_path / "events.jsonl", replica_id=0)


@pytest.mark.parametrize(
    ("kind", "level"),
    [("role", "INFO"), ("reply-rejected", "WARNING"), ("not-committed", "WARNING"), ("error", "ERROR")],
)
def test_level_tells_how_bad_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, level: str) -> None:
    """Degraded but safe is a warning; an error needs a person."""
    with caplog.at_level(logging.INFO):
        EventLog(tmp_path / "events.jsonl", replica_id=0).add(kind, "a sentence")
    assert [record.levelname for record in caplog.records] == [level]
