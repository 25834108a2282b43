"""The loopback API between a ServerApp and the replica that runs it."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flwr_ha.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CoordinationError,
    FencedError,
    HaError,
    NoMajorityError,
)
from flwr_ha.model import Head, RunStatus
from flwr_ha.replica.sessionbodies import (
    TooLargeError,
    checked_commit,
    checked_digests,
    checked_note,
    checked_run_id,
    checked_status,
    read_object,
)
from flwr_ha.storage.digests import is_digest


class ServerAppHost(Protocol):
    """What the session API needs of the agent."""

    def session_token(self) -> str:
        """Return the token of the present SuperLink life; empty where there is none."""
        ...

    def open_session(self, run_id: str) -> dict[str, Any]:
        """Return term, replica, blob folder and committed head; FencedError where this replica does not lead."""
        ...

    def offer(self, digests: Sequence[str]) -> None:
        """Begin to copy parts of a checkpoint that will be committed soon; FencedError as above."""
        ...

    def commit(self, run_id: str, body: dict[str, Any]) -> Head:
        """Commit a round; FencedError, or an error that asks to try again."""
        ...

    def report(self, status: RunStatus) -> None:
        """Take note of what a run does."""
        ...

    def note(self, run_id: str, body: dict[str, Any]) -> None:
        """Append an event of a run."""
        ...

    def repair(self, digest: str) -> None:
        """Replace a corrupt blob by a copy of a peer; CheckpointError where none has a good one."""
        ...


def error_response(error: HaError) -> JSONResponse:
    """Return the answer of the session protocol for an error."""
    body: dict[str, Any] = {"detail": str(error)}
    match error:
        case FencedError():
            return JSONResponse(body, 409)
        case NoMajorityError():
            return JSONResponse({**body, "kind": "majority"}, 503)
        case CoordinationError():
            return JSONResponse({**body, "kind": "coordination"}, 503)
        case CheckpointCorruptError():
            return JSONResponse({**body, "kind": "corrupt"}, 422)
        case CheckpointError():
            return JSONResponse(body, 422)
        case _:
            return JSONResponse(body, 500)


Act = Callable[[Request, dict[str, Any]], Response]


def _guarded(host: ServerAppHost, act: Act) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint that lets only ServerApps of the present SuperLink life act."""

    async def endpoint(request: Request) -> Response:
        token = host.session_token()
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token or not hmac.compare_digest(given.encode(), token.encode()):
            return JSONResponse({"detail": "this ServerApp belongs to an older life of the replica"}, 401)
        try:
            body = await read_object(request)
            return await run_in_threadpool(act, request, body)
        except TooLargeError as error:
            return JSONResponse({"detail": str(error)}, 413)
        except HaError as error:
            return error_response(error)
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse({"detail": f"the request is malformed: {error!r}"}, 400)

    return endpoint


def session_routes(host: ServerAppHost) -> list[Route]:
    """Return the routes below ``/session``; each needs the token of the present SuperLink life."""

    def open_session(request: Request, _: dict[str, Any]) -> Response:
        return JSONResponse(host.open_session(_run_id(request)))

    def offer(request: Request, body: dict[str, Any]) -> Response:
        host.offer(checked_digests(body, "digests"))
        return Response(status_code=204)

    def commit(request: Request, body: dict[str, Any]) -> Response:
        return JSONResponse(host.commit(_run_id(request), checked_commit(body)).to_json())

    def status(request: Request, body: dict[str, Any]) -> Response:
        host.report(checked_status(_run_id(request), body))
        return Response(status_code=204)

    def note(request: Request, body: dict[str, Any]) -> Response:
        host.note(_run_id(request), checked_note(body))
        return Response(status_code=204)

    def repair(request: Request, _: dict[str, Any]) -> Response:
        digest = request.path_params["digest"]
        if not is_digest(digest):
            raise ValueError(f"{digest[:100]!r} is not a digest")
        try:
            host.repair(digest)
        except CheckpointError as error:
            return JSONResponse({"detail": str(error)}, 404)
        return JSONResponse({})

    table: dict[str, tuple[Act, str]] = {
        "/session/runs/{run_id}": (open_session, "GET"),
        "/session/runs/{run_id}/offer": (offer, "POST"),
        "/session/runs/{run_id}/commit": (commit, "POST"),
        "/session/runs/{run_id}/status": (status, "POST"),
        "/session/runs/{run_id}/events": (note, "POST"),
        "/session/blobs/{digest}/repair": (repair, "POST"),
    }
    return [Route(path, _guarded(host, act), methods=[method]) for path, (act, method) in table.items()]


def _run_id(request: Request) -> str:
    return checked_run_id(request.path_params["run_id"])
