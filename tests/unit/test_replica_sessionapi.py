"""The way of a ServerApp to its replica: only those of the present SuperLink act, and each error has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from flwr_ha.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CoordinationError,
    FencedError,
    HaError,
    NoMajorityError,
)
from flwr_ha.model import Head, Position, RunState, RunStatus
from flwr_ha.replica.sessionapi import session_routes
from flwr_ha.replica.sessionbodies import MAX_BODY_BYTES

TOKEN = "token of this life"
DIGEST = "sha256:" + "a" * 64
HEAD = Head(
    run_id="17",
    app="a/b",
    num_rounds=8,
    position=Position(2, 3, "sha256:abc"),
    model_digest="sha256:def",
    size_bytes=10,
    copies=(0, 1),
    committed_at="2026-11-24T03:00:00.000Z",
    metrics={"accuracy": 0.9},
)
COMMIT = {
    "server_round": 3,
    "num_rounds": 8,
    "digest": DIGEST,
    "parts": [DIGEST],
    "model_digest": DIGEST,
    "bytes": 10,
    "app": "a/b",
    "metrics": {"accuracy": 0.9, "losses": [1, 0.5]},
}
STATUS = RunStatus(run_id="17", app="a/b", state=RunState.WAITING, reason="4 of 5 nodes online", min_nodes=5)


class FakeHost:
    """Stand in for the replica."""

    def __init__(self) -> None:
        self.token = TOKEN
        self.calls: list[tuple[Any, ...]] = []
        self.error: HaError | None = None

    def session_token(self) -> str:
        return self.token

    def open_session(self, run_id: str) -> dict[str, Any]:
        self._note("open", run_id)
        return {"term": 2}

    def offer(self, digests: Sequence[str]) -> None:
        self._note("offer", *digests)

    def commit(self, run_id: str, body: dict[str, Any]) -> Head:
        self._note("commit", run_id, body["server_round"])
        return HEAD

    def report(self, status: RunStatus) -> None:
        self._note("report", status)

    def note(self, run_id: str, body: dict[str, Any]) -> None:
        self._note("note", run_id, body)

    def repair(self, digest: str) -> None:
        self._note("repair", digest)

    def _note(self, *call: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)

    def call(self, method: str, path: str, *, token: str = TOKEN, **options: Any) -> httpx.Response:
        """Call the API as a ServerApp would."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(Starlette(routes=session_routes(self)))
            headers = {"Authorization": f"Bearer {token}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://replica", headers=headers) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@pytest.fixture
def host() -> FakeHost:
    """Give a replica that leads."""
    return FakeHost()


def test_serverapp_opens_reports_notes_and_commits(host: FakeHost) -> None:
    """The calls of one round, with what comes back."""
    assert host.call("GET", "/session/runs/17").json() == {"term": 2}
    assert host.call("POST", "/session/runs/17/status", json=STATUS.to_json()).status_code == 204
    assert host.call("POST", "/session/runs/17/events", json={"kind": "k", "message": "m"}).status_code == 204
    answer = host.call("POST", "/session/runs/17/commit", json=COMMIT)
    assert Head.from_json(answer.json()) == HEAD
    assert host.call("POST", f"/session/blobs/{DIGEST}/repair").json() == {}
    assert host.calls == [
        ("open", "17"),
        ("report", STATUS),
        ("note", "17", {"kind": "k", "message": "m"}),
        ("commit", "17", 3),
        ("repair", DIGEST),
    ]


@pytest.mark.parametrize("token", ["", "token of the last life", TOKEN + " "])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/session/runs/17"),
        ("POST", "/session/runs/17/commit"),
        ("POST", "/session/runs/17/offer"),
        ("POST", "/session/runs/17/status"),
        ("POST", "/session/runs/17/events"),
        ("POST", f"/session/blobs/{DIGEST}/repair"),
    ],
)
def test_orphan_of_an_older_term_is_turned_away(host: FakeHost, method: str, path: str, token: str) -> None:
    """It ends then: 401 is fenced for it."""
    assert host.call(method, path, token=token, json=COMMIT).status_code == 401
    assert host.calls == []


def test_nobody_gets_in_while_there_is_no_superlink(host: FakeHost) -> None:
    """An empty token must not match an empty header."""
    host.token = ""
    assert host.call("GET", "/session/runs/17", token="").status_code == 401


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (FencedError("term 2 was given up"), 409, None),
        (NoMajorityError("0 of 1 needed copies"), 503, "majority"),
        (CoordinationError("no answer"), 503, "coordination"),
        (CheckpointError("it was not written"), 422, None),
        (CheckpointCorruptError("digest mismatch"), 422, "corrupt"),
        (HaError("something else"), 500, None),
    ],
)
def test_error_tells_the_serverapp_what_to_do(host: FakeHost, error: HaError, status: int, kind: str | None) -> None:
    """409: end. 503: try again. 422: it is your mistake."""
    host.error = error
    answer = host.call("POST", "/session/runs/17/commit", json=COMMIT)
    assert answer.status_code == status
    assert answer.json() == {"detail": str(error)} | ({"kind": kind} if kind else {})


