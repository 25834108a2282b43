"""What is special to the embedded store: it needs no server, and outlives all of its processes."""

import sqlite3
from contextlib import closing

import pytest

from flwr_ha.coordination.embedded import EmbeddedStore
from flwr_ha.coordination.protocol import Create, Versioned
from flwr_ha.errors import CoordinationError


@pytest.fixture
def open_store(tmp_path):
    """Return a function that opens a store in one folder; all are closed at the end."""
    stores = []

    def open_one(on_change=lambda: None):
        store = EmbeddedStore(tmp_path / "coordinator", session_timeout_s=1.0)
        store.start(on_change, timeout_s=5)
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


def test_entries_outlive_all_processes(open_store):
    """All stores are closed, and opened again: what lasts is there, what is ephemeral is not."""
    store = open_store()
    store.transact([Create("a/lasting", b"x"), Create("a/ephemeral", b"", is_ephemeral=True)])
    store.close()

    assert open_store().children("a") == ("lasting",)


def test_a_session_of_an_earlier_start_of_the_machine_is_dead(open_store, tmp_path):
    """Its lease is counted on a clock that began anew, so the lease alone would say nothing."""
    owner, other = open_store(), open_store()
    owner.transact([Create("here", b"", is_ephemeral=True)])
    with closing(sqlite3.connect(tmp_path / "coordinator" / "coordinator.db", timeout=5)) as database, database:
        database.execute("UPDATE sessions SET boot = 'earlier' WHERE id = ?", (owner._session,))

    assert other.get("here") is None


def test_a_lock_file_goes_with_its_session(open_store, tmp_path):
    """No garbage is left in the folder."""
    for _ in range(3):
        open_store().close()

    assert not list((tmp_path / "coordinator").glob("*.lock"))


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    """The user sees which one."""
    (tmp_path / "file").write_text("")
    store = EmbeddedStore(tmp_path / "file" / "below", session_timeout_s=1.0)

    with pytest.raises(CoordinationError, match="file/below"):
        store.start(lambda: None, timeout_s=1)


def test_a_broken_database_is_an_error_with_its_folder(tmp_path):
    """No traceback of SQLite's for the user."""
    (tmp_path / "coordinator.db").write_bytes(b"not a database" * 1000)
    store = EmbeddedStore(tmp_path, session_timeout_s=1.0)

    with pytest.raises(CoordinationError, match="not a database"):
        store.start(lambda: None, timeout_s=1)


def test_a_store_that_was_not_started_refuses_calls(tmp_path):
    """And may be closed."""
    store = EmbeddedStore(tmp_path, session_timeout_s=1.0)

    with pytest.raises(CoordinationError):
        store.get("a")
    store.close()


def test_data_may_be_any_bytes(open_store):
    """Zero bytes and non-text as well."""
    store = open_store()

    store.transact([Create("a", b"\x00\xff" * 100)])

    assert open_store().get("a") == Versioned(b"\x00\xff" * 100, 0)


def test_a_system_without_files_to_open_is_a_coordinator_that_does_not_answer(open_store, monkeypatch):
    """The caller tries again later; an OSError would end its thread."""
    store = open_store()

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store, "_dead_sessions", fail)
    with pytest.raises(CoordinationError, match="Too many open files"):
        store.get("here")
