"""What operators are told by whatever answers at the addresses of the replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from flwr_ha.config import load_secret, parse_settings
from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.local.zookeeper import free_ports
from flwr_ha.operator import Operator, RequestRefusedError
from flwr_ha.replica.api import RefusedError, create_api
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.settings import ReplicaSettings, Settings

CLUSTER = {"cluster": "c", "term": 3, "leader": 1, "paused": False, "replicas": [], "runs": []}
CHANGE = {"term": 3, "leader": 1, "at": "2026-11-24T03:00:00Z", "reason": "first"}
COMMIT = {"server_round": 2, "digest": "sha256:0"}


class UpReplica:
    """What the REST API needs to answer."""

    def cluster(self) -> dict[str, Any]:
        return CLUSTER

    def history(self) -> list[dict[str, Any]]:
        return [CHANGE]

    def commits(self, run_id: str) -> list[dict[str, Any]] | None:
        return [COMMIT] if run_id == "12" else None

    def set_paused(self, is_paused: bool) -> None:
        if not is_paused:
            raise CoordinationError("no quorum")

    def ask_switchover(self, candidate: int | None) -> None:
        raise RefusedError(f"replica {candidate} is not a healthy standby")


class Stranger:
    """Another program at a replica's address, which gives one answer to everything."""

    def __init__(self) -> None:
        self.answer = Response()
        self.app = Starlette(routes=[Route("/{path:path}", self._endpoint, methods=["GET", "POST"])])

    async def _endpoint(self, _: Request) -> Response:
        return self.answer


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return a cluster of three replicas, one for each part that a test needs."""
    ports = free_ports(4)
    replicas = [{"id": n, "address": f"127.0.0.1:{ports[3]}", "api": f"127.0.0.1:{ports[n]}"} for n in range(3)]
    table = {"cluster": "c", "coordinator": "embedded:x", "replicas": replicas}
    return parse_settings(table, folder=tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def stranger(settings: Settings) -> Iterator[Stranger]:
    """Let something else answer at the address of replica 0."""
    stranger = Stranger()
    with ApiServer(settings.replica(0).api, tls=settings.tls) as server:
        server.start(stranger.app)
        yield stranger


@pytest.fixture(scope="module")
def up(settings: Settings) -> Iterator[ReplicaSettings]:
    """Let replica 1 answer."""
    with ApiServer(settings.replica(1).api, tls=settings.tls) as server:
        server.start(create_api(UpReplica(), secret=load_secret(settings)))
        yield settings.replica(1)


STRANGERS = {
    "a page": HTMLResponse("<h1>It works!</h1>"),
    "nothing": Response(b""),
    "other JSON": JSONResponse({"status": "ok"}),
    "a list": JSONResponse([{"status": "ok"}]),
    "a number": JSONResponse(3),
    "JSON too deep": Response(b"[" * 100_000, media_type="application/json"),
    "bytes": Response(b"\xff\xfe", media_type="application/json"),
    "another place": RedirectResponse("/login"),
    "a page that is not there": HTMLResponse("<h1>404</h1>", 404),
    "a framework's 404": JSONResponse({"detail": "Not Found"}, 404),
    "an error with fields": JSONResponse({"detail": [{"msg": "field required"}]}, 422),
    "a log-in": JSONResponse({"detail": "Not authenticated"}, 401),
    "a load balancer": HTMLResponse("<h1>503</h1>", 503),
}
BROKEN, NO_GZIP = "what is no gzip", Response(b"plain", headers={"content-encoding": "gzip"})


@pytest.mark.parametrize("path", ["/cluster", "/history", "/runs/12/commits"])
@pytest.mark.parametrize("name", STRANGERS)
def test_stranger_at_the_address_is_called_one(name: str, path: str, stranger: Stranger, settings: Settings) -> None:
    """Another program has the port: the sentence says at which address, and tells of the other replica, too."""
    stranger.answer = STRANGERS[name]
    foreign, down = settings.replica(0), settings.replica(2)

    with pytest.raises(CoordinationError) as caught:
        Operator(replace(settings, replicas=(foreign, down))).get(path)

    sentence = f"what answers at {foreign.api} is no replica of flwr_ha; replica 2 at {down.api}: "
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", [*STRANGERS, BROKEN])
def test_next_replica_is_asked_where_a_stranger_answers(
    name: str, stranger: Stranger, up: ReplicaSettings, settings: Settings
) -> None:
    """Any replica that answers will do, as where the first one is down."""
    stranger.answer = STRANGERS.get(name, NO_GZIP)
    operator = Operator(settings)

    assert operator.get("/cluster") == CLUSTER
    assert operator.get("/history") == [CHANGE]
    assert operator.get("/runs/12/commits") == [COMMIT]


def test_change_is_asked_of_the_next_replica_where_a_stranger_answers(
    stranger: Stranger, up: ReplicaSettings, settings: Settings
) -> None:
    """A program that answers everything with a page has not paused anything."""
    stranger.answer = STRANGERS["a page"]

    assert Operator(settings).post("/pause", {}) == {}


def test_words_of_a_replica_reach_the_operator(up: ReplicaSettings, settings: Settings) -> None:
    """What a replica refuses is no stranger's answer."""
    operator = Operator(replace(settings, replicas=(up,)))

    with pytest.raises(RequestRefusedError, match="replica 1 is not a healthy standby"):
        operator.post("/switchover", {"candidate": 1})
    with pytest.raises(RequestRefusedError, match="run 13 has no committed round here"):
        operator.get("/runs/13/commits")
    with pytest.raises(CoordinationError, match="the coordinator does not answer: no quorum"):
        operator.post("/resume", {})


def test_wrong_secret_is_a_wrong_setting(up: ReplicaSettings, settings: Settings, tmp_path: Path) -> None:
    """The replica's 401 names the setting that is to be changed."""
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("the secret of another cluster")

    with pytest.raises(ConfigError, match="secret-file does not hold the secret of this cluster"):
        Operator(replace(settings, replicas=(up,), secret_file=secret)).post("/pause", {})
