"""What the tests of the SuperLink's coroutines share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def settled() -> None:
    """Let all that can run without the outside world run."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in an event loop, for 5 s at most."""

    async def limited() -> None:
        await asyncio.wait_for(test(), 5.0)

    asyncio.run(limited())
