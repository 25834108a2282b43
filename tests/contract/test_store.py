"""What every store must do."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from flwr_ha.coordination.protocol import Check, ConflictError, Create, Delete, Set, Versioned
from flwr_ha.errors import CoordinationError

# `lose_session` opens a second connection for a session, and ZooKeeper may give the first one the answers to both:
# kazoo's thread ends with an error then, and the store starts kazoo again.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception in thread .*zk_loop:pytest.PytestUnhandledThreadExceptionWarning"
)


def test_missing_keys_read_as_nothing(cluster):
    """Neither a value nor children are invented."""
    store = cluster.store()

    assert store.get("a") is None
    assert store.get("a/b") is None
    assert store.children("a") == ()


def test_versions_count_changes_from_zero(cluster):
    """Creating gives version 0, each Set one more, deleting and creating starts again."""
    store = cluster.store()
    store.transact([Create("a", b"0")])
    store.transact([Set("a", b"1"), Set("a", b"2", 1)])
    assert store.get("a") == Versioned(b"2", 2)

    store.transact([Delete("a", 2), Create("a", b"new")])

    assert store.get("a") == Versioned(b"new", 0)


def test_create_makes_missing_parents(cluster):
    """Children are listed by name, sorted, one level deep."""
    store = cluster.store()

    store.transact([Create("a/b/2", b"two"), Create("a/b/1", b""), Create("a/c", b"")])

    assert store.children("a") == ("b", "c")
    assert store.children("a/b") == ("1", "2")
    assert store.get("a/b/2") == Versioned(b"two", 0)


@pytest.mark.parametrize(
    "refused",
    [
        Check("there", 1),
        Check("missing", 0),
        Create("there", b""),
        Set("missing", b""),
        Set("there", b"", 7),
        Delete("missing"),
        Delete("there", 7),
        Delete("parent"),
    ],
    ids=repr,
)
def test_a_refused_transaction_applies_nothing(cluster, refused):
    """One refused operation undoes those before and after it."""
    store = cluster.store()
    store.transact([Create("there", b"old"), Create("other", b"old"), Create("parent/child", b"")])

    with pytest.raises(ConflictError):
        store.transact([Create("new", b""), Set("other", b"changed"), refused, Delete("parent/child")])

    assert store.get("new") is None
    assert store.get("other") == store.get("there") == Versioned(b"old", 0)
    assert store.children("parent") == ("child",)


def test_checks_see_earlier_operations_of_the_same_transaction(cluster):
    """Operations apply in their order."""
    store = cluster.store()

    store.transact([Create("a", b""), Check("a", 0), Set("a", b"x", 0), Check("a", 1)])

    assert store.get("a") == Versioned(b"x", 1)


@pytest.mark.parametrize("is_checking", [False, True])
def test_sessions_that_write_read_all_that_was_answered_before(cluster, is_checking):
    """That is why a new leader, whose election is a write, cannot miss a commit of the term before.

    A transaction that only checks is as good: a heartbeat of a leader whose record has not changed is one.
    """
    writer, readers = cluster.store(), [cluster.store() for _ in range(4)]
    writer.transact([Create("a", b"0"), *(Create(f"own-{index}", b"") for index in range(4))])

    for number in range(1, 30):
        writer.transact([Set("a", b"%d" % number)])
        for index, reader in enumerate(readers):
            key = f"own-{index}"
            reader.transact([Check(key, 0) if is_checking else Set(key, b"%d" % number)])
        assert [reader.get("a").data for reader in readers] == [b"%d" % number] * 4


def test_reads_together_see_what_reads_alone_see(cluster):
    """A batch begins anew each time, also after an error within it."""
    writer, reader = cluster.store(), cluster.store()
    writer.transact([Create("a", b"0")])

    for number in range(1, 10):
        writer.transact([Set("a", b"%d" % number)])
        reader.transact([Create(f"own-{number}", b"")])
        with pytest.raises(KeyError), reader.together():
            assert reader.get("a").data == b"%d" % number
            raise KeyError


def test_an_ephemeral_entry_goes_at_close(cluster, eventually):
    """Its owner's end is seen by others, who are woken; lasting entries stay."""
    changed = threading.Event()
    other, owner = cluster.store(changed.set), cluster.store()
    owner.transact([Create("here", b"", is_ephemeral=True), Create("stays", b"")])
    assert other.get("here") is not None
    changed.clear()

    owner.close()

    assert changed.wait(5)
    eventually(lambda: other.get("here") is None, timeout_s=5)
    assert other.get("stays") is not None


