"""A SuperNode that a failover meets while it takes a message in: its replies stay in step with its messages."""

from __future__ import annotations

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.superlink.gate import Gate, Replication
from flwr_ha.superlink.lease import Lease
from flwr_ha.superlink.tasks import requeue_task
from tests.integration.flowerserver import Node, connected_node, content

with warnings.catch_warnings():  # raised by the libraries that Flower imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Message
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import start_client_internal as supernode
    from flwr.supernode.nodestate import NodeStateFactory

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own migrations


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Give a SuperNode's connection to a SuperLink behind the gate of a leader."""
    lease = Lease.create()
    lease.deadline_s = time.monotonic() + 600.0
    replication = Replication(lambda serial: replication.answer(serial, is_replicated=True), time.monotonic_ns, 5.0)

    def gated(app: Any) -> Gate:
        return Gate(app, lease=lease, private_port=1, replication=replication)

    with connected_node(tmp_path, monkeypatch, gated) as node:
        yield node
    lease.close()


class SuperNode:
    """The loop of Flower's SuperNode, step by step; ClientApps are threads that answer at once.

    Parameters
    ----------
    node : Node
        Its connection.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        stores = ObjectStoreFactory()
        self.objects = stores.store()
        self.state = NodeStateFactory(stores).state()
        self.state.set_node_id(node.id)
        self.state.store_run(node.state.get_run_info(run_ids=[node.run_id])[0])
        self.before_confirming: Callable[[], None] = lambda: None
        self.received: list[Message] = []

    def answer(self) -> None:
        """Answer the newest message, as its ClientApp does."""
        reply = Message(content(2.0), reply_to=self.received[-1])
        supernode._insert_message(reply, self.state, self.objects)

    def step(self) -> bool:
        """Take a message in and send the replies that are there; returns whether there was one."""
        taken = supernode._pull_and_store_message(
            state=self.state,
            object_store=self.objects,
            node_config={},
            receive=self._receive,
            get_run=self.node.get_run,
            get_fab=self.node.get_fab,
            pull_object=self.node.pull_object,
            confirm_message_received=self._confirm,
            trusted_entities=None,
        )
        if taken is None:
            return False
        supernode._push_messages(
            state=self.state, object_store=self.objects, send=self.node.send, push_object=self.node.push_object
        )
        return True

    def _receive(self) -> Any:
        found = self.node.receive()
        if found is not None:
            self.received.append(found[0])
        return found

    def _confirm(self, run_id: int, object_id: str) -> None:
        self.before_confirming()
        self.node.confirm(run_id, object_id)


def test_reply_that_was_there_before_its_message_was_confirmed_does_not_delay_the_next(node: Node) -> None:
    """Found by chaos (seed 11): the ClientApp answers from its cache while the leader is frozen.

    The next leader does not know the message. A SuperNode that cleaned up kept the reply, sent it in the place of the
    next one, and had nothing to make it send that.
    """
    client = SuperNode(node)
    node.ask()

    def fail_over() -> None:
        client.answer()
        _end_term(node)

    client.before_confirming = fail_over
    assert client.step()
    assert not client.state.get_messages_legacy(is_reply=True)

    _run_again(node)
    message = node.ask()
    client.before_confirming = lambda: threading.Timer(1.0, client.answer).start()
    assert client.step()
    replies = node.state.get_message_res(message_ids={message.metadata.message_id}, run_id=node.run_id)
    assert [reply.metadata.reply_to_message_id for reply in replies] == [message.metadata.message_id]


def test_message_that_lost_parts_is_given_up(node: Node) -> None:
    """While parts are missing there can be no reply: the SuperNode takes the next message in its place."""
    client = SuperNode(node)
    node.ask()
    pull = node.pull_object

    def fail_over(*arguments: Any) -> bytes:
        _end_term(node)
        node.pull_object = pull
        return bytes(pull(*arguments))

    node.pull_object = fail_over
    assert not client.step()
    assert not client.state.msg_store

    _run_again(node)
    message = node.ask()
    client.before_confirming = client.answer
    assert client.step()
    assert node.state.get_message_res(message_ids={message.metadata.message_id}, run_id=node.run_id)


def _end_term(node: Node) -> None:
    """Make the database that of a new leader: runs without messages, whose ServerApps do not run yet."""
    with closing(sqlite3.connect(node.database)) as connection, connection:
        for table in ("message_ins", "message_res", "object_children", "objects"):
            connection.execute(f"DELETE FROM {table}")
    assert requeue_task(node.database, str(node.task_id))


def _run_again(node: Node) -> None:
    """Start the ServerApp."""
    assert node.state.claim_task(node.task_id)
    assert node.state.activate_task(node.task_id)