def test_blob_without_a_good_copy_is_not_found(host: FakeHost) -> None:
    """The ServerApp names an older checkpoint then."""
    host.error = CheckpointError("no peer has it")
    answer = host.call("POST", f"/session/blobs/{DIGEST}/repair")
    assert (answer.status_code, answer.json()) == (404, {"detail": "no peer has it"})


@pytest.mark.parametrize("body", [b"{", b"{}", b"[]", b'"text"', b"\xff"])
def test_malformed_commit_is_refused(host: FakeHost, body: bytes) -> None:
    """By name of what is wrong, and nothing is committed."""
    answer = host.call("POST", "/session/runs/17/commit", content=body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("the request is malformed: ")
    assert host.calls == []


def test_parts_are_offered(host: FakeHost) -> None:
    """Digests go to the replica; anything else is refused."""
    assert host.call("POST", "/session/runs/17/offer", json={"digests": [DIGEST]}).status_code == 204
    for body in ({}, {"digests": DIGEST}, {"digests": ["../../etc/passwd"]}):
        assert host.call("POST", "/session/runs/17/offer", json=body).status_code == 400
    assert host.calls == [("offer", DIGEST)]


def test_malformed_status_is_refused(host: FakeHost) -> None:
    """A state that does not exist, a field that does not exist."""
    for change in ({"state": "dancing"}, {"mood": "good"}):
        answer = host.call("POST", "/session/runs/17/status", json=STATUS.to_json() | change)
        assert answer.status_code == 400
    assert host.calls == []


def test_request_that_is_too_large_is_refused(host: FakeHost) -> None:
    """Metrics have a limit; arrays do not come this way."""
    answer = host.call("POST", "/session/runs/17/commit", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


WRONG_COMMITS = (
    {"server_round": -1},
    {"server_round": True},
    {"server_round": 2**70},
    {"num_rounds": "8"},
    {"bytes": 1.5},
    {"digest": "sha256:../../../etc/passwd"},
    {"model_digest": None},
    {"parts": ["../other"]},
    {"parts": "sha256"},
    {"app": 7},
    {"metrics": {"accuracy": "high"}},
    {"metrics": []},
)


@pytest.mark.parametrize("change", WRONG_COMMITS, ids=str)
def test_commit_with_a_wrong_value_is_refused(host: FakeHost, change: dict[str, Any]) -> None:
    """No value of another kind gets into the coordinator or onto the disk."""
    answer = host.call("POST", "/session/runs/17/commit", json=COMMIT | change)
    assert answer.status_code == 400
    assert next(iter(change)) in answer.json()["detail"]
    assert host.calls == []


@pytest.mark.parametrize("run_id", ["..%2F..%2Fleader", "%2e%2e", "17%00", "-1", "1" * 21, "١٧", "17%2F0000000001"])
@pytest.mark.parametrize("rest", ["", "/commit", "/status", "/events"])
def test_paths_in_run_ids_lead_nowhere(host: FakeHost, run_id: str, rest: str) -> None:
    """A run id is a number; nothing else becomes part of a key in the coordinator."""
    answer = host.call("POST" if rest else "GET", f"/session/runs/{run_id}{rest}", json=COMMIT if rest else None)
    assert answer.status_code in (400, 404, 405)
    assert host.calls == []


@pytest.mark.parametrize(
    "digest", ["sha256:abc", "..%2f..%2fsecret", "sha256:" + "A" * 64, "sha256:" + "a" * 64 + "%0a"]
)
def test_paths_in_digests_lead_nowhere(host: FakeHost, digest: str) -> None:
    """Only a digest is fetched."""
    assert host.call("POST", f"/session/blobs/{digest}/repair").status_code in (400, 404)
    assert host.calls == []


def test_status_is_of_the_own_run_only(host: FakeHost) -> None:
    """The run of the path is the run of the body."""
    answer = host.call("POST", "/session/runs/18/status", json=STATUS.to_json())
    assert answer.status_code == 400
    assert host.calls == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from([*COMMIT, *STATUS.to_json(), "kind", "message", "number", "at", "replica"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/commit", "/status", "/events"]),
    base=st.sampled_from([COMMIT, STATUS.to_json(), {"kind": "k", "message": "m"}, {}]),
    changes=st.dictionaries(fields, json_values, max_size=4),
)
def test_any_json_is_taken_or_refused(host: FakeHost, path: str, base: dict[str, Any], changes: dict[str, Any]) -> None:
    """Whatever user code sends: no crash, no inside in the answer."""
    answer = host.call("POST", f"/session/runs/17{path}", json=base | changes)
    assert answer.status_code in (200, 204, 400)
    assert "Traceback" not in answer.text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | st.integers(1, 200_000).map(lambda depth: b"[" * depth))
def test_any_bytes_are_refused_with_a_sentence(host: FakeHost, body: bytes) -> None:
    """Not JSON, or nested without end: 400."""
    answer = host.call("POST", "/session/runs/17/commit", content=body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("the request is malformed: ")
