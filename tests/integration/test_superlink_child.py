"""The SuperLink child with real SuperNodes, runs and kills: it serves only while it leads and dies with its agent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from flwr_ha.errors import ConfigError, HaError
from flwr_ha.local.zookeeper import free_ports
from flwr_ha.superlink import events, linkstate, procfs
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.settings import SuperLinkSettings, TlsFiles

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SLEEPER = Path(__file__).parents[1] / "apps" / "sleeper"
SERVER_APP, SUPEREXEC = b"flwr-serverapp", b"flwr_ha.superlink.superexec"
BIN = Path(sys.executable).parent

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float = 60.0) -> T:
    """Return the first true value of a condition; fail when there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {condition}"
        threading.Event().wait(0.01)
    return value


class Replica:
    """A SuperLink child with the part of an agent that answers it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.database = folder / "superlink.db"
        self.log_file = folder / "superlink.log"
        self.blobs: dict[str, bytes] = {}
        self.events: list[events.Event] = []
        self.answers: list[bool | None] = []  # for the next requests, None: no answer; then always yes
        arguments = {"ping_interval_s": 0.1, "frozen_after_s": 1.0, **settings}
        self.process = SuperLinkProcess(
            SuperLinkSettings(database=self.database, log_file=self.log_file, **arguments),  # type: ignore[arg-type]
            on_event=self._on_event,
        )
        self.process.start()

    def _on_event(self, event: events.Event) -> None:
        self.events.append(event)
        if isinstance(event, events.ReplicateRequested):
            answer = self.answers.pop(0) if self.answers else True
            if answer is not None:
                self.process.answer(event.serial, is_replicated=answer)

    def seen(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    def lead(self, address: str) -> None:
        self.process.set_lease(time.monotonic() + 3600.0)
        self.process.open_public(address, 5.0)

    def put(self, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def export(self) -> linkstate.ControlPlane:
        return linkstate.export(self.database, self.put, logs_until=linkstate.log_mark(self.database))

    def summary(self) -> linkstate.Summary:
        return linkstate.summary(self.database)

    def server_apps(self) -> list[int]:
        return processes_of(self.process.pid, SERVER_APP)


def processes_of(pid: int, program: bytes) -> list[int]:
    """Return the process ids of a program below a process."""
    found = []
    for other in procfs.descendants(pid):
        try:
            command = Path(f"/proc/{other}/cmdline").read_bytes()
        except OSError:
            continue
        if program in command and b"tether.py" not in command:
            found.append(other)
    return found


def is_running(pid: int) -> bool:
    """Say whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr-home"))


@pytest.fixture
def public(tmp_path: Path) -> str:
    """Choose the public address that the replicas of this test share, and tell Flower's command line about it."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    home = tmp_path / "flwr-home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "ha"\n\n[superlink.ha]\naddress = "{address}"\ninsecure = true\n'
    )
    return address


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Start replicas in folders of their own; kill them at the end."""
    started: list[Replica] = []

    def start(**settings: object) -> Replica:
        started.append(Replica(tmp_path / f"replica-{len(started)}", **settings))
        return started[-1]

    yield start
    for replica in started:
        replica.process.close()


