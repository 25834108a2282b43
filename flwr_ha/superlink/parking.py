"""Let a SuperNode that asks for work wait for its answer until there is work.

Flower's SuperNodes ask, are told that there is nothing, and sleep for 3 s; so each phase of a round
began up to 3 s late on each node. Here the answer "nothing" is held back, and the question is put to
Flower again as soon as a ServerApp has pushed messages. The SuperNode notices a slow answer, no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flwr_ha.superlink.asgi import App, Message, News, Receive, Scope, Send, ask, body_of, is_empty, send_all, status_of

logger = logging.getLogger(__name__)

PULL = "/v1/fleet/pull-messages"
TAKES_IN = frozenset(f"/v1/fleet/{name}" for name in ("get-run", "get-fab", "pull-object", "confirm-message-received"))
PUSHES = frozenset(["/v1/runtime/push-messages", "/v1/runtime/push-object"])
ASKS_FOR_REPLIES = "/v1/runtime/pull-messages"

_HOLD_S = 15.0  # half of the time after which a SuperNode gives a request up
_QUIET_S = 0.5  # after the last push of a ServerApp that does not ask for replies at once
_REPEATED_WITHIN_S = 120.0


class Parking:
    """Hold the requests of idle SuperNodes.

    Parameters
    ----------
    app : callable
        Flower's ASGI app.
    is_open : callable
        Whether the replica leads: where it does not, nobody is held.
    hold_s : float
        Longest time that an answer is held back, in seconds.

    Notes
    -----
    A message counts as delivered once Flower has answered with it. The connection of a SuperNode that
    has waited may be dead without anybody knowing, so the last message is kept until the SuperNode
    shows that it has it, and is given once more to one that asks for work instead. Who a request comes
    from is known only from Flower's answer: it checks the signatures.
    """

    def __init__(self, app: App, *, is_open: Callable[[], bool], hold_s: float = _HOLD_S) -> None:
        self._app = app
        self._is_open = is_open
        self._hold_s = hold_s
        self._news = News()
        self._timer: asyncio.TimerHandle | None = None
        self._has_met = False
        self._unconfirmed: dict[bytes, _Kept] = {}

    async def pull(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a SuperNode that asks for work."""
        if not self._has_met:
            self._has_met = True
            logger.info("the first SuperNode asks for work")
        await send_all(send, await self._wait(scope, await body_of(receive), receive))

    def watch(self, path: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Take note of what a request and its answer say about news and about messages that have arrived."""
        if path == ASKS_FOR_REPLIES:
            if self._timer is not None:
                self._wake()
        elif path in PUSHES:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(_QUIET_S, self._wake)
        elif path in TAKES_IN and self._unconfirmed:
            return self._confirming(receive, send)
        return receive, send

    async def _wait(self, scope: Scope, body: bytes, receive: Receive) -> list[Message]:
        """Return Flower's answer; an empty list where the SuperNode has hung up."""
        give_up_s = time.monotonic() + self._hold_s
        hung_up = asyncio.ensure_future(_until_hung_up(receive))
        try:
            while True:
                news = self._news.coming()  # before the question: what comes meanwhile counts
                answer = self._next(node_of(body), await ask(self._app, scope, body))
                rest_s = give_up_s - time.monotonic()
                if not is_empty(answer) or rest_s <= 0 or not self._is_open():
                    return answer
                await asyncio.wait([news, hung_up], timeout=rest_s, return_when=asyncio.FIRST_COMPLETED)
                if hung_up.done():
                    return []  # do not ask: a message would count as delivered
                if not news.done():
                    return answer
        finally:
            hung_up.cancel()

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._news.tell()

    def _next(self, node: bytes, answer: list[Message]) -> list[Message]:
        """Return what a node gets now: the message that it has not confirmed comes before Flower's answer."""
        if status_of(answer) != 200:
            return answer
        kept, now_s = self._unconfirmed.pop(node, None), time.monotonic()
        if kept is not None and kept.given_s is not None and now_s - kept.given_s >= _REPEATED_WITHIN_S:
            kept = None
        if not is_empty(answer):
            self._unconfirmed[node] = _Kept(answer, given_s=now_s if kept is None else None)
        elif kept is not None and kept.given_s is None:
            self._unconfirmed[node] = replace(kept, given_s=now_s)
        return answer if kept is None else kept.answer

    def _confirming(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        node = b""

        async def note_node() -> Message:
            nonlocal node
            message = await receive()
            if message["type"] == "http.request":
                node = node_of(message.get("body", b""))
            return message

        async def note_answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 500 and message["status"] != 401:
                kept = self._unconfirmed.get(node)
                if kept is not None and kept.given_s is not None:
                    del self._unconfirmed[node]
            await send(message)

        return note_node, note_answer


@dataclass(frozen=True, slots=True)
class _Kept:
    """Hold Flower's answer to a node that has not shown yet that it has it; `given_s` is None before it was sent."""

    answer: list[Message]
    given_s: float | None


def node_of(body: bytes) -> bytes:
    """Return the first field of a protobuf message: in all requests of a SuperNode it names the node."""
    if len(body) < 2 or body[0] != 0x0A or body[1] >= 0x80:
        return b""
    return body[: 2 + body[1]]


async def _until_hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
