"""Stand in front of Flower's app: serve the public only while leading, answer only for what is replicated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from flwr_ha.superlink.asgi import (
    App,
    Receive,
    Scope,
    Send,
    answer_of,
    content_of,
    in_one_piece,
    restated,
    send_all,
    status_of,
    unless_forbidden,
)
from flwr_ha.superlink.lease import Lease
from flwr_ha.superlink.objectwait import ObjectWait
from flwr_ha.superlink.parking import ASKS_FOR_REPLIES, PULL, Parking
from flwr_ha.superlink.replywait import ReplyWait
from flwr_ha.superlink.taskwait import TaskWait

ACQUIRE_TASK = "/v1/runtime/acquire-task"

# A SuperNode asks these while it takes a message in. Flower forbids them until the run's ServerApp runs again after a
# failover; the SuperNode then forgets the message but trains on it all the same, and from then on each of its replies
# lies there until the next message comes, that of the last one for ever. While parts are missing nothing can have been
# trained: the message is gone, and the SuperNode cleans up. Once it has all parts, it may have its reply already, even
# before it confirms: it is told that all is well, sends the reply, and learns then that nobody waits for it.
PULL_OBJECT = "/v1/fleet/pull-object"
PULL_OBJECT_OF_REPLY = "/v1/runtime/pull-object"
PUSH_OBJECT = frozenset(("/v1/fleet/push-object", "/v1/runtime/push-object"))
PUSH_REPLY = "/v1/fleet/push-messages"
CONFIRM = "/v1/fleet/confirm-message-received"

START_RUN = "/v1/control/start-run"

HELD = frozenset(
    [
        f"/v1/control/{name}"
        for name in (
            "start-run",
            "stop-run",
            "update-run-series-description",
            "start-automation",
            "stop-automation",
            "disconnect-connector",
            "complete-connector-oauth",
            "register-node",
            "unregister-node",
            "add-app",
            "remove-app",
            "set-federation-icon",
            "create-federation",
            "archive-federation",
            "add-node-to-federation",
            "remove-node-from-federation",
            "remove-account-from-federation",
            "create-invitation",
            "accept-invitation",
            "reject-invitation",
            "revoke-invitation",
            "configure-simulation-federation",
        )
    ]
    + [f"/v1/fleet/{name}" for name in ("register-node", "activate-node", "deactivate-node", "unregister-node")]
    + [f"/v1/runtime/{name}" for name in ("push-task-output", "create-task", "start-automation")]
)


class Replication:
    """Let answers wait until the agent has made the control plane safe elsewhere.

    Parameters
    ----------
    ask : callable
        Sends the agent a request with this number; the agent answers through `answer`.
    version : callable
        Returns a number that changes whenever the database is written to.
    timeout_s : float
        Time that the agent has for an answer; without one the answer is no.

    Notes
    -----
    One request to the agent is under way at a time and one more waits, shared by all who came meanwhile: the one
    under way may have read the database before a late comer's change.
    """

    def __init__(self, ask: Callable[[int], None], version: Callable[[], int], timeout_s: float) -> None:
        self._ask = ask
        self._version = version
        self._timeout_s = timeout_s
        self._serial = 0
        self._safe_version = -1
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._running: asyncio.Task[bool] | None = None
        self._waiting: asyncio.Task[bool] | None = None

    async def wait_replicated(self) -> bool:
        """Return whether all that is in the database now is safe elsewhere."""
        # Equal versions mean that nobody has written since the last picture that the agent has made safe.
        if self._version() == self._safe_version:
            return True
        if self._waiting is None:
            self._waiting = asyncio.create_task(self._round(self._running))
        # A client that hangs up must not take the round away from the others.
        return await asyncio.shield(self._waiting)

    def answer(self, serial: int, *, is_replicated: bool) -> None:
        """Take the agent's answer; an answer that comes too late is ignored."""
        future = self._answers.get(serial)
        if future is not None and not future.done():
            future.set_result(is_replicated)

    async def _round(self, previous: asyncio.Task[bool] | None) -> bool:
        if previous is not None:
            await asyncio.wait([previous])
        self._running, self._waiting = self._waiting, None
        self._serial += 1
        serial, version = self._serial, self._version()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[serial] = future
        try:
            self._ask(serial)
            is_replicated = await asyncio.wait_for(future, self._timeout_s)
        except TimeoutError:
            is_replicated = False
        finally:
            del self._answers[serial]
        if is_replicated:
            self._safe_version = version
        return is_replicated


