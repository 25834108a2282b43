"""A real ensemble of three ZooKeeper nodes that lose one of them, and the local ensemble itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.protocol import Check, Create, Operation, Set
from flwr_ha.coordination.zookeeper import ZooKeeperStore
from flwr_ha.errors import ConfigError, CoordinationError
from flwr_ha.local.processes import wait_until
from flwr_ha.local.zookeeper import LocalEnsemble, free_ports, node_mode
from flwr_ha.model import Head, Position

pytestmark = pytest.mark.zookeeper
SESSION_TIMEOUT_S = 4.0
RECORD = {"address": "127.0.0.1:8000"}


@pytest.fixture
def stores(own_ensemble: LocalEnsemble) -> Iterator[list[ZooKeeperStore]]:
    """Return two started stores of one cluster."""
    opened = [
        ZooKeeperStore(own_ensemble.connect_string, "/flwr-ha/test", session_timeout_s=SESSION_TIMEOUT_S)
        for _ in range(2)
    ]
    for store in opened:
        store.start(lambda: None, timeout_s=10)
    yield opened
    for store in opened:
        store.close()


class Behind:
    """A reader at a node that lags behind, and a writer at ZooKeeper's leader."""

    def __init__(self, ensemble: LocalEnsemble, pool: ThreadPoolExecutor) -> None:
        self.ensemble = ensemble
        self.pool = pool
        leading = ensemble.leader_index()
        self.lagging = (leading + 1) % 3
        self.reader, self.writer = (
            ZooKeeperStore(f"127.0.0.1:{ensemble.client_ports[index]}", "/flwr-ha/test", session_timeout_s=10)
            for index in (self.lagging, leading)
        )

    def read_while_written(self, news: Sequence[Operation], read: Callable[[], Any]) -> Any:
        """Write while the reader's node is frozen; return what is read from it as it wakes up."""
        self.ensemble.freeze(self.lagging)
        try:
            self.writer.transact(news)
            reading = self.pool.submit(read)
            threading.Event().wait(0.1)  # the read is on its way by then; if not, it is no harm
        finally:
            self.ensemble.thaw(self.lagging)
        return reading.result(10)


@pytest.fixture
def behind(own_ensemble: LocalEnsemble) -> Iterator[Behind]:
    """Connect the reader and the writer; all reads come from one other thread."""
    with ThreadPoolExecutor(1) as pool:
        pair = Behind(own_ensemble, pool)
        for store in (pair.reader, pair.writer):
            store.start(lambda: None, timeout_s=10)
        yield pair
        for store in (pair.reader, pair.writer):
            store.close()


def head(term: int, server_round: int) -> Head:
    """Return the head of a round of run 17."""
    return Head(
        run_id="17",
        app="test/app",
        num_rounds=100,
        position=Position(term, server_round, f"sha256:{server_round:064}"),
        model_digest="sha256:" + "a" * 64,
        size_bytes=1,
    )


def lead_through(coordinator: Coordinator, *, for_s: float) -> float:
    """Renew and commit for a while as an agent does; return the shortest rest of a lease.

    FencedError would end it: the leadership must hold all the time.
    """
    leadership = coordinator.campaign("start")
    assert leadership is not None
    end_s = time.monotonic() + for_s
    until_s, shortest_s = coordinator.renew(leadership, RECORD), SESSION_TIMEOUT_S
    server_round = 0
    while time.monotonic() < end_s:
        try:
            until_s = max(until_s, coordinator.renew(leadership, RECORD))
            committed = coordinator.commit(leadership, head(leadership.term, server_round))
            assert committed.position.server_round == server_round
            server_round += 1
        except CoordinationError:
            pass
        shortest_s = min(shortest_s, until_s - time.monotonic())
        threading.Event().wait(0.1)
    log = coordinator.commit_log("17")
    assert [entry.position.server_round for entry in log] == list(range(1, server_round))
    assert server_round > 5
    return shortest_s


