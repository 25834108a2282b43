"""What a ServerApp may send: every value is looked at, since user code runs in the same process as its sender."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from flwr_ha.model import RunState, RunStatus
from flwr_ha.storage.digests import is_digest

MAX_BODY_BYTES = 4 * 1024**2
MAX_PARTS = 20_000
MAX_NOTE_TEXT, MAX_NOTE_FIELDS = 500, 20  # characters, values
MAX_COUNT = 2**63 - 1
MAX_TEXT = 2000


class TooLargeError(ValueError):
    """The body has more than `MAX_BODY_BYTES`."""


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body; empty for an empty one.

    Raises
    ------
    TooLargeError
        As soon as it is known; the rest is not read.
    ValueError
        It is not a JSON object, or holds NaN, which is not JSON.
    """
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise TooLargeError("the request is too large")
    if not raw:
        return {}
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    return body


def checked_run_id(text: str) -> str:
    """Return Flower's run id, unsigned decimal; ValueError for anything else, which could lead to another entry."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ValueError(f"{text[:50]!r} is not a run id")
    return text


def checked_commit(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a commit; ValueError or KeyError names the one that is wrong."""
    parts = checked_digests(body, "parts")
    metrics = body["metrics"]
    if not isinstance(metrics, dict) or not all(map(_is_metric, metrics.values())):
        raise ValueError("metrics is not a table of numbers")
    return {
        **{name: _count(body, name) for name in ("server_round", "num_rounds", "bytes")},
        **{name: _digest(name, body[name]) for name in ("digest", "model_digest")},
        "parts": parts,
        "app": _text(body, "app"),
        "metrics": metrics,
    }


def checked_digests(body: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of digests; ValueError or KeyError where it is none."""
    values = body[name]
    if not isinstance(values, list) or len(values) > MAX_PARTS:
        raise ValueError(f"{name} is not a list of digests")
    return [_digest(name, value) for value in values]


def checked_status(run_id: str, body: Mapping[str, Any]) -> RunStatus:
    """Return what a ServerApp says of its own run; ValueError, KeyError or TypeError where it is malformed."""
    if body["run_id"] != run_id:
        raise ValueError("run_id is not the one of the path")
    names: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
        **dict.fromkeys(("app", "reason"), _text),
        **dict.fromkeys(("num_rounds", "nodes_online", "min_nodes"), _count),
    }
    unknown = set(body) - {*names, "run_id", "state"}
    if unknown:
        raise ValueError(f"{min(unknown)[:50]!r} is not a field of a status")
    fields = {name: read(body, name) for name, read in names.items() if name in body}
    return RunStatus(run_id=run_id, state=RunState(body["state"]), **fields)


def checked_note(note: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a note goes into the event log, which stays in memory: a few plain values."""
    kind, message = _text(note, "kind"), _text(note, "message")
    plain = {str(key)[:50]: value for key, value in note.items() if isinstance(value, str | int | float)}
    cut = {key: value[:MAX_NOTE_TEXT] if isinstance(value, str) else value for key, value in plain.items()}
    return {**dict(list(cut.items())[:MAX_NOTE_FIELDS]), "kind": kind[:50], "message": message}


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{name} is not a whole number from 0 on")
    return value


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return value[:MAX_TEXT]


def _digest(name: str, value: object) -> str:
    if not isinstance(value, str) or not is_digest(value):
        raise ValueError(f"{name} holds {str(value)[:100]!r}, which is not a digest")
    return value


def _is_metric(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, int | float) for each in value)
    return isinstance(value, int | float)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
