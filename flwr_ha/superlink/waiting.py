"""What those share who hold an answer back until something has been pushed."""

from __future__ import annotations

from collections.abc import Callable

from flwr_ha.superlink.asgi import App, News, Receive, Scope, Send


class Waiting:
    """Let questions wait for pushes.

    Parameters
    ----------
    app : callable
        Flower's ASGI app.
    is_open : callable
        Whether the replica leads: where it does not, nobody is held.
    hold_s : float
        Longest time that an answer is held back, in seconds.
    """

    def __init__(self, app: App, *, is_open: Callable[[], bool], hold_s: float) -> None:
        self._app = app
        self._is_open = is_open
        self._hold_s = hold_s
        self._news = News()

    async def push(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Flower take in what is pushed, then wake those who wait; also where it failed, nobody knows how far."""
        try:
            await self._app(scope, receive, send)
        finally:
            self._news.tell()
