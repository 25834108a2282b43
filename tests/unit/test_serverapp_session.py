"""The sessions: what is retried, what ends the training, and what a local folder keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError, FencedError
from flwr_ha.model import Head, Position, RunState, RunStatus
from flwr_ha.serverapp.local_session import LocalSession
from flwr_ha.serverapp.replica_session import ReplicaSession
from flwr_ha.serverapp.session import NullSession, open_session
from flwr_ha.settings import SessionSettings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save

RUN = "17"


def checkpoint(server_round: int, *, num_rounds: int = 3, run_id: str = RUN) -> Checkpoint:
    rng = np.random.default_rng(server_round)
    return Checkpoint(
        run_id=run_id,
        server_round=server_round,
        num_rounds=num_rounds,
        arrays={"big": rng.normal(size=100_000), "small": np.arange(3)},
        strategy_arrays={},
        state={"n": server_round},
        history={},
    )


class Agent:
    """Answers as a leader's replica does; `script` holds answers that come first, by path ending."""

    def __init__(self, root: Path) -> None:
        self.store = BlobStore(root / "leader")
        self.peer = BlobStore(root / "peer")
        self.head: dict | None = None
        self.previous: dict | None = None
        self.script: dict[str, list[httpx.Response | Exception]] = {}
        self.calls: list[tuple[str, dict | None]] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        path = request.url.path
        self.calls.append((path, body))
        for ending, answers in self.script.items():
            if path.endswith(ending) and answers:
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer
        if request.headers["authorization"] != "Bearer token":
            return httpx.Response(401, json={"detail": "wrong token"})
        return self.answer(path, body)

    def answer(self, path: str, body: dict | None) -> httpx.Response:
        if path == f"/session/runs/{RUN}":
            blobs = str(self.store.root)
            return httpx.Response(
                200,
                json={"term": 2, "replica": 1, "blobs": blobs, "head": self.head, "previous": self.previous},
            )
        if path.endswith("/commit"):
            position = Position(2, body["server_round"], body["digest"])
            head = Head(
                run_id=RUN,
                app=body["app"],
                num_rounds=body["num_rounds"],
                position=position,
                model_digest=body["model_digest"],
                size_bytes=body["bytes"],
                copies=(0, 1, 2),
                metrics=body["metrics"],
            )
            self.head = head.to_json()
            return httpx.Response(200, json=self.head)
        if path.endswith("/repair"):
            digest = path.split("/")[3]
            if not self.peer.has(digest):
                return httpx.Response(404, json={"detail": f"no peer has {digest}"})
            self.store.put_known(digest, [self.peer.read(digest)])
            return httpx.Response(200)
        return httpx.Response(204)

    def session(self, *, token: str = "token") -> ReplicaSession:
        return ReplicaSession(
            SessionSettings("http://127.0.0.1:1", token),
            run_id=RUN,
            app="p/a",
            sleep=self.slept.append,
            transport=httpx.MockTransport(self),
        )

    def bodies(self, ending: str) -> list[dict | None]:
        return [body for path, body in self.calls if path.endswith(ending)]


@pytest.fixture
def agent(tmp_path):
    return Agent(tmp_path)


@pytest.fixture
def session(agent):
    session = agent.session()
    yield session
    session.close()


def unavailable(detail: str) -> httpx.Response:
    return httpx.Response(503, json={"detail": detail, "kind": "majority"})


def status(reason: str, state: RunState = RunState.TRAINING) -> RunStatus:
    return RunStatus(run_id=RUN, app="p/a", state=state, reason=reason, num_rounds=3, nodes_online=2, min_nodes=2)


def test_what_is_committed_is_read_back(agent, session):
    """The blobs lie in the replica's own folder, the digest is what the agent was told."""
    assert session.head() is None
    head = session.commit(checkpoint(1), {"loss": 0.5})
    assert (head.position.server_round, head.copies, head.metrics) == (1, (0, 1, 2), {"loss": 0.5})
    assert session.head() == head
    found = session.load(head)
    assert found.state == {"n": 1}
    np.testing.assert_array_equal(found.arrays["big"], checkpoint(1).arrays["big"])
    (body,) = agent.bodies("/commit")
    assert agent.store.has(body["digest"])
    assert all(agent.store.has(part) for part in body["parts"])
    assert body["parts"]
    assert body["bytes"] > 800_000
    assert set(body) == {"server_round", "digest", "parts", "model_digest", "bytes", "num_rounds", "app", "metrics"}