@pytest.mark.parametrize("is_leader", [True, False], ids=["zookeeper-leader", "zookeeper-follower"])
def test_a_leadership_holds_through_the_death_of_a_zookeeper_node(own_ensemble, stores, is_leader):
    """Its lease does not run out, each round is committed once, and the others see all of it."""
    leading = own_ensemble.leader_index()
    victim = leading if is_leader else (leading + 1) % 3
    killer = threading.Timer(0.5, own_ensemble.kill, (victim,))
    killer.start()

    shortest_s = lead_through(Coordinator(stores[0], replica_id=0, instance="first"), for_s=4)
    killer.join()

    assert shortest_s > 0
    assert not own_ensemble.is_running(victim)
    watching = Coordinator(stores[1], replica_id=1, instance="second")
    assert watching.view().leader.replica_id == 0
    assert watching.campaign("it seemed to be gone") is None


def test_a_leadership_holds_when_its_zookeeper_node_goes_silent(own_ensemble):
    """A follower is frozen: its connections stay open and nothing answers; another node takes the session.

    Without `SocketKeeper.drop_connection` kazoo would wait until the session is lost.
    """
    leading = own_ensemble.leader_index()
    followers = [port for index, port in enumerate(own_ensemble.client_ports) if index != leading]
    hosts = ",".join(f"127.0.0.1:{port}" for port in followers)
    store = ZooKeeperStore(hosts, "/flwr-ha/test", session_timeout_s=SESSION_TIMEOUT_S)
    store.start(lambda: None, timeout_s=10)
    silent = own_ensemble.client_ports.index(store._handler._socket.getpeername()[1])
    freezer = threading.Timer(0.5, own_ensemble.freeze, (silent,))
    freezer.start()

    try:
        shortest_s = lead_through(Coordinator(store, replica_id=0, instance="first"), for_s=6)
    finally:
        freezer.join()
        own_ensemble.thaw(silent)
        store.close()

    assert shortest_s > 0


def test_a_read_is_not_older_than_a_write_that_was_answered(behind):
    """A node that lags behind gets a read together with the news: the read waits for them.

    Without the ``sync`` in front of each read most of the rounds read the old value.
    """
    behind.writer.transact([Create("n", b"0")])
    for number in range(1, 6):
        found = behind.read_while_written([Set("n", b"%d" % number)], lambda: behind.reader.get("n"))
        assert found.data == b"%d" % number


def test_reads_together_are_as_new_as_the_first_and_cost_one_sync(behind, monkeypatch):
    """A node that lags behind catches up once for all of them; the next batch and single reads ask again."""
    reader = behind.reader
    syncs = []
    sync = reader._client.sync_async
    monkeypatch.setattr(reader._client, "sync_async", lambda path: (syncs.append(path), sync(path))[1])
    behind.writer.transact([Create("n", b"0"), Create("m", b"0")])

    def read():
        with reader.together():
            return [reader.get("missing"), reader.get("n").data, reader.get("m").data]

    for number in range(1, 6):
        news = [Set("n", b"%d" % number), Set("m", b"%d" % number)]
        assert behind.read_while_written(news, read) == [None, b"%d" % number, b"%d" % number]
        assert len(syncs) == number
    behind.pool.submit(reader.get, "n").result(10)
    assert len(syncs) == 6


def test_without_a_majority_nothing_is_promised_and_all_goes_on_afterwards(own_ensemble, stores, eventually):
    """Calls end in time with CoordinationError; when a node is back, commits go on."""
    coordinator = Coordinator(stores[0], replica_id=0, instance="first")
    leadership = coordinator.campaign("start")
    coordinator.commit(leadership, head(1, 0))
    for victim in (0, 1):
        own_ensemble.kill(victim)

    started_s = time.monotonic()
    with pytest.raises(CoordinationError):
        coordinator.renew(leadership, RECORD)
    assert time.monotonic() - started_s < SESSION_TIMEOUT_S

    for victim in (0, 1):
        own_ensemble.start_node(victim)
    own_ensemble.wait_ready(20)

    def is_leading_again() -> bool:
        try:
            again = coordinator.campaign("ZooKeeper is back")
            return again is not None and coordinator.commit(again, head(again.term, 1)) is not None
        except CoordinationError:
            return False

    eventually(is_leading_again, timeout_s=20)
    assert [entry.position.server_round for entry in coordinator.commit_log("17")] == [1]