class Gate:
    """Wrap Flower's app in the rules of a replica.

    A request that came in on a public socket is served only while the lease runs; a changing request is answered
    only once its change is replicated; SuperExec gets no work while the replica does not lead. Who asks for work waits
    for it, see `Parking` and `TaskWait`, and so does who asks for replies and for parts that are still on their way,
    see `ReplyWait` and `ObjectWait`. Besides, a SuperNode that takes a message of the last leader in is told that
    it is gone, or that all is well, see `PULL_OBJECT`.

    Parameters
    ----------
    app : callable
        Flower's ASGI app.
    lease : Lease
        Says whether the replica leads.
    private_port : int
        Port of the loopback socket; every other local port is public.
    replication : Replication
        Makes changes safe.
    withdraw : callable
        Gets Flower's answer to a new run that could not be made safe, and takes the run back: its user
        is told to submit it again, and would have it twice. May block.
    has_task : callable
        Whether a task waits for SuperExec, which is asked only then, and now and then.
    """

    def __init__(
        self,
        app: App,
        *,
        lease: Lease,
        private_port: int,
        replication: Replication,
        withdraw: Callable[[bytes], None] = lambda _: None,
        has_task: Callable[[], bool] = lambda: True,
    ) -> None:
        self._withdraw = withdraw
        self._app = app
        self._lease = lease
        self._private_port = private_port
        self._replication = replication

        def is_open() -> bool:
            return lease.is_valid

        self._parking = Parking(app, is_open=is_open)
        objects, replies = ObjectWait(app, is_open=is_open), ReplyWait(app, is_open=is_open)
        self._handlers: dict[str, App] = {
            ACQUIRE_TASK: TaskWait(app, lease, has_task).acquire,
            PULL: self._parking.pull,
            ASKS_FOR_REPLIES: replies.pull,
            PUSH_REPLY: replies.push,
            PULL_OBJECT: lambda scope, receive, send: objects.pull(scope, receive, restated(send, 403, 410)),
            PULL_OBJECT_OF_REPLY: objects.pull,
            CONFIRM: lambda scope, receive, send: app(scope, receive, unless_forbidden(send)),
        } | dict.fromkeys(PUSH_OBJECT, objects.push)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, is_public = scope["path"], scope["server"][1] != self._private_port
        receive, send = self._parking.watch(path, in_one_piece(receive), send)
        if is_public and not self._lease.is_valid:
            await _refuse(send, "this replica does not lead")
        elif path in HELD:
            await self._hold(scope, receive, send, is_public=is_public)
        else:
            await self._handlers.get(path, self._app)(scope, receive, send)

    async def _hold(self, scope: Scope, receive: Receive, send: Send, *, is_public: bool) -> None:
        """Run the call, make its effect safe elsewhere, only then send the answer."""
        answer = await answer_of(self._app, scope, receive)
        if 200 <= status_of(answer) < 300 and not await self._replication.wait_replicated():
            if scope["path"] == START_RUN:
                await asyncio.to_thread(self._withdraw, content_of(answer))
            await _refuse(send, "the change could not be replicated, its outcome is open: look, then try again")
        elif is_public and not self._lease.is_valid:
            await _refuse(send, "this replica does not lead any more")
        else:
            await send_all(send, answer)


async def _refuse(send: Send, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
