"""A SuperLink whose database refuses to write: Flower's own clients try again, and nothing is lost or done by half."""

from __future__ import annotations

import hashlib
import importlib
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from flwr_ha.local.processes import wait_until

with warnings.catch_warnings():  # raised by the libraries that Flower imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.supercore import sql_mixin
    from flwr.supercore.fab import Fab
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink import main as superlink
    from flwr.supernode.fleet_http_connection import http_request_response
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.exc import InvalidRequestError, OperationalError

    from flwr_ha.superlink import busy, flower

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own migrations

PATCHED = [*busy._IN_PARTS, (busy._FLEET, "push_object"), (busy._RUNTIME, "push_object")]


class Node:
    """Flower's SuperLink on a real socket, and the connection that a SuperNode has to it."""

    def __init__(self, database: Path, state: Any, connection: Any) -> None:
        self.database = database
        self.state = state
        self.id, self.receive, self.send, *_, self.push_object, self.confirm = connection
        fab = b"app" * 100
        fab_hash = state.store_fab(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))
        self.run_id = int(
            state.create_run("me/app", "1.0.0", fab_hash, {}, "@none/default", None, "aid", "flwr-serverapp")
        )
        self.task_id = int(state.get_run_info(run_ids=[self.run_id])[0].primary_task_id)
        assert state.claim_task(self.task_id)
        assert state.activate_task(self.task_id)

    def ask(self) -> Message:
        """Have a message wait for the node."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 1, self.task_id
        message = Message(_content(1.0), self.id, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run_id)
        stored, missing = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for name, part in get_all_nested_objects(message).items():
            if name in missing:
                assert self.state.store_object(self.run_id, session, name, part.deflate())
        return message

    def answer_to(self, message: Message) -> tuple[Message, dict[str, bytes]]:
        """Return a reply as a SuperNode sends it, and its parts by name."""
        reply = Message(_content(2.0), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply, {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}

    def reply(self, message: Message) -> Message:
        """Send a reply with all its parts."""
        reply, parts = self.answer_to(message)
        names, session = self.send(reply, get_object_tree(reply), 0.1)
        for name in names:
            self.push_object(self.run_id, session, name, parts[name])
        return reply

    @contextmanager
    def locked(self) -> Iterator[threading.Event]:
        """Hold the database until the SuperLink has refused a request; the event says that it has."""
        refused = threading.Event()
        with closing(sqlite3.connect(self.database, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")

            def note(context: Any) -> None:
                if "locked" in str(context.original_exception):
                    other.execute("ROLLBACK") if not refused.is_set() else None
                    refused.set()

            event.listen(Engine, "handle_error", note)
            try:
                yield refused
            finally:
                event.remove(Engine, "handle_error", note)


def _content(value: float) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord([np.full(1000, value, dtype=np.float32)])})


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Start the SuperLink with the gate's changes of Flower, and connect a SuperNode."""
    for module, name in PATCHED:
        handlers = importlib.import_module(module)
        monkeypatch.setattr(handlers, name, getattr(handlers, name))
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(superlink, "http_error_translator", superlink.http_error_translator)
    monkeypatch.setattr(busy, "BUSY_TIMEOUT_MS", 50)
    monkeypatch.setattr(sys, "argv", sys.argv)
    busy.make_patient()
    database = tmp_path / "state.db"
    app = superlink.create_app(flower._config(database, 1, False), flower._lifespan_class())
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), timeout_s=30.0, what="the SuperLink")
        port = server.servers[0].sockets[0].getsockname()[1]
        with http_request_response(f"127.0.0.1:{port}", insecure=True) as connection:
            yield Node(database, app.state.linkstate_factory.state(), connection)
    finally:
        server.should_exit = True
        thread.join()
        with suppress(InvalidRequestError):
            event.remove(Engine, "handle_error", busy._note)


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


def test_requests_wait_for_their_turn_to_write(node: Node) -> None:
    """Messages of a big model keep the database locked for longer than the 5 s after which Flower gives up."""
    assert node.state.query("PRAGMA busy_timeout") == [{"timeout": busy.BUSY_TIMEOUT_MS}]
    assert node.state.query("PRAGMA journal_mode") == [{"journal_mode": "wal"}]


def test_message_reaches_a_supernode_that_a_lock_refuses(node: Node) -> None:
    """The request is refused with "try again", which a SuperNode does by itself."""
    message = node.ask()

    with node.locked() as refused:
        received = node.receive()

    assert refused.is_set()
    assert received is not None
    assert received[0].metadata.message_id == message.metadata.message_id


def test_reply_is_kept_when_a_lock_refuses_it(node: Node) -> None:
    """A SuperNode gives its reply up at any answer but "try again", and the round would wait for its deadline."""
    node.ask()
    received = node.receive()[0]
    reply, parts = node.answer_to(received)

    with node.locked() as refused:
        names, session = node.send(reply, get_object_tree(reply), 0.1)
    assert refused.is_set()
    assert names == set(parts)
    for name in names:
        with node.locked() as refused:
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