def test_the_session_timeout_is_the_one_that_zookeeper_grants(own_ensemble):
    """Less than two ticks are not to be had: the lease must follow what was granted."""
    store = ZooKeeperStore(own_ensemble.connect_string, "/flwr-ha/test", session_timeout_s=0.3)
    store.start(lambda: None, timeout_s=10)
    store.transact([Create("a", b"")])
    granted_s = store.session_timeout_s
    store.close()

    assert granted_s == pytest.approx(0.4)
    assert store.lease_s == pytest.approx(0.4 * 2 / 3)


def test_hosts_may_end_with_a_path(own_ensemble):
    """As ZooKeeper's own connect strings do: all keys go below it."""
    store = ZooKeeperStore(own_ensemble.connect_string + "/shared/place", "/flwr-ha/test", session_timeout_s=2)
    store.start(lambda: None, timeout_s=10)
    store.transact([Create("a", b"x")])
    paths = store._client.get_children("/shared/place/flwr-ha/test")
    store.close()

    assert paths == ["a"]


def test_an_unreachable_zookeeper_is_named():
    """Nobody listens: the error says where, after the time it was given."""
    (port,) = free_ports(1)
    store = ZooKeeperStore(f"127.0.0.1:{port}", "/flwr-ha/test", session_timeout_s=1)

    started_s = time.monotonic()
    with pytest.raises(CoordinationError, match=f"ZooKeeper at 127.0.0.1:{port} did not answer within 0.5 s"):
        store.start(lambda: None, timeout_s=0.5)

    assert time.monotonic() - started_s < 5


def test_hosts_that_cannot_be_read_are_a_configuration_error():
    """A port that is no number."""
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:none"):
        ZooKeeperStore("127.0.0.1:none", "/flwr-ha/test", session_timeout_s=1)


def test_the_data_of_the_local_ensemble_lasts(tmp_path):
    """Started again on the same folder, all at once killed before, it has what was acknowledged."""
    for is_first in (True, False):
        with LocalEnsemble(tmp_path, is_durable=True) as nodes:
            nodes.wait_ready(20)
            store = ZooKeeperStore(nodes.connect_string, "/flwr-ha/test", session_timeout_s=2)
            store.start(lambda: None, timeout_s=10)
            store.transact([Create("a", b"kept")] if is_first else [Check("a", 0)])
            store.close()


def test_a_taken_port_is_named(tmp_path):
    """The user sees which one."""
    with LocalEnsemble(tmp_path / "one", size=1) as nodes:
        nodes.wait_ready(20)
        with pytest.raises(ConfigError, match=f"port {nodes.client_ports[0]} for ZooKeeper is taken"):
            LocalEnsemble(tmp_path / "two", size=1, client_ports=nodes.client_ports).start()


def test_no_zookeeper_node_outlives_its_parent(tmp_path, eventually):
    """The parent is killed with SIGKILL: its nodes go as well."""
    code = (
        "import sys; from pathlib import Path; from flwr_ha.local.zookeeper import LocalEnsemble\n"
        "nodes = LocalEnsemble(Path(sys.argv[1]), size=1); nodes.start(); nodes.wait_ready(20)\n"
        "print(nodes.client_ports[0], nodes._processes[0].pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        port, pid = map(int, parent.stdout.readline().split())
        assert node_mode(port) == "standalone"
        os.kill(parent.pid, signal.SIGKILL)

    eventually(lambda: not is_alive(pid), what="the end of the node")


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - the file may vanish at any moment
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_store_works_again_after_kazoo_has_given_up(
    stores: list[ZooKeeperStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread ends with what it does not foresee; a replica whose store stays dead would be dead as well."""
    store = stores[0]
    store.transact([Create("a", b"1"), Create("own", b"1", is_ephemeral=True)])
    connection = store._client._connection

    def break_off(*_: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("xids do not match")

    monkeypatch.setattr(connection, "_read_socket", break_off)
    with pytest.raises(CoordinationError):
        store.get("a")
    assert connection.connection_stopped.wait(10)

    def value() -> bytes | None:
        try:
            found = store.get("a")
        except CoordinationError:
            return None
        return None if found is None else found.data

    assert wait_until(value, timeout_s=3 * SESSION_TIMEOUT_S, what="the store works again", poll_s=0.05) == b"1"
    assert stores[1].get("a") is not None
    wait_until(lambda: stores[1].get("own") is None, timeout_s=3 * SESSION_TIMEOUT_S, what="the old session's end")
    store.transact([Create("own", b"2", is_ephemeral=True)])
