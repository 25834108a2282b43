"""Let SuperExec wait for its answer until there is a task.

SuperExec asks ten times a second, so that a run starts at once; each question costs a web server and a database some
10 ms, whether there is a task or not. Here it gets its answer when there is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from flwr_ha.superlink.asgi import App, Receive, Scope, Send, send_empty
from flwr_ha.superlink.database import connect, data_version
from flwr_ha.superlink.lease import Lease

_LOOK_EVERY_S = 0.02
_STANDBY_ANSWER_S = 10.0  # well below the 30 s after which Flower's clients give a request up
_LEADER_ASKS_S = 2.0  # Flower looks at the same time for what is due later, and for tasks that have expired


class TaskWait:
    """Hold SuperExec's requests for a task.

    Parameters
    ----------
    app : callable
        Flower's ASGI app.
    lease : Lease
        A replica that does not lead has no task for anybody.
    has_task : callable
        Whether a task waits in the database.
    """

    def __init__(self, app: App, lease: Lease, has_task: Callable[[], bool]) -> None:
        self._app = app
        self._lease = lease
        self._has_task = has_task

    async def acquire(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask Flower once it may have a task; answer that there is none where this replica does not lead for long."""
        start_s = time.monotonic()
        while True:
            waited_s = time.monotonic() - start_s
            if self._lease.is_valid and (waited_s >= _LEADER_ASKS_S or self._has_task()):
                await self._app(scope, receive, send)
                return
            if waited_s >= _STANDBY_ANSWER_S:
                await send_empty(send)
                return
            await asyncio.sleep(_LOOK_EVERY_S)


class PendingTasks:
    """Tell whether a task waits for SuperExec.

    Parameters
    ----------
    database : Path
        Database file of the SuperLink.
    """

    def __init__(self, database: Path) -> None:
        self._connection = connect(database)
        self._version = -1
        self._found = False

    def __call__(self) -> bool:
        """Look into the database where it has changed since the last time."""
        version = data_version(self._connection)
        if version != self._version:
            query = "SELECT EXISTS (SELECT 1 FROM task WHERE starting_at IS NULL AND finished_at IS NULL)"
            self._version, self._found = version, bool(self._connection.execute(query).fetchone()[0])
        return self._found
