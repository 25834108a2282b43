"""The REST API of a replica over a fake replica: a real server on a real port."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from flwr_ha.errors import CoordinationError
from flwr_ha.model import Head, LeadershipChange, Position
from flwr_ha.replica.api import RefusedError, create_api
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.replica.dashboard import page_routes
from flwr_ha.replica.headers import BrowserHeaders
from flwr_ha.replica.metrics import Gauges, PrometheusMeter
from flwr_ha.settings import Endpoint, TlsSettings
from flwr_ha.storage.blobs import BlobStore

SECRET = "a-secret"
PEER = "http://127.0.0.1:8011"
BEARER = {"Authorization": f"Bearer {SECRET}"}
DIGEST = "sha256:" + "ab" * 32
MAX_ANSWER_BYTES = 1 << 20
AS_DESCRIBED = [status_code_conformance, content_type_conformance, response_schema_conformance]
FUZZ = settings(
    max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class FakeReplica:
    """A replica whose coordinator can be frozen."""

    def __init__(self) -> None:
        self.thaw = threading.Event()
        self.thaw.set()
        self.meter: PrometheusMeter | None = PrometheusMeter()
        self.asked: list[Any] = []

    def is_leader(self) -> bool:
        return False

    def is_standby(self) -> bool:
        return True

    def lag_rounds(self) -> int:
        return 2

    def why_not_alive(self) -> str:
        return ""

    def why_not_ready(self) -> str:
        return "the coordinator does not answer"

    def cluster(self) -> dict[str, Any]:
        replica = {"id": 0, "role": "standby", "state": "running", "address": "h:1", "api": "h:2", "lag_rounds": None}
        checkpoint = {"server_round": 1, "term": 1, "digest": DIGEST, "model_digest": DIGEST, "bytes": 9, "copies": [0]}
        run = {"run_id": "7", "app": "a/b", "state": "waiting", "reason": "", "server_round": 1, "num_rounds": 2}
        run |= {"nodes_online": 0, "min_nodes": 5, "checkpoint": checkpoint | {"committed_at": ""}}
        run |= {"metrics": {"1": {"loss": 0.5, "per_class": [1, 2.5]}}}
        return {"cluster": "c", "term": 1, "leader": None, "paused": False, "replicas": [replica], "runs": [run]}

    def commits(self, run_id: str) -> list[dict[str, Any]] | None:
        head = Head(run_id="7", app="a/b", num_rounds=2, position=Position(1, 1, DIGEST), model_digest="", size_bytes=9)
        return [head.to_json()] if len(run_id) % 2 else None

    def history(self) -> list[dict[str, Any]]:
        return [LeadershipChange(term=1, leader=0, at="2026-11-24T03:00:00Z", reason="first").to_json()]

    def events_after(self, number: int) -> list[dict[str, Any]]:
        event = {"number": 1, "at": "", "replica": 0, "kind": "role", "message": "m", "term": 1}
        return [event] if number < 1 else []

    def metrics(self) -> bytes | None:
        return None if self.meter is None else self.meter.text(Gauges(cluster="c"))

    def ask_switchover(self, candidate: int | None) -> None:
        self._wait()
        if candidate != 1 and candidate is not None:
            raise RefusedError(f"replica {candidate} is not a healthy standby")
        self.asked.append(candidate)

    def set_paused(self, is_paused: bool) -> None:
        self._wait()
        self.asked.append(is_paused)

    def _wait(self) -> None:
        if not self.thaw.wait(20.0):
            raise CoordinationError("no answer")


@pytest.fixture
def replica() -> FakeReplica:
    return FakeReplica()


@pytest.fixture
def url(replica: FakeReplica, tmp_path: Path) -> Iterator[str]:
    """Serve the whole API as `run_replica` puts it together."""
    blobs, upgrades = blob_api(BlobStore(tmp_path), secret=SECRET, max_bytes=10**6)
    with ApiServer(Endpoint("127.0.0.1", 0), tls=TlsSettings()) as server:
        api = create_api(replica, secret=SECRET, routes=[*blobs, *page_routes()])
        server.start(BrowserHeaders(api, [PEER]), upgrades=upgrades)
        yield f"http://127.0.0.1:{server.port}"
        replica.thaw.set()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=10.0) as client:
        yield client


def test_every_answer_is_as_the_openapi_document_says(url: str) -> None:
    """Random requests to each operation: no server error, no status, type or body that is not described."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tried = set()

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(FUZZ)
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            for headers in ({}, BEARER):
                answer = case.call(headers=headers, timeout=10.0)
                case.validate_response(answer, checks=AS_DESCRIBED)
                assert answer.status_code != 500
                assert "Traceback" not in answer.text
                assert len(answer.content) < MAX_ANSWER_BYTES

        check()
        tried.add(operation.label)

    assert {"GET /cluster", "POST /switchover", "GET /blobs"} <= tried


