"""The control plane on databases that Flower's own code writes and reads."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.superlink import gate, linkstate, schema
from flwr_ha.superlink.linkstate import TaskState
from flwr_ha.superlink.taskwait import PendingTasks
from tests.integration.flowerserver import add_run, task_of

with warnings.catch_warnings():  # raised by the libraries that Flower imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from fastapi import FastAPI
    from fastapi.routing import iter_route_contexts
    from flwr.supercore.routers.runtime import create_runtime_router, responses_router
    from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
    from flwr.superlink.routers.control import router as control_router
    from flwr.superlink.routers.fleet.router import router as fleet_router

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own migrations


class Site:
    """One SuperLink's database with Flower's own state object on it, and a blob store."""

    def __init__(self, folder: Path, blobs: dict[str, bytes]) -> None:
        folder.mkdir()
        self.database = folder / "superlink.db"
        self.blobs = blobs
        manager = get_federation_manager(is_simulation=False)
        self.state: Any = get_objectstore_linkstate_factories(str(self.database), manager)[1].state()

    def put(self, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def export(self, **options: Any) -> linkstate.ControlPlane:
        return linkstate.export(self.database, self.put, **options)

    def restore(self, plane: linkstate.ControlPlane, *, now_s: float | None = None) -> None:
        now_s = time.time() if now_s is None else now_s
        linkstate.restore(self.database, plane.snapshot, self.blobs.__getitem__, now_s=now_s)

    def rows(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query).fetchall()

    def add_node(self, key: bytes) -> int:
        node_id = int(self.state.create_node("aid", "name", key, 30.0))
        assert self.state.activate_node(node_id, 30.0)
        return node_id

    def add_run(self, content: bytes = b"app" * 5000) -> int:
        return add_run(self.state, content)

    def task_of(self, run_id: int) -> int:
        return task_of(self.state, run_id)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Give two replicas' databases that share a blob store."""
    blobs: dict[str, bytes] = {}
    pair = Site(tmp_path / "old", blobs), Site(tmp_path / "new", blobs)
    yield pair
    for site in pair:
        site.state._engine.dispose()


def test_installed_flower_is_known() -> None:
    """The version and the schema that we were tested with are the installed ones."""
    linkstate.check_flower()
    assert schema.installed_revision() in schema.KNOWN_SCHEMAS


def test_fresh_database_has_the_known_schema(sites: tuple[Site, Site]) -> None:
    """Flower's migrations end at the tables and columns that we know."""
    with closing(sqlite3.connect(sites[0].database)) as connection:
        assert schema.check_schema(connection)[0] in schema.KNOWN_SCHEMAS


def test_waiting_task_is_seen(sites: tuple[Site, Site]) -> None:
    """SuperExec is answered then, and not asked for as long as there is none."""
    site = sites[0]
    has_task = PendingTasks(site.database)
    assert not has_task()
    task_id = site.task_of(site.add_run())
    assert has_task()
    assert site.state.claim_task(task_id)
    assert not has_task()
    second = site.add_run(b"another app")
    assert has_task()
    assert linkstate.stop_run(site.database, str(second), reason="a test")
    assert not has_task()


def test_unknown_schema_is_refused_both_ways(sites: tuple[Site, Site]) -> None:
    """A column more in a table that we carry: nothing is read or written before somebody has looked at it."""
    old, new = sites
    plane = old.export()
    for site in sites:
        with closing(sqlite3.connect(site.database)) as connection, connection:
            connection.execute("ALTER TABLE task ADD COLUMN novelty VARCHAR")

    with pytest.raises(ConfigError, match="unknown schema"):
        old.export()
    with pytest.raises(ConfigError, match="unknown schema"):
        new.restore(plane)


def test_snapshot_of_another_schema_is_refused(sites: tuple[Site, Site]) -> None:
    """Replicas with different versions of Flower do not take each other's control plane."""
    value = json.loads(sites[0].export().snapshot)
    value["schema"] = {"revision": "0123456789ab", "columns": "sha256:0"}
    foreign = linkstate.ControlPlane(snapshot=json.dumps(value).encode(), blobs=())

    with pytest.raises(ConfigError, match="same versions"):
        sites[1].restore(foreign)


