"""Flower's SuperLink on a real socket, as a replica's child makes it, and a SuperNode's connection to it."""

from __future__ import annotations

import hashlib
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from flwr_ha.local.cluster import SERVERAPP
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
    from sqlalchemy.exc import InvalidRequestError

    from flwr_ha.superlink import busy, flower

PATCHED = [*busy._IN_PARTS, (busy._FLEET, "push_object"), (busy._RUNTIME, "push_object")]


class Node:
    """Flower's SuperLink on a real socket, and the connection that a SuperNode has to it."""

    def __init__(self, database: Path, state: Any, connection: Any) -> None:
        self.database = database
        self.state = state
        self.id, self.receive, self.send, self.get_run, self.get_fab, *others = connection
        self.pull_object, self.push_object, self.confirm = others
        self.run_id = add_run(state, b"app" * 100)
        self.task_id = task_of(state, self.run_id)
        assert state.claim_task(self.task_id)
        assert state.activate_task(self.task_id)

    def ask(self) -> Message:
        """Have a message wait for the node."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 1, self.task_id
        message = Message(content(1.0), self.id, "train")
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
        reply = Message(content(2.0), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply, {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}

    def reply(self, message: Message) -> Message:
        """Send a reply with all its parts."""
        reply, parts = self.answer_to(message)
        names, session = self.send(reply, get_object_tree(reply), 0.1)
        for name in names:
            self.push_object(self.run_id, session, name, parts[name])
        return reply


def add_run(state: Any, app: bytes) -> int:
    """Submit a run of an app, and return its id."""
    fab_hash = state.store_fab(Fab(hashlib.sha256(app).hexdigest(), app, {}))
    return int(state.create_run("me/app", "1.0.0", fab_hash, {}, "@none/default", None, "aid", SERVERAPP))


def task_of(state: Any, run_id: int) -> int:
    """Return the id of the task that is the run's ServerApp."""
    return int(state.get_run_info(run_ids=[run_id])[0].primary_task_id)


def content(value: float) -> RecordDict:
    """Return a model of which each parameter is `value`."""
    return RecordDict({"arrays": ArrayRecord([np.full(1000, value, dtype=np.float32)])})


@contextmanager
def connected_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any] = lambda app: app
) -> Iterator[Node]:
    """Start the SuperLink with our changes of Flower, and connect a SuperNode; `wrap` gets Flower's app."""
    for module, name in PATCHED:
        handlers = importlib.import_module(module)
        monkeypatch.setattr(handlers, name, getattr(handlers, name))
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(superlink, "http_error_translator", superlink.http_error_translator)
    monkeypatch.setattr(busy, "BUSY_TIMEOUT_MS", 50)
    monkeypatch.setattr(sys, "argv", sys.argv)
    busy.make_patient()
    database = folder / "state.db"
    app = superlink.create_app(flower._config(database, 1, False), flower._lifespan_class())
    server = uvicorn.Server(uvicorn.Config(wrap(app), port=0, lifespan="off", log_config=None, ws="none"))
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