def test_the_document_names_every_route_and_nothing_else(
    replica: FakeReplica, tmp_path: Path, client: httpx.Client
) -> None:
    """What is served and what is described are the same, but for the files that the pages load."""
    blobs, _ = blob_api(BlobStore(tmp_path / "other"), secret=SECRET, max_bytes=1)
    app = create_api(replica, secret=SECRET, routes=[*blobs, *page_routes()])
    served = {(route.path, method) for route in app.routes for method in route.methods or ()}
    served = {(path, method) for path, method in served if not path.startswith("/static/")}
    served -= {(path, "HEAD") for path, _ in served if not path.startswith("/blobs/")}  # comes with each GET

    paths = client.get("/openapi.json").json()["paths"]
    described = {(path, method.upper()) for path, item in paths.items() for method in item if method != "parameters"}

    assert served == described


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/cluster/", 404),
        ("POST", "/cluster", 405),
        ("OPTIONS", "/pause", 405),
        ("POST", "/pause", 401),
        ("GET", "/events?after=-1", 400),
        ("GET", "/events?after=1e3", 400),
        ("GET", "/replica?lag=two", 400),
        ("GET", "/blobs/%2e%2e%2fetc", 404),
        ("GET", f"/blobs/{DIGEST}", 401),
        ("GET", "/static/%2e%2e/api.py", 404),
    ],
)
def test_errors_are_json(client: httpx.Client, method: str, path: str, status: int) -> None:
    """Whatever is wrong, the answer is an object with a sentence."""
    answer = client.request(method, path)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 202),
        (b'{"candidate": 1}', 202),
        (b'{"candidate": 2}', 409),
        (b'{"candidate": true}', 400),
        (b'{"candidate": "1"}', 400),
        (b"[1]", 400),
        (b"{", 400),
        (b"[" * 60_000, 400),
        (b'{"candidate": ' + b"9" * 5000 + b"}", 400),
        (b" " * 70_000, 413),
    ],
)
def test_a_switchover_takes_a_candidate_or_nothing(client: httpx.Client, body: bytes, status: int) -> None:
    """409 is kept for a replica that cannot take over; what is no request at all is 400."""
    assert client.post("/switchover", content=body, headers=BEARER).status_code == status


def test_no_call_waits_for_a_frozen_coordinator(client: httpx.Client, replica: FakeReplica) -> None:
    """Reading goes on at once and changing gives up before 2 s, even when many operators try."""
    replica.thaw.clear()

    def pause() -> None:
        httpx.post(f"{client.base_url}/pause", headers=BEARER, timeout=30.0, trust_env=False)

    operators = [threading.Thread(target=pause) for _ in range(20)]
    for thread in operators:
        thread.start()
    try:
        start_s = time.monotonic()
        answer = client.post("/resume", headers=BEARER)
        took_s = time.monotonic() - start_s
        reads = [_timed(client, path) for path in ("/cluster", "/history", "/events", "/leader", "/metrics", "/")]
    finally:
        replica.thaw.set()
        for thread in operators:
            thread.join()

    assert answer.status_code == 503
    assert "GET /cluster shows it" in answer.json()["detail"]
    assert took_s < 4.0  # 1.8 s, with slack for a busy machine; the coordinator hangs for 20 s
    assert max(reads) < 2.0


def _timed(client: httpx.Client, path: str) -> float:
    start_s = time.monotonic()
    client.get(path)
    return time.monotonic() - start_s


def test_metrics_without_their_library_name_the_extra(client: httpx.Client, replica: FakeReplica) -> None:
    """501, and what to install."""
    replica.meter = None

    answer = client.get("/metrics")

    assert answer.status_code == 501
    assert "flwr-ha[metrics]" in answer.json()["detail"]


def test_only_pages_of_the_cluster_may_read_across_origins(client: httpx.Client) -> None:
    """A page of a peer gets the header that lets it read, any other page does not."""
    own = client.get("/cluster", headers={"Origin": PEER})
    foreign = client.get("/cluster", headers={"Origin": "http://evil.example"})

    assert own.headers["access-control-allow-origin"] == PEER
    assert "access-control-allow-origin" not in foreign.headers
    assert foreign.headers["vary"] == "Origin"


def test_pages_load_nothing_from_other_hosts(client: httpx.Client) -> None:
    """The policy forbids it, and no file names another host but in comments and licences."""
    page = client.get("/")

    policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["style-src"] == "'self'"
    assert policy["connect-src"] == f"'self' {PEER}"
    for path in ("/", "/docs", "/static/dashboard.js", "/static/dashboard.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
        assert " style=" not in answer.text  # the policy would drop it
        assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_the_chart_library_comes_with_its_licence(client: httpx.Client) -> None:
    """The licence of uPlot is MIT: its text must travel with it."""
    assert "The MIT License" in client.get("/static/uplot-LICENSE.txt").text
    assert client.get("/static/uplot.js").headers["content-type"].startswith("text/javascript")


def test_the_document_is_json_that_says_its_version(client: httpx.Client) -> None:
    """Generators of clients start from it."""
    document = json.loads(client.get("/openapi.json").text)

    assert document["openapi"] == "3.1.0"
    assert document["components"]["securitySchemes"]["secret"]["scheme"] == "bearer"
