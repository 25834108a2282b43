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

from flwr_ha.superlink.asgi import App, Message, News, Receive, Scope, Send, ask, body_of, is_empty, send_all

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
    shows that it has it, and is given once more to one that asks for work instead.
    """

    def __init__(self, app: App, *, is_open: Callable[[], bool], hold_s: float = _HOLD_S) -> None:
        self._app = app
        self._is_open = is_open
        self._hold_s = hold_s
        self._news = News()
        self._timer: asyncio.TimerHandle | None = None
        self._has_met = False
        self._unconfirmed: dict[bytes, tuple[float, list[Message]]] = {}

    async def pull(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a SuperNode that asks for work."""
        if not self._has_met:
            self._has_met = True
            logger.info("the first SuperNode asks for work")
        body = await body_of(receive)
        answer = self._kept(node := node_of(body))
        if answer is None:
            answer = await self._wait(scope, body, receive)
            if _has_work(answer):
                self._unconfirmed[node] = (time.monotonic(), answer)
        await send_all(send, answer)

    def watch(self, path: str, receive: Receive) -> Receive:
        """Take note of what a request says about news and about messages that have arrived."""
        if path == ASKS_FOR_REPLIES:
            if self._timer is not None:
                self._wake()
        elif path in PUSHES:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(_QUIET_S, self._wake)
        elif path in TAKES_IN and self._unconfirmed:
            return self._confirming(receive)
        return receive

    async def _wait(self, scope: Scope, body: bytes, receive: Receive) -> list[Message]:
        """Return Flower's answer; an empty list where the SuperNode has hung up."""
        give_up_s = time.monotonic() + self._hold_s
        hung_up = asyncio.ensure_future(_until_hung_up(receive))
        try:
            while True:
                news = self._news.coming()  # before the question: what comes meanwhile counts
                answer = await ask(self._app, scope, body)
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

    def _kept(self, node: bytes) -> list[Message] | None:
        sent_s, answer = self._unconfirmed.pop(node, (float("-inf"), []))
        return answer if time.monotonic() - sent_s < _REPEATED_WITHIN_S else None

    def _confirming(self, receive: Receive) -> Receive:
        async def forward() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._unconfirmed.pop(node_of(message.get("body", b"")), None)
            return message

        return forward


def node_of(body: bytes) -> bytes:
    """Return the first field of a protobuf message: in all requests of a SuperNode it names the node."""
    if len(body) < 2 or body[0] != 0x0A or body[1] >= 0x80:
        return b""
    return body[: 2 + body[1]]


def _has_work(answer: list[Message]) -> bool:
    return any(message.get("status") == 200 for message in answer) and not is_empty(answer)


async def _until_hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
