"""A client answers a repeated request from disk, and never with anything else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flwr_ha.clientapp import replay_mod
from flwr_ha.clientapp.replay import request_key
from flwr_ha.clientapp.replaystore import ReplayStore
from flwr_ha.model import REPLAYED


class Client:
    """Counts what it really computes; its answers differ each time."""

    def __init__(self) -> None:
        self.calls = 0
        self.error = False

    def __call__(self, message: Message, context: Context) -> Message:
        self.calls += 1
        if self.error:
            return Message(Error(2, "out of memory"), reply_to=message)
        seen = context.state.config_records.get("seen", ConfigRecord({"count": 0}))
        context.state["seen"] = ConfigRecord({"count": seen["count"] + 1})
        message.content = RecordDict()  # inner mods may change the instruction
        arrays = ArrayRecord([np.full(3, self.calls, np.float32), np.full(3, self.calls, np.float32)])
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"call": self.calls})}), reply_to=message)


@pytest.fixture
def client():
    return Client()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLWR_HA_REPLAY_DIR", str(tmp_path / "replay"))
    return tmp_path / "replay"


def context() -> Context:
    return Context(run_id=5, node_id=9, node_config={}, state=RecordDict(), run_config={})


def request(
    *, value: float = 1.0, server_round: int = 1, kind: str = "train", node: int = 9, run_id: int = 5, group=""
):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
    arrays, config = ArrayRecord([np.full(4, value)]), ConfigRecord({"server-round": server_round})
    return Message(RecordDict({"arrays": arrays, "config": config}), node, kind, group_id=group)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.reply"))


def test_the_same_request_is_answered_without_computing(client):
    """Content, metrics and ids are the same; the reply belongs to the new message."""
    first = replay_mod(request(), context(), client)
    again = request()
    again.metadata.__dict__["_message_id"] = "new"
    second = replay_mod(again, context(), client)
    assert client.calls == 1
    assert second.content.pop(REPLAYED)["is-replayed"]  # by which the server counts it, and takes it off
    assert second.content.object_id == first.content.object_id
    assert second.content["arrays"].to_numpy_ndarrays()[0].tolist() == [1, 1, 1]
    assert second.metadata.reply_to_message_id == "new"


@pytest.mark.parametrize(
    "change",
    [{"value": 2.0}, {"server_round": 2}, {"kind": "evaluate"}, {"node": 8}, {"run_id": 6}, {"group": "1.1"}],
)
def test_another_request_is_computed(client, change):
    """Another run, node, round, kind, group or content is never answered from the cache."""
    replay_mod(request(), context(), client)
    replay_mod(request(**change), context(), client)
    assert client.calls == 2


def test_the_clients_state_moves_as_if_it_had_computed(client):
    """A stateful client counts the round once, however often it is asked."""
    before, after = context(), context()
    replay_mod(request(), before, client)
    after.state["left_over"] = ConfigRecord({"from": "later"})
    state = after.state
    replay_mod(request(), after, client)
    assert after.state is state
    assert after.state.object_id == before.state.object_id
    assert dict(after.state["seen"]) == {"count": 1}


def test_errors_are_not_kept(client):
    """The next request computes."""
    client.error = True
    assert replay_mod(request(), context(), client).has_error()
    client.error = False
    assert replay_mod(request(), context(), client).has_content()
    assert client.calls == 2


def test_queries_are_always_asked(client):
    """What a query asks for may have changed."""
    for _ in range(2):
        replay_mod(request(kind="query"), context(), client)
    assert client.calls == 2


@pytest.mark.parametrize("position", [0, 20, 50, 60, 200, -1])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_corrupt_entry_is_removed_and_computed_again(client, folder, position, damage):
    """A bit that flipped anywhere never reaches the server."""
    replay_mod(request(), context(), client)
    (entry,) = entries(folder)
    data = bytearray(entry.read_bytes())
    if damage == "flip":
        data[position] ^= 1
    else:
        del data[position:]
    entry.write_bytes(data)
    assert replay_mod(request(), context(), client).content["m"]["call"] == 2
    assert replay_mod(request(), context(), client).content["m"]["call"] == 2
    assert client.calls == 2


def test_a_disk_that_refuses_costs_only_the_replay(client, folder):
    """The reply is sent all the same."""
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where a folder should be", encoding="utf-8")
    for _ in range(2):
        assert replay_mod(request(), context(), client).has_content()
    assert client.calls == 2


def test_a_crash_while_writing_leaves_no_entry(client, folder, monkeypatch):
    """An entry is there as a whole or not at all."""

    def crash(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        assert replay_mod(request(), context(), client).has_content()
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    replay_mod(request(), context(), client)
    assert len(entries(folder)) == 1


def small(store: ReplayStore, key: str, number: int) -> None:
    content = RecordDict({"a": ArrayRecord({"w": Array(np.full(250, number, np.float32))})})
    store.put(key, content, RecordDict())
    os.utime(store._path(key), (number * 100.0 + 1e9, number * 100.0 + 1e9))


def test_the_oldest_entries_make_room(tmp_path, monkeypatch):
    """The folder stays below its bound; what is bigger than the bound is not kept."""
    monkeypatch.setattr("flwr_ha.clientapp.replaystore.time.time", lambda: 1e9)
    store = ReplayStore(tmp_path, max_bytes=7000)
    for number in range(6):
        small(store, f"{number}", number)
    kept = [key for key in map(str, range(6)) if store.get(key)]
    assert kept == ["3", "4", "5"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 7000
    store.put("big", RecordDict({"a": ArrayRecord({"w": Array(np.zeros(5000))})}), RecordDict())
    assert store.get("big") is None
    assert store.get("5") is not None


def test_old_entries_are_not_used_and_go(tmp_path, monkeypatch):
    """A week is enough; half-written files of dead processes go as well."""
    store = ReplayStore(tmp_path, max_age_s=1000.0)
    small(store, "old", 1)
    small(store, "young", 20)
    (tmp_path / "1234-abcd").write_bytes(b"half")
    os.utime(tmp_path / "1234-abcd", (1e9 - 5000, 1e9 - 5000))
    monkeypatch.setattr("flwr_ha.clientapp.replaystore.time.time", lambda: 1e9 + 2100)
    assert store.get("young") is not None
    assert store.get("old") is None
    store.put("new", RecordDict(), RecordDict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.reply", "young.reply"]


def test_concurrent_writers_of_one_key_do_not_disturb_each_other(tmp_path):
    """Several ClientApp processes share the folder of a node."""
    store = ReplayStore(tmp_path, max_bytes=100_000)
    content = RecordDict({"a": ArrayRecord({"w": Array(np.ones(2500, np.float32))})})
    failures = []

    def work(number: int) -> None:
        for turn in range(8):
            store.put("same", content, RecordDict())
            store.put(f"{number}-{turn}", content, RecordDict())
            found = store.get("same")
            if found is not None and found[0].object_id != content.object_id:
                failures.append(found)

    threads = [threading.Thread(target=work, args=(number,), name=f"writer-{number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * 100_000


def test_keys_are_file_names():
    """Nothing of a request can lead out of the folder."""
    key = request_key(request(group="../../x"))
    assert len(key) == 64
    assert int(key, 16) >= 0
