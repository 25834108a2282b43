"""What the parts of the gate do with requests and answers of Flower's ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class News:
    """Let many wait for what happens next; lives in the event loop's thread."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    def coming(self) -> asyncio.Future[None]:
        """Return what is done at the next `tell`."""
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        return self._future

    def tell(self) -> None:
        """Wake all that wait."""
        future, self._future = self._future, None
        if future is not None:
            future.set_result(None)


async def body_of(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    return bytes((await in_one_piece(receive)()).get("body", b""))


async def answer_of(app: App, scope: Scope, receive: Receive) -> list[Message]:
    """Return the app's answer to a request instead of sending it."""
    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    await app(scope, receive, send)
    return answer


def status_of(answer: list[Message]) -> int:
    """Return the status of an answer; 500 where it has none."""
    return next((message["status"] for message in answer if message["type"] == "http.response.start"), 500)


def content_of(answer: list[Message]) -> bytes:
    """Return the body of an answer."""
    return b"".join(message.get("body", b"") for message in answer)


def is_empty(answer: list[Message]) -> bool:
    """Whether Flower says that there is nothing: a success without a body."""
    return status_of(answer) == 200 and not content_of(answer)


async def send_all(send: Send, answer: list[Message]) -> None:
    """Send an answer."""
    for message in answer:
        await send(message)


async def ask(app: App, scope: Scope, body: bytes) -> list[Message]:
    """Return the app's answer to a request with this body."""
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return await answer_of(app, dict(scope), receive)


def in_one_piece(receive: Receive) -> Receive:
    """Give the body of a request as one message, as Flower wants it in the end.

    It comes in pieces of a TCP segment or so, and each of them would go through seven layers of Flower's app.
    """
    is_read = False

    async def whole() -> Message:
        nonlocal is_read
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if is_read or message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                is_read = True
                return {**message, "body": b"".join(pieces), "more_body": False}

    return whole


def restated(send: Send, status: int, instead: int) -> Send:
    """Put one status in the place of another that the client would take too hard."""

    async def forward(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == status:
            message = {**message, "status": instead}
        await send(message)

    return forward


def unless_forbidden(send: Send) -> Send:
    """Put an empty answer in the place of 403."""
    is_forbidden = False

    async def forward(message: Message) -> None:
        nonlocal is_forbidden
        if message["type"] == "http.response.start" and message["status"] == 403:
            is_forbidden = True
            await send_empty(send)
        elif not is_forbidden:
            await send(message)

    return forward


async def send_empty(send: Send) -> None:
    """Send a protobuf message in which nothing is set."""
    headers = [(b"content-type", b"application/x-protobuf"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
