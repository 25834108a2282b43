"""Idle SuperNodes wait for work at the SuperLink instead of asking every three seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.superlink.routers.fleet.router import router

from flwr_ha.superlink import parking
from flwr_ha.superlink.parking import ASKS_FOR_REPLIES, PULL, Parking, node_of
from tests.unit.eventloop import run, settled

PUSH = "/v1/runtime/push-messages"


class Flower:
    """Flower's app with one queue of messages for each node."""

    def __init__(self) -> None:
        self.queues: dict[bytes, list[bytes]] = {}
        self.asked = 0
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.asked += 1
        queue = self.queues.get(body, [])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": queue.pop(0) if queue else b""})


class SuperNode:
    """One SuperNode; `ask` is its request for work."""

    def __init__(self, parked: Parking, node_id: int) -> None:
        self.parked = parked
        self.node = Node(node_id=node_id)
        self.body = PullMessagesRequest(node=self.node).SerializeToString()
        self.has_hung_up = asyncio.Event()

    async def ask(self) -> bytes | None:
        sent: list[Any] = []
        events = [{"type": "http.request", "body": self.body, "more_body": False}]

        async def receive() -> Any:
            if events:
                return events.pop()
            await self.has_hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.parked.pull({"type": "http", "path": PULL}, receive, send)
        return b"".join(message.get("body", b"") for message in sent[1:]) if sent else None

    async def tell(self, path: str, request: Any, *, status: int = 200) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": request.SerializeToString(), "more_body": False}

        async def send(message: Any) -> None:
            assert message["status"] == status

        note, answer = self.parked.watch(path, receive, send)
        await note()
        await answer({"type": "http.response.start", "status": status})


async def _never(*_: Any) -> Any:
    raise AssertionError("nothing is to be read or sent")


def test_idle_supernode_gets_its_message_as_soon_as_it_is_pushed() -> None:
    """All who wait are answered once the ServerApp asks for replies: by then it has pushed every object."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True)
        nodes = [SuperNode(parked, number) for number in (1, 2)]
        answers = [asyncio.ensure_future(node.ask()) for node in nodes]
        await settled()
        assert not any(answer.done() for answer in answers)
        app.queues = {node.body: [b"train"] for node in nodes}
        parked.watch(PUSH, _never, _never)
        await settled()
        assert not any(answer.done() for answer in answers), "its objects may not be there yet"
        parked.watch(ASKS_FOR_REPLIES, _never, _never)
        assert await asyncio.gather(*answers) == [b"train", b"train"]

    run(test)


def test_message_that_is_there_is_not_held() -> None:
    """Who finds work gets it at once."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True)
        node = SuperNode(parked, 1)
        app.queues = {node.body: [b"train"]}
        assert await node.ask() == b"train"
        assert app.asked == 1

    run(test)


def test_serverapp_that_does_not_ask_for_replies_is_heard_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after its last push those who wait look again."""
    monkeypatch.setattr(parking, "_QUIET_S", 0.02)

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True)
        node = SuperNode(parked, 1)
        answer = asyncio.ensure_future(node.ask())
        await settled()
        app.queues = {node.body: [b"train"]}
        parked.watch(PUSH, _never, _never)
        parked.watch("/v1/runtime/push-object", _never, _never)
        assert await answer == b"train"

    run(test)


def test_polls_of_serverapps_wake_nobody() -> None:
    """A ServerApp asks for replies many times a second; only after a push is there news."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True, hold_s=0.1)
        answer = asyncio.ensure_future(SuperNode(parked, 1).ask())
        await settled()
        for _ in range(5):
            parked.watch(ASKS_FOR_REPLIES, _never, _never)
            await settled()
        assert app.asked == 1
        assert await answer == b""

    run(test)