@pytest.fixture
def supernode(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start unmodified SuperNodes; kill them at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(address: str) -> subprocess.Popen[bytes]:
        (port,) = free_ports(1)
        command = [str(BIN / "flower-supernode"), "--insecure", "--superlink", address, "--port", str(port)]
        with (tmp_path / f"supernode-{len(started)}.log").open("wb") as log:
            environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
            started.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=tmp_path)
            )
        return started[-1]

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def flwr(*arguments: str) -> dict[str, object]:
    """Run Flower's command line and return its JSON."""
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments, "--format", "json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    value: dict[str, object] = json.loads(done.stdout[done.stdout.index("{") :])
    return value


def test_standby_refuses_the_public(replicas: Callable[..., Replica], public: str) -> None:
    """A SuperLink without a lease has no public socket and does not open one."""
    replica = replicas()
    replica.process.wait_ready(60.0)

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{public}/health")
    with pytest.raises(HaError, match="the lease has run out"):
        replica.process.open_public(public, 0.2)

    replica.lead(public)
    assert httpx.get(f"http://{public}/health").status_code == 200


def test_child_has_room_for_thousands_of_supernodes(replicas: Callable[..., Replica]) -> None:
    """A shell allows 1,024 files, and more to who asks; each SuperNode that waits for work has a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        replica = replicas()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: replica.seen(events.ChildReady))
    lines = Path(f"/proc/{replica.process.pid}/limits").read_text(encoding="ascii").splitlines()
    (allowed,) = [int(line.split()[3]) for line in lines if line.startswith("Max open files")]
    assert allowed == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_address_of_another_machine_is_a_clear_error(replicas: Callable[..., Replica]) -> None:
    """The error names the setting that must be changed."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.process.set_lease(time.monotonic() + 60.0)

    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8000 .* address in"):
        replica.process.open_public("192.0.2.1:8000", 5.0)


def test_public_socket_closes_when_the_lease_runs_out(replicas: Callable[..., Replica], public: str) -> None:
    """Nobody renews the lease: the child stops by itself within a tenth of a second and aborts its connections."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    deadline_s = time.monotonic() + 0.5
    replica.process.set_lease(deadline_s)
    replica.process.open_public(public, 5.0)
    host, port = public.split(":")

    with socket.create_connection((host, int(port)), timeout=5.0) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        closed_s = time.monotonic()

    assert deadline_s <= closed_s < deadline_s + 0.25
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=1.0)
    wait_until(lambda: replica.seen(events.PublicClosed))
    assert replica.process.is_alive


def test_registration_is_acknowledged_only_when_replicated(
    replicas: Callable[..., Replica],
    public: str,
    supernode: Callable[[str], subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    """Registration and activation wait for the agent; after a no the SuperNode repeats them and is welcome."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.answers = [None, True, False, True]  # registration, again, activation, again
    replica.lead(public)
    node = supernode(public)

    (request,) = wait_until(lambda: replica.seen(events.ReplicateRequested))
    assert replica.summary().nodes_total == 1  # done here
    assert replica.summary().nodes_online == 0  # but not acknowledged: it has not gone on to its activation

    replica.process.answer(request.serial, is_replicated=False)
    wait_until(lambda: len(replica.seen(events.ReplicateRequested)) == 4, 60.0)
    wait_until(lambda: b"SuperNode ID:" in (tmp_path / "supernode-0.log").read_bytes(), 60.0)

    assert (replica.summary().nodes_online, replica.summary().nodes_total) == (1, 1)
    assert node.poll() is None


def test_run_that_is_not_acknowledged_is_withdrawn(replicas: Callable[..., Replica], public: str) -> None:
    """The agent says no: `flwr run` fails, and the run does not run behind its user's back."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.answers = [False]
    replica.lead(public)

    assert flwr("run", str(SLEEPER), "ha")["success"] is False

    (run,) = replica.summary().runs
    assert run.state is linkstate.TaskState.STOPPED
    assert "submit it again" in run.details


def test_run_goes_on_at_the_next_leader(
    replicas: Callable[..., Replica], public: str, supernode: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """The leader is killed: a warm standby takes the nodes, the run and its log over, under the same ids."""
    old, new = replicas(), replicas()
    old.process.wait_ready(60.0)
    new.process.wait_ready(60.0)
    old.lead(public)
    node = supernode(public)
    wait_until(lambda: old.summary().nodes_online == 1)
    run_id = str(flwr("run", str(SLEEPER), "ha")["run-id"])
    wait_until(old.server_apps)
    wait_until(lambda: "the sleeper sleeps" in flwr_log(old), 60.0)
    before = old.export()
    nodes_before = [row["node_id"] for row in json.loads(before.snapshot)["tables"]["node"]]

    old.process.kill(5.0)
    killed_s = time.monotonic()
    linkstate.restore(new.database, before.snapshot, old.blobs.__getitem__, now_s=time.time())
    assert linkstate.export(new.database, new.put, logs_until=linkstate.log_mark(new.database)) == before
    new.lead(public)
    open_s = time.monotonic()

    assert open_s - killed_s < 2.0
    wait_until(new.server_apps)
    wait_until(lambda: new.summary().runs[0].state is linkstate.TaskState.RUNNING)
    assert [run["run-id"] for run in flwr("ls")["runs"]] == [run_id]  # type: ignore[attr-defined,index]
    assert new.summary().runs[0].run_id == run_id
    assert "the sleeper sleeps" in flwr_log(new)
    requests_at_takeover = time.time()
    wait_until(lambda: heartbeat_after(new, requests_at_takeover), 45.0)
    assert [row["node_id"] for row in json.loads(new.export().snapshot)["tables"]["node"]] == nodes_before
    assert node.poll() is None


def test_standby_starts_no_serverapp(replicas: Callable[..., Replica], public: str) -> None:
    """A control plane with a pending run lies in a standby's database: SuperExec gets it only under a lease."""
    old, new = replicas(), replicas()
    old.process.wait_ready(60.0)
    new.process.wait_ready(60.0)
    old.lead(public)
    flwr("run", str(SLEEPER), "ha")
    linkstate.restore(new.database, old.export().snapshot, old.blobs.__getitem__, now_s=time.time())

    with pytest.raises(AssertionError):
        wait_until(new.server_apps, 1.5)
    assert new.summary().runs[0].state is linkstate.TaskState.PENDING

    new.process.set_lease(time.monotonic() + 60.0)
    wait_until(new.server_apps)


def flwr_log(replica: Replica) -> str:
    """Return the lines that ``flwr log`` shows."""
    with contextlib.closing(sqlite3.connect(replica.database)) as connection:
        return "\n".join(row[0] for row in connection.execute("SELECT log FROM task_logs"))


def heartbeat_after(replica: Replica, time_s: float) -> bool:
    """Say whether the only node was heard of after a time: its deadline is then beyond the minute of grace."""
    with contextlib.closing(sqlite3.connect(replica.database)) as connection:
        (until,) = connection.execute("SELECT online_until FROM node").fetchone()
    return bool(until > time_s + 60.0)


def test_killed_serverapp_is_started_again(replicas: Callable[..., Replica], public: str) -> None:
    """A ServerApp that dies without a result is reported at once and started again under the same run id."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.lead(public)
    run_id = str(flwr("run", str(SLEEPER), "ha")["run-id"])
    wait_until(lambda: replica.summary().runs[0].state is linkstate.TaskState.RUNNING)
    (first,) = replica.server_apps()

    os.kill(first, signal.SIGKILL)
    (died,) = wait_until(lambda: replica.seen(events.ServerAppDied), 5.0)
    assert (died.run_id, died.status) == (run_id, -signal.SIGKILL)
    assert linkstate.requeue_task(replica.database, died.task_id)

    (second,) = wait_until(replica.server_apps)
    assert second != first
    wait_until(lambda: replica.summary().runs[0].state is linkstate.TaskState.RUNNING)
    assert [run.run_id for run in replica.summary().runs] == [run_id]


def test_finished_serverapp_is_not_reported_as_dead(replicas: Callable[..., Replica], public: str) -> None:
    """A run that ends by itself is finished, and its task cannot be queued again."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.lead(public)
    flwr("run", str(SLEEPER), "ha", "--run-config", "seconds=0.1")

    run = wait_until(lambda: next((run for run in replica.summary().runs if run.state.is_final), None), 60.0)
    wait_until(lambda: not replica.server_apps())

    assert run.state is linkstate.TaskState.FINISHED
    assert not replica.seen(events.ServerAppDied)
    assert not linkstate.requeue_task(replica.database, run.task_id)


AGENT = """
import sys, time
from pathlib import Path
from flwr_ha.superlink import events
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.settings import SuperLinkSettings
def on_event(event):
    if isinstance(event, events.ReplicateRequested):
        process.answer(event.serial, is_replicated=True)
folder = Path(sys.argv[1])
settings = SuperLinkSettings(database=folder / "a.db", log_file=folder / "log")
process = SuperLinkProcess(settings, on_event=on_event)
process.start()
process.wait_ready(60.0)
process.set_lease(time.monotonic() + 3600.0)
process.open_public(sys.argv[2], 5.0)
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("victim", ["agent", "child", "superexec"])
def test_nothing_outlives_its_parent(tmp_path: Path, public: str, victim: str) -> None:
    """Kill the agent, the child or SuperExec with -9: everything below, the ServerApp too, is gone within a second."""
    folder = tmp_path / "agent"
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, str(folder), public], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as agent:
        try:
            assert agent.stdout is not None
            child = int(agent.stdout.readline())
            flwr("run", str(SLEEPER), "ha")
            (server_app,) = wait_until(lambda: processes_of(child, SERVER_APP))
            wait_until(lambda: linkstate.summary(folder / "a.db").runs[0].state is linkstate.TaskState.RUNNING)
            (superexec,) = processes_of(child, SUPEREXEC)
            doomed = [child, *procfs.descendants(child)]  # a ServerApp may just have started something itself
            assert {superexec, server_app} < set(doomed)

            os.kill({"agent": agent.pid, "child": child, "superexec": superexec}[victim], signal.SIGKILL)
            wait_until(lambda: not any(is_running(pid) for pid in doomed), 1.0)
        finally:
            agent.kill()


def test_frozen_child_of_an_older_term_gives_the_port_back(replicas: Callable[..., Replica], public: str) -> None:
    """A stopped process cannot close its socket; the next leader of the machine kills it, and nobody else."""
    old, new = replicas(), replicas()
    old.process.wait_ready(60.0)
    new.process.wait_ready(60.0)
    old.lead(public)
    os.kill(old.process.pid, signal.SIGSTOP)
    wait_until(lambda: old.seen(events.ChildFrozen), 5.0)
    new.process.set_lease(time.monotonic() + 60.0)
    with pytest.raises(HaError, match="in use"):
        new.process.open_public(public, 0.2)

    record = procfs.ChildRecord.from_json(json.loads(json.dumps(old.process.record.to_json())))
    assert procfs.kill_stale_child(record, 5.0)
    new.process.open_public(public, 5.0)

    assert httpx.get(f"http://{public}/health").status_code == 200
    assert not procfs.kill_stale_child(record, 1.0)
    wait_until(lambda: old.seen(events.ChildExited))
    assert not old.process.is_alive


def test_public_socket_speaks_tls_and_the_private_one_does_not(
    replicas: Callable[..., Replica], public: str, tmp_path: Path
) -> None:
    """The certificate is for the public; SuperExec needs none on the loopback."""
    cert, key = certificate(tmp_path)
    replica = replicas(tls=TlsFiles(cert=cert, key=key), has_supernode_auth=True)
    port = replica.process.wait_ready(60.0)
    replica.lead(public)

    assert httpx.get(f"https://{public}/health", verify=ssl.create_default_context(cafile=str(cert))).status_code == 200
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert)),
            *("-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return cert, key


def test_closing_takes_the_public_away_and_keeps_the_child(replicas: Callable[..., Replica], public: str) -> None:
    """A leader that hands over closes its socket for certain and may lead again."""
    replica = replicas()
    replica.process.wait_ready(60.0)
    replica.lead(public)

    assert replica.process.close_public(5.0)

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{public}/health")
    assert not replica.seen(events.PublicClosed)
    replica.lead(public)
    assert httpx.get(f"http://{public}/health").status_code == 200
