"""A replica whose disk is full does not lead, and says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from flwr_ha.model import Head, Position
from flwr_ha.replica.disk import LEAST_BYTES, DiskWatch, needed_bytes
from flwr_ha.replica.machine import MachineState, Phase, step
from flwr_ha.replica.messages import Campaign, Elected, FitnessChanged, Seen, StandDown

FULL = FitnessChanged("the disk is full")


def _head(run_id: str, *, server_round: int, size_bytes: int) -> Head:
    position = Position(1, server_round, "sha256:" + "0" * 64)
    return Head(run_id=run_id, app="a/b", num_rounds=3, position=position, model_digest="", size_bytes=size_bytes)


def _free(monkeypatch: pytest.MonkeyPatch, free_bytes: int, *, flags: int = 0) -> None:
    status = SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_flag=flags)
    monkeypatch.setattr(os, "statvfs", lambda _: status)


def test_room_is_needed_for_the_next_checkpoint_of_each_run_that_goes_on() -> None:
    """A run that has ended writes nothing more."""
    large = LEAST_BYTES * 2
    going_on, ended = _head("1", server_round=1, size_bytes=large), _head("2", server_round=3, size_bytes=10 * large)

    assert needed_bytes([]) == LEAST_BYTES
    assert needed_bytes([going_on, ended]) == large


def test_a_disk_at_the_limit_does_not_go_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once full it is good again only with room to spare."""
    watch = DiskWatch(Path("/data"))
    changes = []
    for free in (200, 99, 100, 149, 150, 100):
        _free(monkeypatch, free)
        changes.append((watch.look(100), bool(watch.trouble)))

    assert changes == [(False, False), (True, True), (False, True), (False, True), (True, False), (False, False)]


def test_the_trouble_of_a_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, read-only and not answering are told apart, and the folder is in the sentence."""
    watch = DiskWatch(Path("/data"))
    _free(monkeypatch, 10**6)
    assert watch.look(2 * 10**6)
    assert watch.trouble == "the disk of /data is full: 1.0 MB are free, 2.0 MB are needed"

    _free(monkeypatch, 10**9, flags=os.ST_RDONLY)
    watch.look(1)
    assert watch.trouble == "the disk of /data is mounted read-only"

    def fail(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "statvfs", fail)
    watch.look(1)
    assert watch.trouble == "the disk of /data does not answer: Input/output error"


def test_leader_whose_disk_is_full_stands_down() -> None:
    """It could not commit another round, a standby can."""
    leader = MachineState(replica_id=0, phase=Phase.LEADING, term=3, lease_until_s=100.0, is_warm=True)

    after, actions = step(leader, FULL, now_s=1.0)

    assert after.phase is Phase.STANDBY
    assert actions[0] == StandDown(3, FULL.reason)


def test_standby_whose_disk_is_full_does_not_campaign_until_it_has_room() -> None:
    """Nor does it lead when the disk fills up during its election."""
    nobody = Seen(leader=None, term=3)
    standby = MachineState(replica_id=0, term=3, is_warm=True)
    full, actions = step(standby, FULL, now_s=1.0)
    assert not actions
    assert step(full, nobody, now_s=1.0)[1] == ()

    campaigning, _ = step(standby, nobody, now_s=1.0)
    elected, actions = step(step(campaigning, FULL, now_s=1.0)[0], Elected(4, 100.0), now_s=1.0)
    assert elected.phase is Phase.STANDBY
    assert actions[0] == StandDown(4, FULL.reason)

    again, _ = step(full, FitnessChanged(""), now_s=2.0)
    assert isinstance(step(again, nobody, now_s=2.0)[1][0], Campaign)
