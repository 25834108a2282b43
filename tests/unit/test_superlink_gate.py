"""The gate in front of Flower's app: who is served, and when an answer may go out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.proto.message_pb2 import PullObjectResponse

from flwr_ha.superlink import gate, objectwait, taskwait
from flwr_ha.superlink.asgi import App, Receive, Scope, Send
from flwr_ha.superlink.gate import Gate, Replication
from flwr_ha.superlink.lease import Lease
from tests.unit.eventloop import run, settled

PRIVATE, PUBLIC = 40000, 8000


class Agent:
    """The agent and the database as the gate sees them."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.asked: list[int] = []
        self.database_version = 0
        self.replication = Replication(self.asked.append, lambda: self.database_version, timeout_s)

    def answer(self, *, is_replicated: bool) -> None:
        self.replication.answer(self.asked[-1], is_replicated=is_replicated)


class Flower:
    """Flower's app: each request is counted and changes the database."""

    def __init__(self, agent: Agent, status: int = 200) -> None:
        self.agent = agent
        self.status = status
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.agent.database_version += 1
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"the answer", "more_body": False})


@pytest.fixture
def lease() -> Iterator[Lease]:
    """Give a lease that has not been granted."""
    lease = Lease.create()
    yield lease
    lease.close()


async def _request(served: Gate, path: str, port: int = PUBLIC) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await served({"type": "http", "path": path, "server": ("127.0.0.1", port)}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def _gate(app: App, lease: Lease, agent: Agent) -> Gate:
    return Gate(app, lease=lease, private_port=PRIVATE, replication=agent.replication)


def test_public_is_served_only_under_a_lease(lease: Lease) -> None:
    """Without a lease a request on the public port is refused before Flower sees it; the loopback is served."""

    async def test() -> None:
        app = Flower(agent := Agent())
        served = _gate(app, lease, agent)
        assert (await _request(served, "/v1/control/list-runs"))[0] == 503
        assert app.calls == 0
        assert (await _request(served, "/v1/control/list-runs", PRIVATE))[0] == 200
        lease.deadline_s = time.monotonic() + 60.0
        assert await _request(served, "/v1/control/list-runs") == (200, b"the answer")

    run(test)


def test_supernode_that_takes_an_old_message_in_stays_in_step(lease: Lease) -> None:
    """Forbidden would make it train, and be one reply late from then on; it cleans up, or sends its reply in vain."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        forbidding = _gate(Flower(agent := Agent(), 403), lease, agent)
        assert await _request(forbidding, gate.PULL_OBJECT) == (410, b"the answer")
        assert await _request(forbidding, gate.CONFIRM) == (200, b"")
        assert (await _request(forbidding, "/v1/fleet/push-messages"))[0] == 403
        for path in (gate.PULL_OBJECT, gate.CONFIRM):
            assert await _request(_gate(Flower(agent), lease, agent), path) == (200, b"the answer")
            assert (await _request(_gate(Flower(agent, 401), lease, agent), path))[0] == 401

    run(test)


@pytest.mark.parametrize("path", sorted(gate.HELD))
def test_changing_request_waits_for_the_agent(lease: Lease, path: str) -> None:
    """The answer goes out once the agent has made the change safe, and not before."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        app = Flower(agent := Agent())
        request = asyncio.create_task(_request(_gate(app, lease, agent), path))
        await settled()
        assert (app.calls, agent.asked, request.done()) == (1, [1], False)
        agent.answer(is_replicated=True)
        assert await request == (200, b"the answer")

    run(test)


def test_change_that_is_not_replicated_is_not_acknowledged(lease: Lease) -> None:
    """The agent says no: the client is told to try again, Flower's answer is dropped."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        request = asyncio.create_task(_request(_gate(Flower(agent := Agent()), lease, agent), "/v1/control/start-run"))
        await settled()
        agent.answer(is_replicated=False)
        status, body = await request
        assert status == 503
        assert b"could not be replicated" in body

    run(test)


@pytest.mark.parametrize(("path", "withdrawn"), [(gate.START_RUN, [b"the answer"]), ("/v1/control/stop-run", [])])
def test_new_run_that_is_not_acknowledged_is_withdrawn(lease: Lease, path: str, withdrawn: list[bytes]) -> None:
    """Its user submits it again and must not have it twice; other changes may be repeated as they are."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        taken_back: list[bytes] = []
        agent = Agent(timeout_s=0.02)
        served = gate.Gate(
            Flower(agent), lease=lease, private_port=PRIVATE, replication=agent.replication, withdraw=taken_back.append
        )
        assert (await _request(served, path))[0] == 503
        assert taken_back == withdrawn

    run(test)


def test_silent_agent_counts_as_no(lease: Lease) -> None:
    """A frozen agent does not keep clients for ever."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        agent = Agent(timeout_s=0.02)
        assert (await _request(_gate(Flower(agent), lease, agent), "/v1/fleet/register-node"))[0] == 503

    run(test)


def test_lease_that_ends_while_waiting_takes_the_answer_back(lease: Lease) -> None:
    """Replicated too late: a replica that no longer leads does not speak to the public."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        request = asyncio.create_task(_request(_gate(Flower(agent := Agent()), lease, agent), "/v1/control/stop-run"))
        await settled()
        lease.deadline_s = 0.0
        agent.answer(is_replicated=True)
        assert (await request)[0] == 503

    run(test)


def test_failed_request_is_answered_at_once(lease: Lease) -> None:
    """An error changes nothing that a client could rely on, so nobody is asked."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        app = Flower(agent := Agent(), status=412)
        assert await _request(_gate(app, lease, agent), "/v1/fleet/register-node") == (412, b"the answer")
        assert agent.asked == []

    run(test)


def test_heartbeats_are_never_held(lease: Lease) -> None:
    """What is frequent and unimportant does not wait for other replicas."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        served = _gate(Flower(agent := Agent()), lease, agent)
        for path in ("/v1/fleet/send-node-heartbeat", "/v1/fleet/push-messages", "/v1/runtime/send-task-heartbeat"):
            assert (await _request(served, path))[0] == 200
        assert agent.asked == []

    run(test)


def test_concurrent_changes_share_the_next_round_trip(lease: Lease) -> None:
    """One request is under way; all that come meanwhile wait for one more, never for the one under way."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        served = _gate(Flower(agent := Agent()), lease, agent)
        first = asyncio.create_task(_request(served, "/v1/fleet/register-node"))
        await settled()
        others = [asyncio.create_task(_request(served, "/v1/fleet/register-node")) for _ in range(5)]
        await settled()
        assert agent.asked == [1]
        agent.answer(is_replicated=True)
        assert (await first)[0] == 200
        await settled()
        assert agent.asked == [1, 2]
        assert not any(other.done() for other in others)
        agent.answer(is_replicated=True)
        assert [status for status, _ in await asyncio.gather(*others)] == [200] * 5
        assert agent.asked == [1, 2]

    run(test)


def test_nothing_is_asked_when_nobody_has_written_since(lease: Lease) -> None:
    """A database that is as it was when it was last made safe needs no round trip; after a no it does."""

    async def test() -> None:
        agent = Agent()
        for answer in (False, True):
            waiting = asyncio.create_task(agent.replication.wait_replicated())
            await settled()
            agent.answer(is_replicated=answer)
            assert await waiting is answer
        assert await agent.replication.wait_replicated()
        assert agent.asked == [1, 2]

    run(test)


def test_client_that_hangs_up_does_not_take_the_round_from_others() -> None:
    """A cancelled request leaves the round trip that it shares alone."""

    async def test() -> None:
        agent = Agent()
        first, second = (asyncio.create_task(agent.replication.wait_replicated()) for _ in range(2))
        await settled()
        first.cancel()
        await settled()
        agent.answer(is_replicated=True)
        assert await second

    run(test)


def test_answer_that_comes_too_late_is_ignored() -> None:
    """The agent may answer a request that has been given up."""

    async def test() -> None:
        agent = Agent(timeout_s=0.01)
        assert not await agent.replication.wait_replicated()
        agent.answer(is_replicated=True)
        assert not await agent.replication.wait_replicated()

    run(test)


def test_superexec_gets_no_work_without_a_lease(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby's SuperExec is kept waiting, then told that there is nothing; under a lease it is served."""

    async def test() -> None:
        app = Flower(agent := Agent())
        served = _gate(app, lease, agent)
        monkeypatch.setattr(taskwait, "_STANDBY_ANSWER_S", 0.03)
        assert await _request(served, gate.ACQUIRE_TASK, PRIVATE) == (200, b"")
        assert app.calls == 0
        monkeypatch.setattr(taskwait, "_STANDBY_ANSWER_S", 60.0)
        request = asyncio.create_task(_request(served, gate.ACQUIRE_TASK, PRIVATE))
        await settled()
        assert not request.done()
        lease.deadline_s = time.monotonic() + 60.0
        assert await request == (200, b"the answer")

    run(test)


def test_superexec_waits_for_a_task(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower is asked when there is one, and now and then for what it has to look after."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        tasks: list[str] = []
        app = Flower(agent := Agent())
        served = Gate(
            app, lease=lease, private_port=PRIVATE, replication=agent.replication, has_task=lambda: bool(tasks)
        )
        monkeypatch.setattr(taskwait, "_LEADER_ASKS_S", 60.0)
        request = asyncio.create_task(_request(served, gate.ACQUIRE_TASK, PRIVATE))
        await asyncio.sleep(0.05)
        assert app.calls == 0
        tasks.append("a task")
        assert await request == (200, b"the answer")
        tasks.clear()
        monkeypatch.setattr(taskwait, "_LEADER_ASKS_S", 0.03)
        assert await _request(served, gate.ACQUIRE_TASK, PRIVATE) == (200, b"the answer")

    run(test)


@pytest.mark.parametrize("pieces", [[b""], [b"abc"], [b"a", b"", b"bc"], [b"abc", b""]])
@pytest.mark.parametrize("is_whole", [True, False])
def test_body_reaches_flower_in_one_piece(lease: Lease, pieces: list[bytes], is_whole: bool) -> None:
    """One that ends in the middle is no body; what comes after it is passed on."""
    seen: list[Any] = []
    rest = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if is_whole:
        rest[-1]["more_body"] = False

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    async def receive() -> Any:
        return rest.pop(0) if rest else {"type": "http.disconnect"}

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        served = _gate(app, lease, Agent())
        await served({"type": "http", "path": "/v1/fleet/push-object", "server": ("", PUBLIC)}, receive, _ignore)

    run(test)
    end = {"type": "http.disconnect"}
    body = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
    assert seen == ([body, end] if is_whole else [end, end])


async def _ignore(_: Any) -> None:
    """Take an answer."""


MISSING, THERE = b"\x08\x01", b"\x08\x01\x10\x01\x1a\x01x"


class Objects:
    """Flower's app with one object, that comes with a push."""

    def __init__(self) -> None:
        self.is_there = False
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.asked += 1
        if scope["path"] in gate.PUSH_OBJECT:
            self.is_there = True
        body = THERE if self.is_there else MISSING
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("pull", [gate.PULL_OBJECT, gate.PULL_OBJECT_OF_REPLY])
@pytest.mark.parametrize("push", sorted(gate.PUSH_OBJECT))
def test_object_on_its_way_is_waited_for(lease: Lease, pull: str, push: str) -> None:
    """Flower's clients would ask again after a second or more."""

    async def test() -> None:
        lease.deadline_s = time.monotonic() + 60.0
        app = Objects()
        served = _gate(app, lease, Agent())
        request = asyncio.create_task(_request(served, pull))
        await settled()
        assert (app.asked, request.done()) == (1, False)
        await _request(served, push)
        assert await request == (200, THERE)

    run(test)


def test_object_that_does_not_come_is_not_waited_for_for_ever(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's clients decide when to give up; nobody is held where the replica does not lead."""

    async def test() -> None:
        monkeypatch.setattr(objectwait.ObjectWait.__init__, "__kwdefaults__", {"hold_s": 0.02})
        app = Objects()
        assert await _request(_gate(app, lease, Agent()), gate.PULL_OBJECT_OF_REPLY, PRIVATE) == (200, MISSING)
        assert app.asked == 1
        lease.deadline_s = time.monotonic() + 60.0
        assert await _request(_gate(app, lease, Agent()), gate.PULL_OBJECT) == (200, MISSING)
        assert app.asked == 3

    run(test)


def test_flower_says_that_an_object_is_missing_as_we_think() -> None:
    """The bytes of its answer are what is compared."""
    assert PullObjectResponse(object_found=True).SerializeToString() == MISSING
    there = PullObjectResponse(object_found=True, object_available=True, object_content=b"x")
    assert there.SerializeToString() == THERE
    assert PullObjectResponse(object_found=False).SerializeToString() != MISSING
