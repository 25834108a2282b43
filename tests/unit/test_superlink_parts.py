"""The small parts of the SuperLink child: lease, sockets, processes, settings, versions."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.replica.apiserver import bind
from flwr_ha.settings import Endpoint
from flwr_ha.superlink import procfs, schema, tether
from flwr_ha.superlink.lease import Lease
from flwr_ha.superlink.public import listening_sockets
from flwr_ha.superlink.settings import SuperLinkSettings, TlsFiles
from flwr_ha.superlink.watch import signed, unsigned

SLEEP = "import time; time.sleep(60)"


def _wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline_s


def test_new_lease_has_run_out() -> None:
    """Nobody leads before the agent says so."""
    lease = Lease.create()
    assert not lease.is_valid
    lease.deadline_s = time.monotonic() + 60.0
    assert lease.is_valid
    lease.deadline_s = time.monotonic()
    assert not lease.is_valid
    lease.close()


def test_lease_is_seen_by_the_other_process() -> None:
    """What the agent writes is what the child reads, through the inherited descriptor."""
    lease = Lease.create()
    other = Lease(os.dup(lease.descriptor))
    lease.deadline_s = 123456.789
    assert other.deadline_s == 123456.789
    other.close()
    lease.close()


def test_port_that_is_taken_can_be_told_from_others() -> None:
    """The error number says that trying again may help."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use") as caught:
        listening_sockets(f"127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.errno == 98


@pytest.mark.parametrize(
    "listen",
    [
        pytest.param(lambda: listening_sockets("127.0.0.1:0")[0], id="superlink"),
        pytest.param(lambda: bind(Endpoint("127.0.0.1", 0), setting="api"), id="replica"),
    ],
)
def test_small_packets_leave_at_once(listen: Callable[[], socket.socket]) -> None:
    """An answer whose head and body are written one after the other does not wait for the client's delayed ACK."""

    async def option() -> int:
        found: asyncio.Queue[int] = asyncio.Queue()

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            await found.put(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen()
        async with await asyncio.start_server(serve, sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname())
            client.close()
            return await found.get()

    assert asyncio.run(option()) == 1


def test_port_is_free_again_at_once() -> None:
    """Connections of the last leader that linger in the kernel do not keep the next one from listening."""
    (first,) = listening_sockets("127.0.0.1:0")
    address = first.getsockname()
    with socket.create_connection(address) as client:
        accepted, _ = first.accept()
        accepted.close()  # the side that closes first leaves the lingering connection
        assert client.recv(1) == b""
    first.close()

    (second,) = listening_sockets(f"127.0.0.1:{address[1]}")
    second.close()


def test_tethered_process_dies_with_its_parent() -> None:
    """The middle process is killed with -9; the command that it tethered, a third one, is gone too."""
    program = (
        "import subprocess, sys; from flwr_ha.superlink.tether import tethered;"
        f"p = subprocess.Popen(tethered([sys.executable, '-c', {SLEEP!r}])); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as middle:
        assert middle.stdout is not None
        grandchild = int(middle.stdout.readline())
        _wait_until(lambda: tether.__file__.encode() not in Path(f"/proc/{grandchild}/cmdline").read_bytes())
        middle.kill()
    _wait_until(lambda: not _lives(grandchild))


def test_process_whose_parent_is_gone_already_ends() -> None:
    """A process that asks too late does not stay behind as an orphan."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", tether.__file__, "1", sys.executable, "-c", "print('ran')"],
        capture_output=True,
        timeout=10,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_the_holder_of_a_port_is_found_and_nobody_else_is() -> None:
    """A healthy standby on the same machine must not be taken for the frozen leader that holds the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # a client of the port does not hold it
            assert procfs.listens_on(os.getpid(), port)
            listener.close()
            assert not procfs.listens_on(os.getpid(), port)
        assert procfs.listens_on(os.getpid(), other.getsockname()[1])
    assert not procfs.listens_on(os.getppid(), port)
    assert not procfs.listens_on(2**22 + 1, port)  # there is no such process


def test_stale_child_is_killed_only_when_all_of_its_record_fits() -> None:
    """Another boot, container, start time or program is not touched, whatever process has the number now."""
    child = subprocess.Popen([sys.executable, "-c", SLEEP, procfs.CHILD_MODULE])
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        record = procfs.record_of(child.pid)
        for change in ({"boot_id": "another"}, {"namespace": 1}, {"start_time": 1}):
            assert not procfs.kill_stale_child(dataclasses.replace(record, **change), 1.0)  # type: ignore[arg-type]
        assert not procfs.kill_stale_child(procfs.record_of(stranger.pid), 1.0)
        assert child.poll() is None
        assert stranger.poll() is None

        assert procfs.kill_stale_child(procfs.ChildRecord.from_json(record.to_json()), 5.0)
        assert child.wait() == -signal.SIGKILL
        assert not procfs.kill_stale_child(record, 1.0)
    finally:
        for process in (child, stranger):
            process.kill()
            process.wait()


def test_whole_tree_is_killed() -> None:
    """Grandchildren in sessions of their own go too."""
    program = (
        "import subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True);"
        "print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert set(procfs.descendants(process.pid)) == {grandchild}
        assert procfs.kill_tree(process.pid, 5.0)
    assert not _lives(grandchild)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def test_supernode_authentication_needs_tls(tmp_path: Path) -> None:
    """Flower says so too, but only in the child's log."""
    with pytest.raises(ConfigError, match=r"\[tool\.flwr-ha\.tls\]"):
        SuperLinkSettings(database=tmp_path / "a", log_file=tmp_path / "b", has_supernode_auth=True)
    tls = TlsFiles(cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    SuperLinkSettings(database=tmp_path / "a", log_file=tmp_path / "b", has_supernode_auth=True, tls=tls)


def test_environment_keeps_what_the_user_set(tmp_path: Path) -> None:
    """Only the defaults are ours; the session's address and token reach the ServerApp."""
    settings = SuperLinkSettings(database=tmp_path / "a", log_file=tmp_path / "b", app_env={"FLWR_HA_TOKEN": "secret"})
    own = {"PATH": "/bin", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0", "FLWR_TELEMETRY_ENABLED": "0"}

    environment = settings.environment(own)

    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "0"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HA_TOKEN"] == "secret"
    assert environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.1"
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/bin"]
    assert settings.environment({})["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_database_of_an_earlier_start_is_deleted(tmp_path: Path) -> None:
    """A SuperLink starts from nothing: what counts is the committed control plane."""
    settings = SuperLinkSettings(database=tmp_path / "d" / "a.db", log_file=tmp_path / "l" / "log")
    settings.prepare()
    for name in ("a.db", "a.db-wal", "a.db-shm"):
        (tmp_path / "d" / name).write_bytes(b"old")
    settings.prepare()
    assert list((tmp_path / "d").iterdir()) == []
    assert (tmp_path / "l").is_dir()


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """The sentence names the setting."""
    (tmp_path / "file").write_text("")
    settings = SuperLinkSettings(database=tmp_path / "file" / "a.db", log_file=tmp_path / "log")
    with pytest.raises(ConfigError, match="data-dir"):
        settings.prepare()


@pytest.mark.parametrize("version", ["1.40.2", "1.43.0", "2.0.0"])
def test_unknown_flower_is_named(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """One sentence: what is installed, what is known, what to do."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ConfigError, match=rf"flwr {version} is installed, .* 1\.41 and 1\.42 only; install .* pip"):
        schema.check_flower()


def test_unknown_schema_of_a_known_flower_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that came with a new release is noticed before the SuperLink starts."""
    monkeypatch.setattr(schema, "KNOWN_SCHEMAS", {"0123456789ab": ""})
    with pytest.raises(ConfigError, match=r"schema [0-9a-f]{12}, but flwr-ha knows 0123456789ab only"):
        schema.check_flower()


@pytest.mark.parametrize("number", ["0", "1", "9223372036854775807", "9223372036854775808", "18446744073709551615"])
def test_ids_survive_the_database(number: str) -> None:
    """The database keeps unsigned ids as signed ones of the same bits."""
    assert unsigned(signed(number)) == number
    assert -(1 << 63) <= signed(number) < 1 << 63
