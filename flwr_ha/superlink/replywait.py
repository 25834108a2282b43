"""Let a ServerApp that asks for replies wait for its answer until a SuperNode has sent one.

`HighlyAvailable` asks several times a second, so that a round goes on as soon as its last reply is there; each
question costs a web server and a database some 10 ms, whether there is a reply or not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from flwr.supercore.constant import TASK_TOKEN_HEADER

from flwr_ha.superlink.asgi import App, Receive, Scope, Send, ask, body_of, is_empty, send_all
from flwr_ha.superlink.waiting import Waiting

_HOLD_S = 0.5  # a ServerApp also has deadlines to watch, and nodes that went
_TOKEN = TASK_TOKEN_HEADER.lower().encode()
_PAUSE_S = 0.05  # who asks sooner after an answer asks for one group of replies after the other


class ReplyWait(Waiting):
    """Hold requests for replies while there are none; parameters as in `Waiting`."""

    def __init__(self, app: App, *, is_open: Callable[[], bool], hold_s: float = _HOLD_S) -> None:
        super().__init__(app, is_open=is_open, hold_s=hold_s)
        self._answered_s: dict[bytes, float] = {}  # ServerApps' tokens, and when they had an answer

    async def pull(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask Flower; where it has nothing, ask once more when a reply has come, whoever it is for."""
        token = dict(scope["headers"]).get(_TOKEN, b"")
        body = await body_of(receive)
        news = self._news.coming()  # before the question: what comes meanwhile counts
        answer = await ask(self._app, scope, body)
        if is_empty(answer) and self._has_paused(token) and self._is_open():
            await asyncio.wait([news], timeout=self._hold_s)
            if news.done():
                answer = await ask(self._app, scope, body)
        self._answered_s[token] = time.monotonic()
        await send_all(send, answer)

    def _has_paused(self, token: bytes) -> bool:
        before_s = time.monotonic() - _PAUSE_S
        self._answered_s = {each: at_s for each, at_s in self._answered_s.items() if at_s > before_s}
        return token not in self._answered_s
