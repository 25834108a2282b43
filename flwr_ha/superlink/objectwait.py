"""Let those who take a message in wait for parts of it that are still on their way.

Flower hands a message out as soon as it knows of it. Whoever asks for a part that its sender has not sent yet is told
so, and waits for 1 s, 2 s, 4 s … before it asks again. Here the answer is held back until the part is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from flwr_ha.superlink.asgi import App, Receive, Scope, Send, ask, body_of, content_of, send_all
from flwr_ha.superlink.waiting import Waiting

_HOLD_S = 5.0  # then Flower's clients see to it that they do not wait for ever
_MISSING = b"\x08\x01"  # PullObjectResponse(object_found=True, object_available=False)


class ObjectWait(Waiting):
    """Hold requests for objects that are announced, but not there; parameters as in `Waiting`."""

    def __init__(self, app: App, *, is_open: Callable[[], bool], hold_s: float = _HOLD_S) -> None:
        super().__init__(app, is_open=is_open, hold_s=hold_s)

    async def pull(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the object, or with what Flower says in its place."""
        body = await body_of(receive)
        give_up_s = time.monotonic() + self._hold_s
        while True:
            news = self._news.coming()  # before the question: what comes meanwhile counts
            answer = await ask(self._app, scope, body)
            rest_s = give_up_s - time.monotonic()
            if content_of(answer) != _MISSING or rest_s <= 0 or not self._is_open():
                break
            await asyncio.wait([news], timeout=rest_s)
        await send_all(send, answer)
