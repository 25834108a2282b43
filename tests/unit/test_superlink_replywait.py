"""A ServerApp that asks for replies is answered when one comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flwr_ha.superlink.gate import PUSH_REPLY
from flwr_ha.superlink.parking import ASKS_FOR_REPLIES
from flwr_ha.superlink.replywait import ReplyWait
from tests.unit.eventloop import run, settled

REPLY = b"a reply"


class Flower:
    """Flower's app: a push brings a reply, the next question takes it."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.questions: list[bytes] = []
        self.is_broken = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == PUSH_REPLY:
            if self.is_broken:
                raise RuntimeError("the database is locked")
            self.replies.append(body)
            return
        self.questions.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.replies.pop() if self.replies else b""})


async def _ask(waiting: ReplyWait, token: bytes = b"one") -> bytes:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": ASKS_FOR_REPLIES, "headers": [(b"flwr-task-token", token)]}
    await waiting.pull(scope, _body(b"ids"), send)
    return b"".join(message.get("body", b"") for message in sent)


async def _push(waiting: ReplyWait, reply: bytes = REPLY) -> None:
    async def send(_: Any) -> None:
        raise AssertionError("the app has answered nothing")

    await waiting.push({"type": "http", "path": PUSH_REPLY, "headers": []}, _body(reply), send)


def _body(body: bytes) -> Callable[[], Awaitable[Any]]:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def test_question_is_answered_when_a_reply_comes() -> None:
    """It is put to Flower twice, unchanged, and no more often."""

    async def test() -> None:
        waiting = ReplyWait(app := Flower(), is_open=lambda: True, hold_s=60.0)
        question = asyncio.create_task(_ask(waiting))
        await settled()
        assert (app.questions, question.done()) == ([b"ids"], False)
        await _push(waiting)
        assert await question == REPLY
        assert app.questions == [b"ids", b"ids"]

    run(test)


def test_reply_that_comes_during_the_question_is_not_missed() -> None:
    """Flower has looked, then the reply comes, then it says that there is none."""

    async def test() -> None:
        flower = Flower()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            is_first = scope["path"] != PUSH_REPLY and not flower.questions
            await flower(scope, receive, send)
            if is_first:
                await _push(waiting)

        waiting = ReplyWait(slow, is_open=lambda: True, hold_s=60.0)
        assert await _ask(waiting) == REPLY

    run(test)


def test_reply_for_somebody_else_ends_the_wait() -> None:
    """Many SuperNodes that answer others do not make it ask again and again: the ServerApp has its own pauses."""

    async def test() -> None:
        waiting = ReplyWait(app := Flower(), is_open=lambda: True, hold_s=60.0)
        question = asyncio.create_task(_ask(waiting))
        await settled()
        await _push(waiting, b"")
        assert await question == b""
        assert len(app.questions) == 2

    run(test)


@pytest.mark.parametrize(("is_open", "hold_s"), [(True, 0.02), (False, 60.0)])
def test_nobody_waits_for_ever(*, is_open: bool, hold_s: float) -> None:
    """A ServerApp has deadlines to watch; a replica that does not lead holds nobody at all."""

    async def test() -> None:
        waiting = ReplyWait(app := Flower(), is_open=lambda: is_open, hold_s=hold_s)
        assert await _ask(waiting) == b""
        assert len(app.questions) == 1

    run(test)


def test_one_group_after_the_other_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ServerApp that pulls large replies in groups waits once for all of them, another one is held as ever."""
    monkeypatch.setattr("flwr_ha.superlink.replywait._PAUSE_S", 60.0)

    async def test() -> None:
        waiting = ReplyWait(Flower(), is_open=lambda: True, hold_s=0.02)
        assert await _ask(waiting) == b""
        waiting._hold_s = 60.0
        assert await _ask(waiting) == b""
        other = asyncio.create_task(_ask(waiting, b"two"))
        await settled()
        assert not other.done()
        await _push(waiting)
        assert await other == REPLY

    run(test)


def test_push_that_fails_wakes_too() -> None:
    """Nobody knows how far Flower came."""

    async def test() -> None:
        waiting = ReplyWait(app := Flower(), is_open=lambda: True, hold_s=60.0)
        question = asyncio.create_task(_ask(waiting))
        await settled()
        app.is_broken = True
        with pytest.raises(RuntimeError):
            await _push(waiting)
        assert await question == b""

    run(test)
