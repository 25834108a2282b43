"""Let a database that is locked or has no room cost Flower's clients time, and neither themselves nor a message.

Flower answers 500 then. Its SuperNodes and SuperExec end with it when they ask for something, a SuperNode forgets the
reply that it was sending, and a ServerApp fails its run. All of them try again after 503, so a request whose
transaction was not made gets that, and what a request does is done as a whole or not at all.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import event, text
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import DatabaseError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnection

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 20_000

_FLEET = "flwr.superlink.servicer.fleet.fleet_handlers"
_RUNTIME = "flwr.superlink.servicer.runtime.runtime_handlers"

# Handlers of more than one transaction: a message would be marked as delivered though its answer was a failure.
_IN_PARTS = (
    (_FLEET, "pull_messages"),
    (_FLEET, "push_messages"),
    (_RUNTIME, "pull_messages"),
    (_RUNTIME, "push_messages"),
    (_RUNTIME, "push_task_output"),
)

_failure = threading.local()  # a request is handled by one thread

_CallNext = Callable[[Request], Awaitable[Response]]


def make_patient() -> None:
    """Change Flower's answers to what its database refuses; called before its app is made and its database opened."""
    _set_pragmas()
    event.listen(Engine, "handle_error", _note)
    for module, name in _IN_PARTS:
        _replace(module, name, _as_a_whole)
    for module in (_FLEET, _RUNTIME):
        _replace(module, "push_object", _stored)
    superlink: Any = importlib.import_module("flwr.superlink.main")
    superlink.http_error_translator = _translator(superlink.http_error_translator)


def _set_pragmas() -> None:
    """Let requests wait for their turn to write for 20 s, of the 30 s that clients wait, instead of Flower's 5 s.

    The messages of a big model take that long on a busy disk. Nothing waits for the disk itself: no other life of a
    SuperLink reads this database, and what must outlive it is on the disks of a majority before its answer goes out.
    """
    sql_mixin: Any = importlib.import_module("flwr.supercore.sql_mixin")
    ours = {"busy_timeout": str(BUSY_TIMEOUT_MS), "synchronous": "OFF"}
    others = [(name, value) for name, value in sql_mixin.SQLITE_PRAGMAS if name not in ours]
    sql_mixin.SQLITE_PRAGMAS = (*ours.items(), *others)


def _replace(module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    handlers = importlib.import_module(module)
    setattr(handlers, name, wrap(getattr(handlers, name)))


def _as_a_whole(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def handler(request: Any, state: Any, *rest: Any, **more: Any) -> Any:
        with state.session() as session:  # Flower's own transactions become a part of it
            # sqlite3 begins none for the first of Flower's statements, which starts with WITH.
            session.execute(text("BEGIN IMMEDIATE"))
            return plain(request, state, *rest, **more)

    return handler


def _stored(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Tell an object that was not wanted from one that could not be stored, or was stored by the request before."""

    @functools.wraps(plain)
    def push_object(request: Any, state: Any, *rest: Any, **more: Any) -> Any:
        _failure.seen = None
        response = plain(request, state, *rest, **more)
        if not response.stored:
            if _failure.seen is not None:
                raise _failure.seen  # Flower has swallowed it
            # The answer to the request before was lost. Objects are named by their content.
            response.stored = state.object_store.get(request.object_id) == request.object_content != b""
        return response

    return push_object


def _note(context: ExceptionContext) -> None:
    if context.sqlalchemy_exception is not None and _is_passing(context.sqlalchemy_exception):
        _failure.seen = context.sqlalchemy_exception


def _is_passing(error: Exception) -> bool:
    """Return whether the same request may succeed later, here or at the next leader: no mistake of the request's."""
    # A database that is damaged is of the plain class; the agent gives the leadership up.
    return isinstance(error, OperationalError | InternalError | NoConnection) or type(error) is DatabaseError


def _translator(plain: Callable[[Request, _CallNext], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    async def translate(request: Request, call_next: _CallNext) -> Response:
        async def call(request: Request) -> Response:
            try:
                return await call_next(request)
            except SQLAlchemyError as error:
                if not _is_passing(error):
                    raise
                logger.warning("%s is to be tried again: %s", request.url.path, error)
                headers = {"retry-after": "1"}
                return JSONResponse({"detail": "The database is busy, try again."}, status_code=503, headers=headers)

        return await plain(request, call)

    return translate
