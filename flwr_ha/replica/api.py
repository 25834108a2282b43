"""REST of one replica: for load balancers, operators, the dashboard and the other replicas."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import flwr_ha
from flwr_ha.errors import CoordinationError, HaError
from flwr_ha.replica import metrics
from flwr_ha.replica.openapi import openapi

CALL_TIMEOUT_S = 1.8  # no call takes 2 s
CALLS_AT_ONCE = 8
MAX_BODY_BYTES = 64 * 1024
LATE = "the coordinator has not answered in time; it may still have been done: GET /cluster shows it"
T = TypeVar("T")


class RefusedError(HaError):
    """An operator asked for what is not possible now; the message says why."""


class ReplicaStatus(Protocol):
    """What the REST API needs of the agent; no call but the last three blocks."""

    def is_leader(self) -> bool:
        """Whether this replica leads and its lease has not run out."""
        ...

    def is_standby(self) -> bool:
        """Whether this replica runs and does not lead."""
        ...

    def lag_rounds(self) -> int:
        """Return how many committed rounds are missing here."""
        ...

    def why_not_alive(self) -> str:
        """Return why the process should be restarted, or an empty text."""
        ...

    def why_not_ready(self) -> str:
        """Return why this replica could not lead, or an empty text."""
        ...

    def cluster(self) -> dict[str, Any]:
        """Return the answer of ``GET /cluster``."""
        ...

    def commits(self, run_id: str) -> list[dict[str, Any]] | None:
        """Return the newest commits of a run, oldest first; None where the cluster has no commit of it.

        CoordinationError while they are still being read.
        """
        ...

    def history(self) -> list[dict[str, Any]]:
        """Return the leadership changes, newest last."""
        ...

    def events_after(self, number: int) -> list[dict[str, Any]]:
        """Return the newer events, oldest first."""
        ...

    def metrics(self) -> bytes | None:
        """Return the Prometheus text, or None where its library is missing; may wait for the disk."""
        ...

    def ask_switchover(self, candidate: int | None) -> None:
        """Hand the leadership over; RefusedError where nobody can take it."""
        ...

    def set_paused(self, is_paused: bool) -> None:
        """Forbid or allow automatic failover."""
        ...


def is_authorized(request: Request, secret: str) -> bool:
    """Whether the request carries the shared secret."""
    return is_secret(request.headers.get("authorization", ""), secret)


def is_secret(authorization: str, secret: str) -> bool:
    """Whether the value of an Authorization header is the shared secret; compared in constant time."""
    return hmac.compare_digest(authorization.encode(), f"Bearer {secret}".encode())


def create_api(replica: ReplicaStatus, *, secret: str, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the ASGI app; `routes` are those of the blobs, the session and the dashboard."""
    endpoints = [*_state_routes(replica), *_information_routes(replica), *_operator_routes(replica, secret)]
    app = Starlette(routes=[*endpoints, *routes], exception_handlers={HTTPException: _problem, Exception: _failure})
    app.router.redirect_slashes = False  # an address that is not quite right is answered like any wrong one
    return app