def test_an_ephemeral_entry_survives_its_session_timeout_while_its_owner_lives(cluster):
    """The session is kept alive without any calls of ours."""
    other, owner = cluster.store(), cluster.store()
    owner.transact([Create("here", b"", is_ephemeral=True)])

    end_s = time.monotonic() + 2 * owner.session_timeout_s
    while time.monotonic() < end_s:
        assert other.get("here") is not None
        threading.Event().wait(0.05)


def test_an_ephemeral_entry_goes_when_its_owner_is_killed(process_cluster, eventually):
    """SIGKILL: nobody says goodbye; the embedded store sees it at once."""
    changed = threading.Event()
    other = process_cluster.store(changed.set)
    with process_cluster.holder("here") as process:
        assert other.get("here") == Versioned(b"here", 0)
        changed.clear()
        process.kill()
        process.wait()
        killed_s = time.monotonic()

        assert changed.wait(5), "nobody was told"
        eventually(lambda: other.get("here") is None, timeout_s=5)
        took_s = time.monotonic() - killed_s

    assert took_s < other.session_timeout_s * (0.5 if process_cluster.kind == "embedded" else 2)


def test_an_ephemeral_entry_goes_when_its_owner_is_frozen(process_cluster, eventually):
    """SIGSTOP: the process is there and says nothing; its session ends after the timeout, not before."""
    other = process_cluster.store()
    with process_cluster.holder("here") as process:
        process.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()

        eventually(lambda: other.get("here") is None, timeout_s=5, what="the end of the entry")

        assert other.session_timeout_s * 2 / 3 < time.monotonic() - frozen_s < 3 * other.session_timeout_s


def test_a_lost_session_takes_its_ephemeral_entries_and_a_new_one_follows(cluster, eventually):
    """The owner is woken, and can go on under a new session after at most one error."""
    changed = threading.Event()
    owner, other = cluster.store(changed.set), cluster.store()
    owner.transact([Create("here", b"old", is_ephemeral=True)])
    changed.clear()

    cluster.lose_session(owner)

    eventually(lambda: other.get("here") is None, what="the end of the entry")
    assert changed.wait(5), "the owner was not told"

    def is_created() -> bool:
        try:
            owner.transact([Create("here", b"new", is_ephemeral=True)])
        except CoordinationError:
            return False
        return True

    eventually(is_created)
    assert other.get("here") == Versioned(b"new", 0)


@pytest.mark.parametrize("read", ["get", "children"])
def test_changes_are_told_again_and_again(cluster, read):
    """Each read arms the watch anew, for entries that do not exist yet as well."""
    changed = threading.Event()
    watcher, writer = cluster.store(changed.set), cluster.store()

    def after(write: Callable[[], None]) -> bool:
        getattr(watcher, read)("a")
        changed.clear()
        write()
        return changed.wait(5)

    assert after(lambda: writer.transact([Create("a", b"")]))
    for number in range(3):
        assert after(lambda number=number: writer.transact([Set("a", b"x"), Create(f"a/{number}", b"")]))


def test_a_transaction_proves_the_session_for_a_lease(cluster):
    """The proof is shorter than the session timeout, and not in the past while calls are answered."""
    store = cluster.store()
    store.transact([Create("a", b"")])

    for _ in range(15):
        started_s = time.monotonic()
        store.transact([Set("a", b"")])
        lease_s = store.proven_until(started_s) - started_s
        assert store.session_timeout_s / 3 < lease_s <= store.lease_s + 1e-6 < store.session_timeout_s
        threading.Event().wait(store.session_timeout_s / 10)


def test_calls_from_many_threads_all_count(cluster):
    """Eight threads add one to a number, 20 times each, by check and retry."""
    stores = [cluster.store() for _ in range(2)]
    stores[0].transact([Create("n", b"0")])

    def add(store) -> None:
        done = 0
        while done < 20:
            found = store.get("n")
            try:
                store.transact([Set("n", b"%d" % (int(found.data) + 1), found.version)])
                done += 1
            except ConflictError:
                continue

    threads = [threading.Thread(target=add, args=(stores[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert stores[0].get("n") == Versioned(b"160", 160)


def test_a_closed_store_refuses_calls(process_cluster):
    """Closing twice is harmless, calling afterwards is an error and no hang."""
    store = process_cluster.store()
    store.close()
    store.close()

    with pytest.raises(CoordinationError):
        store.get("a")
    with pytest.raises(CoordinationError):
        store.transact([Create("a", b"")])