def test_snapshot_of_another_release_with_the_same_tables_is_taken(sites: tuple[Site, Site]) -> None:
    """A new table or column that is not carried over does not keep a cluster from being upgraded."""
    run_id = sites[0].add_run()
    value = json.loads(sites[0].export().snapshot)
    value["schema"]["revision"] = "0123456789ab"

    sites[1].restore(linkstate.ControlPlane(snapshot=json.dumps(value).encode(), blobs=()))

    assert [run.run_id for run in sites[1].state.get_run_info(run_ids=[run_id])] == [run_id]


def test_flower_finds_the_nodes_and_runs_that_were_carried_over(sites: tuple[Site, Site]) -> None:
    """Flower's own state object at the next leader knows the node, the run, its app, and hands its task out."""
    old, new = sites
    node_id, run_id = old.add_node(b"key"), old.add_run()
    token = old.state.claim_task(old.task_of(run_id))
    assert token and old.state.activate_task(old.task_of(run_id))

    new.restore(old.export())

    assert new.state.get_nodes(run_id) == {node_id}
    assert new.state.get_node_id_by_public_key(b"key") == node_id
    run = new.state.get_run_info(run_ids=[run_id])[0]
    assert (run.fab_id, run.fab_version) == ("me/app", "1.0.0")
    assert new.state.get_fab(run.fab_hash).content == b"app" * 5000
    assert [task.task_id for task in new.state.get_tasks(statuses=["pending"])] == [run.primary_task_id]
    assert new.state.get_task_by_token(token) is None  # an orphaned ServerApp of the old leader has no say
    assert new.state.claim_task(run.primary_task_id)


def test_finished_run_stays_finished(sites: tuple[Site, Site]) -> None:
    """What has ended is not started again, and keeps its result and its traffic."""
    old, new = sites
    run_id = old.add_run()
    task_id = old.task_of(run_id)
    assert old.state.claim_task(task_id) and old.state.activate_task(task_id)
    old.state.store_traffic(run_id, bytes_sent=7, bytes_recv=5)
    assert old.state.finish_task(task_id, "completed", "")

    new.restore(old.export())

    assert linkstate.summary(new.database).runs == linkstate.summary(old.database).runs
    assert linkstate.summary(new.database).runs[0].state is TaskState.FINISHED
    assert new.rows("SELECT bytes_sent, bytes_recv FROM run") == [(7, 5)]
    assert not linkstate.requeue_task(new.database, str(task_id))


def test_equal_control_planes_give_equal_bytes(sites: tuple[Site, Site]) -> None:
    """Heartbeats, claims and traffic change nothing, and what was restored exports to the same picture."""
    old, new = sites
    nodes = [old.add_node(bytes([number])) for number in range(5)]
    run_id = old.add_run()
    plane = old.export()

    assert old.state.acknowledge_node_heartbeat(nodes[0], 30.0)
    assert old.state.claim_task(old.task_of(run_id)) and old.state.activate_task(old.task_of(run_id))
    assert old.state.acknowledge_task_heartbeat(old.task_of(run_id))
    old.state.store_traffic(run_id, bytes_sent=7, bytes_recv=5)
    assert old.export() == plane

    new.restore(plane)
    assert new.export() == plane
    assert linkstate.references(plane.snapshot) == plane.blobs
    assert len(plane.blobs) == 1

    assert old.state.deactivate_node(nodes[0])
    assert old.export() != plane


def test_restore_replaces_what_was_there(sites: tuple[Site, Site]) -> None:
    """A change that was never replicated is gone after the committed control plane is put back."""
    old, new = sites
    old.add_run()
    new.add_node(b"never replicated")
    new.add_run(b"other" * 3000)

    new.restore(old.export())

    assert new.export() == old.export()
    assert linkstate.summary(new.database).nodes_total == 0