def test_a_commit_is_repeated_until_it_is_answered(agent, session):
    """No majority, no answer, a server error: all of them pass; the status says what it waits for."""
    session.head()
    session.report(status("2 of 2 replies"))
    agent.script["/commit"] = [
        unavailable("1 of 2 replicas hold the checkpoint"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.Response(500),
    ]
    assert session.commit(checkpoint(1), {}).position.server_round == 1
    assert len(agent.bodies("/commit")) == 5
    assert agent.slept == [0.1, 0.2, 0.4, 0.8]
    assert agent.bodies("/status")[-1]["state"] == "waiting"
    assert "committing round 1: " in agent.bodies("/status")[-1]["reason"]
    assert agent.bodies("/status")[1]["nodes_online"] == 2


@pytest.mark.parametrize("code", [401, 409])
@pytest.mark.parametrize("where", ["/17", "/commit", "/status", "/events"])
def test_a_fenced_session_never_retries(agent, session, where, code):
    """Whatever call learns of the newer term, it ends the training."""
    session.head()
    agent.script[where] = [httpx.Response(code, json={"detail": "term 2 is fenced off by term 3"})]
    with pytest.raises(FencedError, match="term 2 is fenced off by term 3"):
        for call in (
            session.head,
            lambda: session.report(status("1 of 2 replies")),
            lambda: session.record("reply-rejected", "node 3: NaN"),
            lambda: session.commit(checkpoint(1), {}),
        ):
            call()
    assert agent.slept == []


def test_a_refused_commit_is_an_error(agent, session):
    """A request that is wrong stays wrong."""
    session.head()
    agent.script["/commit"] = [httpx.Response(422, json={"detail": "round 1 is not the next one"})]
    with pytest.raises(CheckpointError, match="committing round 1: round 1 is not the next one"):
        session.commit(checkpoint(1), {})


def test_a_checkpoint_that_went_bad_before_its_commit_is_written_again(agent, session):
    """The round is still in memory: a bad disk must not make the run fail."""
    session.head()
    bad = {"detail": "the bytes have changed", "kind": "corrupt"}
    agent.script["/commit"] = [httpx.Response(422, json=bad)]
    reply = agent.answer

    def answer(path, body):
        if path.endswith("/commit"):
            assert all(agent.store.is_good(digest) for digest in (body["digest"], *body["parts"]))
        return reply(path, body)

    agent.answer = answer
    agent.store.path(save(checkpoint(1), agent.store).digest).unlink()

    assert session.commit(checkpoint(1), {}).position.server_round == 1
    assert len([path for path, _ in agent.calls if path.endswith("/commit")]) == 2


def test_a_full_disk_is_waited_for(agent, session, monkeypatch):
    """The round is still in memory; somebody can make room."""
    session.head()
    failures = [OSError(28, "no space left"), OSError(28, "no space left")]
    from flwr_ha.storage import checkpoint as module

    def flaky(*args, **options):
        if failures:
            raise CheckpointError("no space left") from failures.pop()
        return save(*args, **options)

    monkeypatch.setattr(module, "save", flaky)
    assert session.commit(checkpoint(1), {}).position.server_round == 1
    assert agent.bodies("/status")[0]["reason"] == "the checkpoint of round 1 cannot be written: no space left"


def test_what_can_never_be_written_ends_the_training(agent, session):
    """The app's author must change it; nobody could make it pass by waiting."""
    with pytest.raises(CheckpointError, match="not JSON"):
        session.commit(replace(checkpoint(1), history={"accuracy": object()}), {})


def test_big_parts_are_offered_before_the_commit(agent, session):
    """Copies of parts begin while others are written; small parts are not worth a request each."""
    arrays = {f"small {i}": np.full(100_000, i + 1.0) for i in range(12)}
    big = replace(checkpoint(1), arrays={**arrays, "big": np.zeros(1 << 20), "last": np.zeros(100_000)})

    session.commit(big, {})

    paths = [path for path, _ in agent.calls]
    offers = [offer["digests"] for offer in agent.bodies("/offer")]
    (commit,) = agent.bodies("/commit")
    assert paths.index(f"/session/runs/{RUN}/offer") < paths.index(f"/session/runs/{RUN}/commit")
    told = [digest for digests in offers for digest in digests]
    assert len(told) == len(set(told))
    assert set(told) <= set(commit["parts"])
    assert len(offers) in (2, 3)
    assert all(sum(map(agent.store.size, digests)) >= 4 << 20 for digests in offers)


@pytest.mark.parametrize("damage", ["flip", "delete"])
@pytest.mark.parametrize("which", ["main", "part"])
def test_a_bad_local_copy_is_replaced_by_a_peers(agent, session, which, damage):
    """The main blob or a part, changed or missing: a good copy is fetched, once."""
    session.head()
    head = session.commit(checkpoint(1), {})
    (body,) = agent.bodies("/commit")
    for digest in (body["digest"], *body["parts"]):
        agent.peer.put(agent.store.read(digest))
    bad = body["digest"] if which == "main" else body["parts"][0]
    spoil(agent.store.path(bad), damage)
    later = agent.session()
    found = later.load(later.head())
    later.close()
    np.testing.assert_array_equal(found.arrays["big"], checkpoint(1).arrays["big"])
    assert len(agent.bodies("/repair")) == 1
    assert head.position.digest == body["digest"]


def spoil(path: Path, damage: str) -> None:
    if damage == "delete":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_without_any_good_copy_the_previous_checkpoint_is_named(agent, session):
    """The error tells a person where to go on."""
    session.head()
    first = session.commit(checkpoint(1), {})
    second = session.commit(checkpoint(2), {})
    agent.previous = first.to_json()
    spoil(agent.store.path(second.position.digest), "flip")
    later = agent.session()
    with pytest.raises(CheckpointError, match=f"round 2 has no good copy: .*round 1, {first.position.digest}"):
        later.load(later.head())
    later.close()


def test_statuses_are_few_and_lost_ones_do_not_matter(agent, session, monkeypatch):
    """The same status is sent once, news of the same state a few times a second; an error is no harm."""
    now = [100.0]
    monkeypatch.setattr("flwr_ha.serverapp.replica_session.time.monotonic", lambda: now[0])
    for reason in ("0 of 2 replies", "0 of 2 replies", "1 of 2 replies"):
        session.report(status(reason))
    session.report(status("1 of 2 nodes online", RunState.WAITING))
    now[0] += 1
    agent.script["/status"] = [httpx.ConnectError("refused")]
    session.report(status("2 of 2 nodes online", RunState.WAITING))
    assert [body["reason"] for body in agent.bodies("/status")] == [
        "0 of 2 replies",
        "1 of 2 nodes online",
        "2 of 2 nodes online",
    ]


def test_events_carry_their_fields(agent, session):
    """The event log can be searched for a node."""
    session.record("reply-rejected", "node 3: NaN", node="3", server_round=2)
    assert agent.bodies("/events") == [
        {"kind": "reply-rejected", "message": "node 3: NaN", "node": "3", "server_round": 2}
    ]


def test_a_replica_comes_before_a_folder_and_both_before_nothing(tmp_path, monkeypatch):
    """The environment decides; the same ServerApp runs everywhere."""
    monkeypatch.delenv("FLWR_HA_SESSION", raising=False)
    plain = open_session(run_id=RUN, app="p/a", name="FedAvg", checkpoint_dir=None)
    local = open_session(run_id=RUN, app="p/a", name="FedAvg", checkpoint_dir=tmp_path)
    monkeypatch.setenv("FLWR_HA_SESSION", "http://127.0.0.1:1")
    monkeypatch.setenv("FLWR_HA_TOKEN", "token")
    replica = open_session(run_id=RUN, app="p/a", name="FedAvg", checkpoint_dir=tmp_path)
    assert [type(session) for session in (plain, local, replica)] == [NullSession, LocalSession, ReplicaSession]
    for session in (plain, local, replica):
        session.close()


def life(folder: Path, *, run_id: str, name: str = "FedAvg") -> LocalSession:
    return LocalSession(folder, run_id=run_id, app="p/a", name=name)


def test_a_local_folder_goes_on_where_the_last_process_stopped(tmp_path):
    """The new process takes over the run id, so sampling stays the same; the term counts its lives."""
    first = life(tmp_path, run_id="1")
    assert first.head() is None
    for server_round in (0, 1):
        first.commit(checkpoint(server_round, run_id="1"), {})
    first.close()
    second = life(tmp_path, run_id="2")
    head = second.head()
    assert (head.run_id, second.run_id, head.position.server_round, head.position.term) == ("1", "1", 1, 1)
    assert second.load(head).state == {"n": 1}
    assert second.commit(checkpoint(2, run_id="1"), {}).position.term == 2
    second.close()


def test_a_local_folder_keeps_three_checkpoints(tmp_path):
    """Older ones, and their parts, are removed."""
    session = life(tmp_path, run_id="1")
    session.head()
    for server_round in range(6):
        session.commit(checkpoint(server_round, num_rounds=9), {})
    store = BlobStore(tmp_path / "p-a" / "FedAvg" / "store")
    assert len(store.digests()) == 6  # three main blobs, three parts
    session.close()


def test_a_finished_local_training_starts_anew(tmp_path):
    """Its checkpoints stay until the new one commits."""
    session = life(tmp_path, run_id="1")
    session.head()
    session.commit(checkpoint(3), {})
    session.close()
    again = life(tmp_path, run_id="2")
    assert again.head() is None
    assert again.run_id == "2"
    again.commit(checkpoint(0, run_id="2"), {})
    again.close()
    third = life(tmp_path, run_id="3")
    assert third.head().position.server_round == 0
    third.close()


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    """They would overwrite each other's rounds; other names and other apps are free."""
    one = life(tmp_path, run_id="1")
    other = life(tmp_path, run_id="1", name="FedAdam")
    with pytest.raises(ConfigError, match="another process trains into checkpoint_dir"):
        life(tmp_path, run_id="2")
    one.close()
    other.close()
    life(tmp_path, run_id="2").close()


def test_a_corrupt_local_checkpoint_names_the_one_before(tmp_path):
    """There is no peer; a person decides."""
    session = life(tmp_path, run_id="1")
    session.head()
    heads = [session.commit(checkpoint(server_round), {}) for server_round in (0, 1)]
    session.close()
    store = BlobStore(tmp_path / "p-a" / "FedAvg" / "store")
    spoil(store.path(heads[1].position.digest), "flip")
    later = life(tmp_path, run_id="2")
    with pytest.raises(CheckpointError, match=f"previous kept checkpoint is round 0, {heads[0].position.digest}"):
        later.load(later.head())
    later.close()


def test_an_unreadable_file_of_heads_is_named(tmp_path):
    """Starting anew by itself would throw rounds away."""
    session = life(tmp_path, run_id="1")
    (tmp_path / "p-a" / "FedAvg" / "heads.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointCorruptError, match=r"heads.json cannot be read .* remove it to start anew"):
        session.head()
    session.close()


def test_a_crash_between_blob_and_head_loses_only_that_round(tmp_path, monkeypatch):
    """The file of heads is replaced as a whole."""
    session = life(tmp_path, run_id="1")
    session.head()
    session.commit(checkpoint(0), {})

    def crash(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flwr_ha.serverapp.local_session.write_all", crash)
        with pytest.raises(CheckpointError, match=r"heads.json cannot be written: No space left"):
            session.commit(checkpoint(1), {})
    session.close()
    later = life(tmp_path, run_id="2")
    assert later.load(later.head()).server_round == 0
    later.close()
