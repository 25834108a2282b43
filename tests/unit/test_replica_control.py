"""When the leader takes a new picture of the control plane, and when it need not look."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.errors import NoMajorityError
from flwr_ha.replica import duties
from flwr_ha.superlink.linkstate import ControlPlane


class Desk:
    """The duties of one leadership over a database and storage that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.rows = b"rows"
        self.log_lines = 0
        self.pictures: list[int] = []  # the log mark of each
        self.committed: list[str] = []
        self.is_reachable = True
        monkeypatch.setattr(duties.linkstate, "export", self._export)
        monkeypatch.setattr(duties.linkstate, "log_mark", lambda _: self.log_lines)
        monkeypatch.setattr(duties, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        tools = SimpleNamespace(
            replica_id=0,
            needed_copies=1,
            store=SimpleNamespace(put=lambda data: f"digest of {data.decode()}"),
            storage=SimpleNamespace(protect=self._protect),
            coordinator=SimpleNamespace(commit_control=lambda _, digest, copies: self.committed.append(digest)),
            events=SimpleNamespace(add=lambda *_, **__: None),
        )
        leadership = cast(Any, SimpleNamespace(term=1))
        self.duties = duties.Duties(cast(Any, tools), leadership, cast(Any, None), Path("none"))

    def _export(self, _: Path, put: object, *, logs_until: int, known_fabs: object) -> ControlPlane:
        self.pictures.append(logs_until)
        return ControlPlane(snapshot=self.rows + b" and %d lines" % logs_until, blobs=())

    def _protect(self, *_: object, **__: object) -> tuple[int, ...]:
        if not self.is_reachable:
            raise NoMajorityError("nobody answers")
        return (1,)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Give the duties and what they work on."""
    return Desk(monkeypatch)


def test_unchanged_database_is_not_read_again(desk: Desk) -> None:
    """An idle leader does not take the same picture twice a second, also not after the time of the logs."""
    for _ in range(3):
        assert desk.duties.replicate_control(seen=7)
        desk.now_s += duties.LOGS_EVERY_S

    assert len(desk.pictures) == 1


def test_change_is_carried_at_once(desk: Desk) -> None:
    """The next look sees that somebody has written."""
    desk.duties.replicate_control(seen=7)
    desk.rows = b"more rows"

    assert desk.duties.replicate_control(seen=8)

    assert desk.committed == ["digest of rows and 0 lines", "digest of more rows and 0 lines"]


def test_failed_copy_is_tried_again_though_nobody_writes(desk: Desk) -> None:
    """What did not reach a majority is not taken for safe."""
    desk.is_reachable = False
    assert not desk.duties.replicate_control(seen=7)
    desk.is_reachable = True

    assert desk.duties.replicate_control(seen=7)

    assert desk.committed == ["digest of rows and 0 lines"]


def test_last_lines_of_a_log_are_carried_though_nobody_writes_any_more(desk: Desk) -> None:
    """Lines that came after the mark was moved are carried when it is time, and the database is left alone then."""
    desk.duties.replicate_control(seen=7)
    desk.log_lines = 5
    desk.duties.replicate_control(seen=8)
    assert desk.pictures == [0, 0]

    for _ in range(3):
        desk.now_s += duties.LOGS_EVERY_S
        desk.duties.replicate_control(seen=8)

    assert desk.pictures == [0, 0, 5]
    assert desk.committed[-1] == "digest of rows and 5 lines"


def test_answer_that_waits_always_has_a_new_picture(desk: Desk) -> None:
    """A caller that asks has changed something: what the watch saw before does not count."""
    desk.duties.replicate_control(seen=7)
    desk.rows = b"a new node"

    assert desk.duties.replicate_control(is_asked=True)

    assert desk.committed[-1] == "digest of a new node and 0 lines"