def test_failed_restore_changes_nothing(sites: tuple[Site, Site]) -> None:
    """A blob that cannot be had leaves the database as it was."""
    old, new = sites
    old.add_run()
    new.add_node(b"key")
    before = new.export()
    plane = old.export()
    old.blobs.clear()

    with pytest.raises(KeyError):
        new.restore(plane)

    assert new.export() == before


def test_log_survives_up_to_the_mark(sites: tuple[Site, Site]) -> None:
    """Log lines up to the mark are carried, in chunks that never change once full, and Flower finds them."""
    old, new = sites
    task_id = old.task_of(old.add_run())
    for number in range(1203):
        old.state.add_task_log(task_id, f"line {number}")
    mark = linkstate.log_mark(old.database)
    plane = old.export(logs_until=mark)
    old.state.add_task_log(task_id, "a line after the mark")
    assert old.export(logs_until=mark) == plane
    longer = old.export(logs_until=mark + 1)
    assert len(set(longer.blobs) - set(plane.blobs)) == 1  # only the last, partly filled chunk is another one

    new.restore(plane)

    log, _ = new.state.get_task_log(task_id, None)
    assert log == "".join(f"line {number}" for number in range(1203))
    assert new.export(logs_until=mark) == plane


def test_apps_are_read_once(sites: tuple[Site, Site]) -> None:
    """With the digests remembered, an app is neither read nor stored again, and the picture is the same."""
    old, _ = sites
    old.add_run()
    known: dict[str, str] = {}
    first = old.export(known_fabs=known)
    old.blobs.clear()

    assert old.export(known_fabs=known) == first
    assert not old.blobs


def test_summary_follows_the_database(sites: tuple[Site, Site]) -> None:
    """Every step of a run and every node shows up in the next summary; ids are unsigned."""
    old, _ = sites
    with linkstate.Watch(old.database) as watch:
        assert watch.summary() == linkstate.Summary(nodes_online=0, nodes_total=0, runs=())
        node_id, run_id = old.add_node(b"key"), old.add_run()
        task_id = old.task_of(run_id)
        (run,) = watch.summary().runs
        assert (run.run_id, run.task_id, run.app) == (str(run_id), str(task_id), "me/app")
        assert (watch.summary().nodes_online, run.state) == (1, TaskState.PENDING)
        assert old.state.claim_task(task_id)
        assert watch.summary().runs[0].state is TaskState.STARTING
        assert old.state.activate_task(task_id) and old.state.deactivate_node(node_id)
        assert watch.summary().runs[0].state is TaskState.RUNNING
        assert (watch.summary().nodes_online, watch.summary().nodes_total) == (0, 1)
        assert old.state.stop_run(run_id)
        assert watch.summary().runs[0].state is TaskState.STOPPED


def test_killed_task_is_pending_again(sites: tuple[Site, Site]) -> None:
    """Requeueing makes Flower hand the task out again, and the dead ServerApp's token worthless."""
    old, _ = sites
    task_id = old.task_of(old.add_run())
    token = old.state.claim_task(task_id)
    assert old.state.activate_task(task_id)

    assert linkstate.requeue_task(old.database, str(task_id))

    assert old.state.get_task_by_token(token) is None
    assert old.state.claim_task(task_id)


def test_ten_thousand_nodes_are_restored_quickly(sites: tuple[Site, Site]) -> None:
    """A large federation does not make a failover slow."""
    old, new = sites
    with closing(sqlite3.connect(old.database)) as connection, connection:
        connection.executemany(
            "INSERT INTO node (node_id, owner_aid, status, registered_at, online_until, public_key) "
            "VALUES (?, 'aid', 'online', '2026-01-01', 1.0, ?)",
            ((number - 5000, number.to_bytes(91, "big")) for number in range(10_000)),
        )
    plane = old.export()

    started_s = time.monotonic()
    new.restore(plane, now_s=1e9)
    took_s = time.monotonic() - started_s

    assert took_s < 2.0
    assert linkstate.summary(new.database).nodes_total == 10_000
    assert new.rows("SELECT DISTINCT online_until FROM node") == [(1e9 + 60.0,)]


