"""REST of one replica, call by call, over ASGI without a socket."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from flwr_ha.errors import CoordinationError
from flwr_ha.replica import api
from flwr_ha.replica.api import RefusedError, create_api

SECRET = "a shared secret of 16 or more"
BEARER = {"Authorization": f"Bearer {SECRET}"}


class FakeReplica:
    """Answer what the test wants, and note what operators ask for."""

    def __init__(self) -> None:
        self.role = "standby"
        self.lag = 0
        self.not_alive = self.not_ready = ""
        self.asked: list[Any] = []
        self.error: Exception | None = None

    def is_leader(self) -> bool:
        return self.role == "leader"

    def is_standby(self) -> bool:
        return self.role == "standby"

    def lag_rounds(self) -> int:
        return self.lag

    def why_not_alive(self) -> str:
        return self.not_alive

    def why_not_ready(self) -> str:
        return self.not_ready

    def cluster(self) -> dict[str, Any]:
        return {"cluster": "mnist"}

    def history(self) -> list[dict[str, Any]]:
        return [{"term": 1}]

    def events_after(self, number: int) -> list[dict[str, Any]]:
        return [{"number": number + 1}]

    def ask_switchover(self, candidate: int | None) -> None:
        self._ask(("switchover", candidate))

    def set_paused(self, is_paused: bool) -> None:
        self._ask(("paused", is_paused))

    def _ask(self, what: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(what)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Call the API as a client would."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(create_api(self, secret=SECRET), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def status(self, path: str) -> int:
        """Return the status of a GET."""
        return self.call("GET", path).status_code


@pytest.fixture
def replica() -> FakeReplica:
    """Give a healthy standby."""
    return FakeReplica()


@pytest.mark.parametrize(
    ("role", "leader", "standby"), [("leader", 200, 503), ("standby", 503, 200), ("starting", 503, 503)]
)
def test_load_balancer_learns_the_role(replica: FakeReplica, role: str, leader: int, standby: int) -> None:
    """By the status alone, as HAProxy asks."""
    replica.role = role
    answers = [replica.status(path) for path in ("/leader", "/primary", "/replica")]
    assert answers == [leader, leader, standby]


@pytest.mark.parametrize(("lag", "status"), [(0, 200), (2, 200), (3, 503)])
def test_standby_that_lags_can_be_left_out(replica: FakeReplica, lag: int, status: int) -> None:
    """``?lag=2`` takes those that are two rounds behind at most; without it the lag does not matter."""
    replica.lag = lag
    assert replica.status("/replica?lag=2") == status
    assert replica.status("/replica") == 200


@pytest.mark.parametrize("text", ["-1", "two", "1.5", "", "9" * 19, "%C2%B2"])
def test_number_that_is_none_is_refused(replica: FakeReplica, text: str) -> None:
    """Not a failure of the server."""
    for path in (f"/replica?lag={text}", f"/events?after={text}"):
        answer = replica.call("GET", path)
        assert answer.status_code == 400
        assert "must be a whole number from 0 on" in answer.json()["detail"]


def test_health_tells_alive_from_ready(replica: FakeReplica) -> None:
    """Not ready: no traffic. Not alive: restart it. Health is both, with the reason."""
    replica.not_ready = "the coordinator does not answer"
    assert [replica.status(path) for path in ("/liveness", "/readiness", "/health")] == [200, 503, 503]
    assert replica.call("GET", "/health").json()["reason"] == "the coordinator does not answer"
    replica.not_alive = "the loop thread does not answer"
    assert replica.status("/liveness") == 503
    assert replica.call("GET", "/health").json()["reason"] == "the loop thread does not answer"
    replica.not_alive = replica.not_ready = ""
    assert [replica.status(path) for path in ("/liveness", "/readiness", "/health")] == [200, 200, 200]


def test_reading_is_open(replica: FakeReplica) -> None:
    """Cluster, history, and the events after a number."""
    assert replica.call("GET", "/cluster").json() == {"cluster": "mnist"}
    assert replica.call("GET", "/history").json() == [{"term": 1}]
    assert replica.call("GET", "/events?after=41").json() == [{"number": 42}]
    assert replica.call("GET", "/events").json() == [{"number": 1}]


@pytest.mark.parametrize("path", ["/switchover", "/pause", "/resume"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}, {"Authorization": f"bearer {SECRET} "}],
)
def test_changing_needs_the_secret(replica: FakeReplica, path: str, headers: dict[str, str]) -> None:
    """Missing or wrong: 401, and nothing happens."""
    assert replica.call("POST", path, headers=headers, json={}).status_code == 401
    assert replica.asked == []


def test_operators_are_obeyed(replica: FakeReplica) -> None:
    """A switchover is accepted, to be done after the round; pause and resume are done."""
    assert replica.call("POST", "/switchover", headers=BEARER, json={"candidate": 1}).status_code == 202
    assert replica.call("POST", "/switchover", headers=BEARER).status_code == 202
    assert replica.call("POST", "/pause", headers=BEARER).status_code == 200
    assert replica.call("POST", "/resume", headers=BEARER).status_code == 200
    assert replica.asked == [("switchover", 1), ("switchover", None), ("paused", True), ("paused", False)]


def test_what_is_not_possible_is_a_conflict(replica: FakeReplica) -> None:
    """With the reason."""
    replica.error = RefusedError("replica 1 is not a healthy standby")
    answer = replica.call("POST", "/switchover", headers=BEARER, json={"candidate": 1})
    assert (answer.status_code, answer.json()["detail"]) == (409, "replica 1 is not a healthy standby")


@pytest.mark.parametrize("candidate", [True, "1", 1.0, [1]])
def test_candidate_must_be_an_id(replica: FakeReplica, candidate: object) -> None:
    """True is no replica."""
    assert replica.call("POST", "/switchover", headers=BEARER, json={"candidate": candidate}).status_code == 400
    assert replica.asked == []


def test_coordinator_that_is_away_is_no_refusal(replica: FakeReplica) -> None:
    """503: ask again."""
    replica.error = CoordinationError("no answer within 2 s")
    answer = replica.call("POST", "/pause", headers=BEARER)
    assert answer.status_code == 503
    assert "no answer within 2 s" in answer.json()["detail"]


def test_coordinator_that_hangs_does_not_hang_the_operator(
    replica: FakeReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes in bounded time."""
    monkeypatch.setattr(api, "CALL_TIMEOUT_S", 0.01)
    going_on = threading.Event()
    monkeypatch.setattr(replica, "set_paused", lambda _: going_on.wait(0.2))
    assert replica.call("POST", "/pause", headers=BEARER).status_code == 503


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[1]", 400), (b"[" * 60_000, 400), (b" " * 70_000, 413), (b"\xff", 400), (b"   ", 202)],
)
def test_body_that_is_no_request(replica: FakeReplica, body: bytes, status: int) -> None:
    """Malformed, too deep, too large: refused, not failed. Blank means that nothing is asked for."""
    assert replica.call("POST", "/switchover", headers=BEARER, content=body).status_code == status


def test_bug_is_answered_without_its_inside(replica: FakeReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback over the network."""

    def fail() -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr(replica, "cluster", fail)
    answer = replica.call("GET", "/cluster")
    assert (answer.status_code, answer.json()) == (500, {"detail": "the replica failed: KeyError"})


def test_unknown_path_and_method_are_json(replica: FakeReplica) -> None:
    """Tools parse every answer."""
    assert replica.call("GET", "/nothing").json() == {"detail": "Not Found"}
    assert replica.call("GET", "/pause").status_code == 405
