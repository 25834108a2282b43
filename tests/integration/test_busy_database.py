"""A SuperLink whose database refuses to write: Flower's own clients try again, and nothing is lost or done by half."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from flwr_ha.superlink import busy
from tests.integration.flowerserver import Node, connected_node, get_object_tree

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own migrations


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Give a SuperNode's connection to a SuperLink."""
    with connected_node(tmp_path, monkeypatch) as node:
        yield node


@contextmanager
def locked(database: Path) -> Iterator[threading.Event]:
    """Hold the database until the SuperLink has refused a request; the event says that it has."""
    refused = threading.Event()
    with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")

        def note(context: Any) -> None:
            if "locked" in str(context.original_exception):
                if not refused.is_set():
                    other.execute("ROLLBACK")
                refused.set()

        event.listen(Engine, "handle_error", note)
        try:
            yield refused
        finally:
            event.remove(Engine, "handle_error", note)


def failing_once(monkeypatch: pytest.MonkeyPatch, state: Any, method: str) -> list[str]:
    """Let a method of Flower's state fail at its first call as a locked database does."""
    plain: Callable[..., Any] = getattr(state, method)
    calls: list[str] = []

    def fail(*arguments: Any, **more: Any) -> Any:
        calls.append(method)
        if len(calls) == 1:
            raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))
        return plain(*arguments, **more)

    monkeypatch.setattr(type(state), method, lambda _, *arguments, **more: fail(*arguments, **more))
    return calls


def test_requests_wait_for_their_turn_to_write_and_not_for_the_disk(node: Node) -> None:
    """Messages of a big model keep the database locked for longer than the 5 s after which Flower gives up."""
    assert node.state.query("PRAGMA busy_timeout") == [{"timeout": busy.BUSY_TIMEOUT_MS}]
    assert node.state.query("PRAGMA synchronous") == [{"synchronous": 0}]
    assert node.state.query("PRAGMA journal_mode") == [{"journal_mode": "wal"}]


def test_message_reaches_a_supernode_that_a_lock_refuses(node: Node) -> None:
    """The request is refused with "try again", which a SuperNode does by itself."""
    message = node.ask()

    with locked(node.database) as refused:
        received = node.receive()

    assert refused.is_set()
    assert received is not None
    assert received[0].metadata.message_id == message.metadata.message_id


def test_reply_is_kept_when_a_lock_refuses_it(node: Node) -> None:
    """A SuperNode gives its reply up at any answer but "try again", and the round would wait for its deadline."""
    node.ask()
    received = node.receive()[0]
    reply, parts = node.answer_to(received)

    with locked(node.database) as refused:
        names, session = node.send(reply, get_object_tree(reply), 0.1)
    assert refused.is_set()
    assert names == set(parts)
    for name in names:
        with locked(node.database) as refused:
            node.push_object(node.run_id, session, name, parts[name])
        assert refused.is_set()

    [found] = node.state.get_message_res(message_ids={received.metadata.message_id}, run_id=node.run_id)
    assert found.metadata.message_id == reply.metadata.message_id
    assert {name: node.state.object_store.get(name) for name in parts} == parts


def test_message_is_not_marked_as_delivered_by_a_request_that_failed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower counts the traffic after it has marked the message: a failure there would lose the message."""
    message = node.ask()
    calls = failing_once(monkeypatch, node.state, "store_traffic")

    received = node.receive()

    assert len(calls) == 2
    assert received is not None
    assert received[0].metadata.message_id == message.metadata.message_id


def test_reply_is_stored_whole_or_not_at_all(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's time is counted last; the reply that was stored before it is taken back, and stored again."""
    node.ask()
    received = node.receive()[0]
    calls = failing_once(monkeypatch, node.state, "add_clientapp_runtime")

    reply = node.reply(received)

    assert len(calls) == 2
    with closing(sqlite3.connect(node.database)) as connection:
        assert connection.execute("SELECT message_id FROM message_res").fetchall() == [(reply.metadata.message_id,)]


def test_object_whose_answer_was_lost_may_be_sent_again(node: Node) -> None:
    """The first request has stored it; its repetition is no failure, other content under the same name is one."""
    node.ask()
    reply, parts = node.answer_to(node.receive()[0])
    names, session = node.send(reply, get_object_tree(reply), 0.1)
    first, *others = sorted(names)

    node.push_object(node.run_id, session, first, parts[first])
    node.push_object(node.run_id, session, first, parts[first])
    with pytest.raises(Exception, match="push"):
        node.push_object(node.run_id, session, first, b"something else")

    for name in others:
        node.push_object(node.run_id, session, name, parts[name])
    assert {name: node.state.object_store.get(name) for name in parts} == parts


def test_object_that_nobody_waits_for_is_refused(node: Node) -> None:
    """It is not asked for again and again: no database refused it."""
    with pytest.raises(Exception, match="push"):
        node.push_object(node.run_id, "no session", hashlib.sha256(b"x").hexdigest(), b"x")


@pytest.mark.parametrize("error", [ValueError("a mistake"), sqlite3.IntegrityError("UNIQUE")])
def test_mistake_is_not_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What fails each time would keep a SuperNode from all its other work."""
    node.ask()
    received = node.receive()[0]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(node.state), "store_traffic", fail)
    with pytest.raises(Exception, match="500"):
        node.reply(received)