NOT_HELD = {
    "control": {
        *("list-runs", "list-run-series", "get-run-series", "list-run-series-events", "stream-logs"),
        *("stream-run-events", "pull-artifacts", "list-automations", "get-login-details", "get-auth-tokens"),
        *("refresh-auth-tokens", "list-connectors", "begin-connector-oauth", "list-nodes", "list-federations"),
        *("list-apps", "list-app-associations", "show-federation", "list-invitations"),
    },
    "fleet": {
        *("send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab", "push-object"),
        *("pull-object", "confirm-message-received"),
    },
    "runtime": {
        *("acquire-task", "send-task-heartbeat", "pull-task-input", "push-object", "pull-object"),
        *("confirm-message-received", "push-task-message", "push-task-events", "get-run-series-events"),
        *("get-compacted-contexts", "put-compacted-context", "pull-task-message", "record-task-usage"),
        *("get-connector", "push-logs", "push-messages", "pull-messages", "get-nodes", "responses"),
    },
}


def test_every_request_of_flower_is_either_held_or_known_not_to_matter() -> None:
    """A request that a new version of Flower brings must be looked at before it is let through unheld."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for router in (control_router, fleet_router, create_runtime_router("SuperLink"), responses_router):
        app.include_router(router)
    paths = {context.path for context in iter_route_contexts(app.routes)}
    not_held = {f"/v1/{api}/{name}" for api, names in NOT_HELD.items() for name in names}

    assert paths == gate.HELD | not_held
    assert not gate.HELD & not_held
    assert gate.ACQUIRE_TASK in paths


def test_takeover_is_told_in_the_log_of_unfinished_runs_only(sites: tuple[Site, Site]) -> None:
    """`flwr log` of a run that goes on says who took over; an ended run's log stays as it was."""
    old, new = sites
    going_on, ended = old.add_run(b"going on"), old.add_run(b"ended")
    assert old.state.finish_task(old.task_of(ended), "stopped", "by hand")
    plane = old.export()

    linkstate.restore(
        new.database,
        plane.snapshot,
        new.blobs.__getitem__,
        now_s=time.time(),
        note=lambda run_id: f"run {run_id} goes on",
    )

    assert new.state.get_task_log(new.task_of(going_on), None)[0] == f"INFO :      run {going_on} goes on\n"
    assert new.state.get_task_log(new.task_of(ended), None)[0] == ""


def test_failed_task_is_failed_for_flower(sites: tuple[Site, Site]) -> None:
    """A run that we give up is failed in Flower's eyes, with the reason and a time, and only once."""
    site = sites[0]
    run_id = site.add_run()
    task_id = site.task_of(run_id)

    assert linkstate.fail_task(site.database, str(task_id), reason="killed too often")
    assert not linkstate.fail_task(site.database, str(task_id), reason="again")

    status = site.state.get_run_info(run_ids=[run_id])[0].status
    assert (status.status, status.sub_status, status.details) == ("finished", "failed", "killed too often")
    assert site.state.get_run_info(run_ids=[run_id])[0].finished_at
    assert "killed too often" in site.state.get_task_log(task_id, None)[0]


def test_withdrawn_run_is_stopped_for_flower(sites: tuple[Site, Site]) -> None:
    """A run whose submission was not acknowledged ends in Flower's eyes; another one goes on."""
    site = sites[0]
    run_id, other = site.add_run(b"one"), site.add_run(b"other")

    assert linkstate.stop_run(site.database, str(run_id), reason="not safe")
    assert not linkstate.stop_run(site.database, str(run_id), reason="again")

    status = site.state.get_run_info(run_ids=[run_id])[0].status
    assert (status.status, status.sub_status, status.details) == ("finished", "stopped", "not safe")
    assert site.state.get_run_info(run_ids=[other])[0].status.status == "pending"