class _Threads:
    """Call what may block, and answer in time all the same: a call that hangs is left behind."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(CALLS_AT_ONCE)  # of its own: what hangs must not keep the blobs waiting

    async def call(self, act: Callable[[], T]) -> T:
        """Return what `act` returns; TimeoutError after `CALL_TIMEOUT_S`."""
        answer = anyio.to_thread.run_sync(act, abandon_on_cancel=True, limiter=self._limiter)
        return await asyncio.wait_for(answer, CALL_TIMEOUT_S)


async def _problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def _failure(_: Request, error: Exception) -> Response:
    """Answer what was not foreseen without its traceback, which uvicorn logs."""
    return JSONResponse({"detail": f"the replica failed: {type(error).__name__}"}, 500)


def _verdict(reason: str, name: str) -> Response:
    return JSONResponse({"status": "ok" if not reason else f"not {name}", "reason": reason}, 503 if reason else 200)


def _state_routes(replica: ReplicaStatus) -> list[Route]:
    async def leader(_: Request) -> Response:
        return _verdict("" if replica.is_leader() else "this replica does not lead", "leader")

    async def standby(request: Request) -> Response:
        limit = _whole_number(request, "lag")
        if not replica.is_standby():
            return _verdict("this replica is not a running standby", "standby")
        lag = replica.lag_rounds()
        return _verdict("" if limit is None or lag <= limit else f"{lag} rounds behind", "standby")

    async def liveness(_: Request) -> Response:
        return _verdict(replica.why_not_alive(), "alive")

    async def readiness(_: Request) -> Response:
        return _verdict(replica.why_not_ready(), "ready")

    async def health(_: Request) -> Response:
        return _verdict(replica.why_not_alive() or replica.why_not_ready(), "healthy")

    table = {
        "/leader": leader,
        "/primary": leader,
        "/replica": standby,
        "/health": health,
        "/liveness": liveness,
        "/readiness": readiness,
    }
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in table.items()]


def _information_routes(replica: ReplicaStatus) -> list[Route]:
    threads, document = _Threads(), openapi(flwr_ha.__version__)

    async def cluster(_: Request) -> Response:
        return JSONResponse(replica.cluster())

    async def history(_: Request) -> Response:
        return JSONResponse(replica.history())

    async def events(request: Request) -> Response:
        return JSONResponse(replica.events_after(_whole_number(request, "after") or 0))

    async def commits(request: Request) -> Response:
        run_id = request.path_params["run_id"]
        try:
            log = replica.commits(run_id)
        except CoordinationError as error:
            raise HTTPException(503, str(error)) from error
        if log is None:
            raise HTTPException(404, f"run {run_id} has no committed round here")
        return JSONResponse(log)

    async def measured(_: Request) -> Response:
        try:
            text = await threads.call(replica.metrics)
        except TimeoutError:
            raise HTTPException(503, "the disk does not answer") from None
        if text is None:
            raise HTTPException(501, metrics.MISSING)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def description(_: Request) -> Response:
        return JSONResponse(document)

    table = {
        "/cluster": cluster,
        "/history": history,
        "/events": events,
        "/runs/{run_id}/commits": commits,
        "/metrics": measured,
        "/openapi.json": description,
    }
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in table.items()]


def _whole_number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise HTTPException(400, f"{name} must be a whole number from 0 on")
    return int(text)


def _operator_routes(replica: ReplicaStatus, secret: str) -> list[Route]:
    threads = _Threads()

    def guarded(act: Callable[[dict[str, Any]], None], status: int) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if not is_authorized(request, secret):
                return JSONResponse({"detail": "Authorization: Bearer SECRET is missing or wrong"}, 401)
            body = await _json_object(request)
            try:
                await threads.call(lambda: act(body))
            except RefusedError as error:
                return JSONResponse({"detail": str(error)}, 409)
            except TimeoutError:
                return JSONResponse({"detail": LATE}, 503)
            except CoordinationError as error:
                return JSONResponse({"detail": f"the coordinator does not answer: {error}"}, 503)
            return JSONResponse({}, status)

        return endpoint

    def switchover(body: dict[str, Any]) -> None:
        candidate = body.get("candidate")
        if candidate is not None and (isinstance(candidate, bool) or not isinstance(candidate, int)):
            raise HTTPException(400, "candidate must be the id of a replica, a whole number")
        replica.ask_switchover(candidate)

    return [
        Route("/switchover", guarded(switchover, 202), methods=["POST"]),
        Route("/pause", guarded(lambda _: replica.set_paused(True), 200), methods=["POST"]),
        Route("/resume", guarded(lambda _: replica.set_paused(False), 200), methods=["POST"]),
    ]


async def _json_object(request: Request) -> dict[str, Any]:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, "the request is too large")
    if not raw.strip():
        return {}
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return body