@pytest.mark.parametrize(("is_open", "status"), [(False, 200), (True, 500)], ids=["not leading", "an error"])
def test_other_answers_are_passed_on_at_once(is_open: bool, status: int) -> None:
    """Only "there is nothing" of a leader is held back."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: is_open)
        app.status = status
        assert await SuperNode(parked, 1).ask() == b""

    run(test)


def test_message_is_not_given_to_a_connection_that_is_gone() -> None:
    """It would count as delivered, and the round would wait for a reply that never comes."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True)
        node = SuperNode(parked, 1)
        answer = asyncio.ensure_future(node.ask())
        await settled()
        app.queues = {node.body: [b"train"]}
        node.has_hung_up.set()
        assert await answer is None
        assert app.queues == {node.body: [b"train"]}

    run(test)


def test_message_that_did_not_arrive_is_given_once_more() -> None:
    """A connection may be dead without anybody knowing: who asks for work again never got the message."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True, hold_s=0.01)
        node = SuperNode(parked, 1)
        app.queues = {node.body: [b"train"]}
        assert [await node.ask(), await node.ask(), await node.ask()] == [b"train", b"train", b""]

    run(test)


def test_message_is_given_to_nobody_whom_flower_does_not_know() -> None:
    """Node ids are no secret; who asks in the name of another node gets nothing, and takes nothing from it."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True, hold_s=0.01)
        node, forger = SuperNode(parked, 1), SuperNode(parked, 1)
        app.queues = {node.body: [b"train"]}
        assert await node.ask() == b"train"
        app.status = 401
        assert await forger.ask() == b""
        path, request_of = REQUESTS[0]
        await forger.tell(path, request_of(node.node), status=401)
        app.status = 200
        assert await node.ask() == b"train"

    run(test)


def test_message_that_did_not_arrive_comes_before_a_newer_one() -> None:
    """None of the two is lost, and the newer one is kept until it has arrived, too."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True, hold_s=0.01)
        node = SuperNode(parked, 1)
        path, request_of = REQUESTS[0]
        app.queues = {node.body: [b"train"]}
        assert await node.ask() == b"train"
        app.queues = {node.body: [b"evaluate"]}
        assert await node.ask() == b"train"
        await node.tell(path, request_of(node.node))  # about the first one
        assert [await node.ask(), await node.ask()] == [b"evaluate", b"evaluate"]
        assert await node.ask() == b""

    run(test)


REQUESTS = [
    ("/v1/fleet/pull-object", lambda node: PullObjectRequest(node=node, run_id=7, object_id="ab")),
    ("/v1/fleet/confirm-message-received", lambda node: ConfirmMessageReceivedRequest(node=node, run_id=7)),
    ("/v1/fleet/get-run", lambda node: GetRunRequest(node=node, run_id=7)),
]


@pytest.mark.parametrize(("path", "request_of"), REQUESTS, ids=[path.rpartition("/")[2] for path, _ in REQUESTS])
def test_message_that_arrived_is_not_given_again(path: str, request_of: Callable[[Node], Any]) -> None:
    """A SuperNode that works on a message shows it by its next request; that of another node says nothing."""

    async def test() -> None:
        parked = Parking(app := Flower(), is_open=lambda: True, hold_s=0.01)
        one, two = SuperNode(parked, 1), SuperNode(parked, 2**63 + 5)
        app.queues = {one.body: [b"train"], two.body: [b"train"]}
        assert [await one.ask(), await two.ask()] == [b"train", b"train"]
        await two.tell(path, request_of(two.node))
        assert [await one.ask(), await two.ask()] == [b"train", b""]

    run(test)


def test_flower_asks_and_answers_as_we_think() -> None:
    """The paths exist, "nothing" is an empty message, and the node is the first field of each request."""
    paths = {route.path for route in router.routes}
    assert {PULL} | parking.TAKES_IN <= paths
    assert PullMessagesResponse().SerializeToString() == b""
    node = Node(node_id=2**63 + 5)
    wanted = node_of(PullMessagesRequest(node=node).SerializeToString())
    assert wanted.endswith(node.SerializeToString())
    assert {node_of(make(node).SerializeToString()) for _, make in REQUESTS} == {wanted}
