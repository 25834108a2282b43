"""When the leader takes a new picture of the control plane, and when it need not look."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.errors import HaError, NoMajorityError
from flwr_ha.replica import duties
from flwr_ha.superlink.linkstate import ControlPlane
from flwr_ha.superlink.procfs import ChildRecord


class Desk:
    """The duties of one leadership over a database and storage that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.rows = b"rows"
        self.log_lines = 0
        self.pictures: list[int] = []  # the log mark of each
        self.committed: list[str] = []
        self.is_reachable = True
        self.known_fabs: list[list[str]] = []  # at each picture
        self.protect_seconds: list[float] = []  # how long the next calls take
        self.protected = 0
        monkeypatch.setattr(duties.linkstate, "export", self._export)
        monkeypatch.setattr(duties.linkstate, "log_mark", lambda _: self.log_lines)
        monkeypatch.setattr(duties, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        tools = SimpleNamespace(
            replica_id=0,
            needed_copies=1,
            store=SimpleNamespace(put=lambda data: f"digest of {data.decode()}", size=lambda digest: 1),
            storage=SimpleNamespace(protect=self._protect),
            holdings=SimpleNamespace(pinned=lambda digests: nullcontext()),
            coordinator=SimpleNamespace(
                commit_control=lambda _, digest, copies: self.committed.append(digest),
                head=lambda run_id: None,
                commit=lambda leadership, head: head,
                leader=lambda: SimpleNamespace(term=self.newest_term),
            ),
            events=SimpleNamespace(add=lambda *_, **__: None),
        )
        leadership = cast(Any, SimpleNamespace(term=1))
        self.newest_term = 1
        superlink = SimpleNamespace(open_public=self._open_public)
        self.duties = duties.Duties(cast(Any, tools), leadership, cast(Any, superlink), Path("none"))

    def _open_public(self, address: str, *, timeout_s: float) -> None:
        raise HaError(f"{address} is taken")

    def _export(self, _: Path, put: object, *, logs_until: int, known_fabs: dict[str, str]) -> ControlPlane:
        self.pictures.append(logs_until)
        self.known_fabs.append(sorted(known_fabs))
        known_fabs["app"] = "digest of the app"
        return ControlPlane(snapshot=self.rows + b" and %d lines" % logs_until, blobs=())

    def _protect(self, *_: object, **__: object) -> tuple[int, ...]:
        self.protected += 1
        self.now_s += self.protect_seconds.pop(0) if self.protect_seconds else 0.0
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


def test_app_whose_copy_failed_is_put_again(desk: Desk) -> None:
    """No picture names it, so it may have been collected before a majority is back; `flwr run` would fail for ever."""
    desk.is_reachable = False
    assert not desk.duties.replicate_control(is_asked=True)
    desk.is_reachable = True
    assert desk.duties.replicate_control(is_asked=True)
    assert desk.duties.replicate_control(is_asked=True)

    assert desk.known_fabs == [[], [], ["app"]]


@pytest.mark.parametrize(("seconds", "looks"), [([1.0], 1), ([100.0, 1.0], 2), ([100.0, 100.0, 1.0], 3)])
def test_copies_that_took_long_are_looked_at_again_before_the_commit(
    desk: Desk, seconds: list[float], looks: int
) -> None:
    """The first replica may have collected its copy, which nothing names yet, while the last one was filled."""
    desk.protect_seconds = seconds
    body = {"app": "a/b", "num_rounds": 3, "server_round": 1, "digest": "sha256:1", "parts": ["sha256:2"], "bytes": 2}

    head = desk.duties.commit("7", {**body, "model_digest": "m", "metrics": {}}, lambda: None)

    assert (head.position.digest, head.copies, desk.protected) == ("sha256:1", (0, 1), looks)


def test_leader_of_an_old_term_ends_no_superlink(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was frozen while it took over; what listens on its address now serves the next term."""
    killed: list[ChildRecord] = []
    monkeypatch.setattr(duties, "listens_on", lambda pid, port: True)
    monkeypatch.setattr(duties, "kill_stale_child", lambda record, timeout_s: not killed.append(record))
    record = cast(ChildRecord, SimpleNamespace(pid=7))

    desk.newest_term = 2
    with pytest.raises(HaError, match="is taken"):
        desk.duties._open_public("127.0.0.1:8000", [record])
    assert killed == []

    desk.newest_term = 1
    with pytest.raises(HaError, match="is taken"):
        desk.duties._open_public("127.0.0.1:8000", [record])
    assert killed == [record]
