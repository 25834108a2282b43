"""A cluster with TLS everywhere and SuperNode authentication, through the death of leaders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flwr_ha.certs import issue, make_authority, write_certificates
from flwr_ha.errors import ConfigError, CoordinationError, HaError
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.operator import Operator
from flwr_ha.settings import TlsSettings
from flwr_ha.storage.frames import PROTOCOL
from flwr_ha.tls import client_context

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
NODES = 2


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make key pairs for SuperNodes, as ``ssh-keygen -t ecdsa -b 384`` does; the last one is registered nowhere."""
    folder = tmp_path_factory.mktemp("keys")
    made = []
    for index in range(NODES + 1):
        key = ec.generate_private_key(ec.SECP384R1())
        file = folder / f"node-{index}"
        file.touch(mode=0o600)
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
        )
        file.with_suffix(".pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )
        made.append(file)
    return made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, keys: list[Path]) -> Iterator[LocalCluster]:
    """Run three replicas over TLS; register two SuperNodes and kill the leader at once; then start them."""
    folder = tmp_path_factory.mktemp("tls")
    write_certificates(folder / "certs", ["127.0.0.1"])
    plan = Plan(is_embedded=True, supernodes=0, certificates=folder / "certs", settings={"enable-supernode-auth": True})
    with LocalCluster(folder, plan) as cluster:
        cluster.start()
        for key in keys[:NODES]:
            register_then_kill_leader(cluster, key)
        for index, key in enumerate(keys[:NODES]):
            cluster.start_supernode(index, "--auth-supernode-private-key", str(key))
        yield cluster


def register_then_kill_leader(cluster: LocalCluster, key: Path) -> None:
    """Kill the leader within milliseconds after `flwr supernode register` has said that the node is registered."""
    leader = cluster.leader()
    assert leader is not None
    cluster.flwr("supernode", "register", str(key.with_suffix(".pub")), "ha", "--format", "json", timeout_s=120.0)
    cluster.replicas[leader].kill_tree()
    cluster.wait_leader(timeout_s=90.0, other_than=leader)
    cluster.start_replica(leader)


def registered(cluster: LocalCluster) -> int:
    """Return how many SuperNodes Flower lists."""
    return len(json.loads(cluster.flwr("supernode", "list", "ha", "--format", "json"))["nodes"])


def test_registrations_survive_a_kill_right_after_them(cluster: LocalCluster) -> None:
    """What `flwr supernode register` has acknowledged the next leader knows."""
    assert registered(cluster) == NODES


def test_training_goes_on_over_tls_with_authentication(cluster: LocalCluster) -> None:
    """SuperNodes with registered keys train through a failover; checkpoints reach the majority over TLS."""
    run_id = cluster.submit(APP, num_server_rounds=3, min_nodes=NODES)
    cluster.wait_run(run_id, lambda run: run["server_round"] >= 1, timeout_s=240.0, what="round 1")
    leader = cluster.leader()
    assert leader is not None
    cluster.replicas[leader].kill_tree()
    cluster.wait_leader(timeout_s=90.0, other_than=leader)
    cluster.start_replica(leader)
    run = cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=240.0, what="the end")
    assert run["server_round"] == 3
    assert len(run["checkpoint"]["copies"]) >= 2
    assert all(program.is_alive for program in cluster.supernodes.values()), "no SuperNode had to be started again"


def test_unknown_supernode_key_is_refused(cluster: LocalCluster, keys: list[Path]) -> None:
    """A SuperNode with a key that nobody has registered ends, and says why."""
    stranger = cluster.start_supernode(NODES, "--auth-supernode-private-key", str(keys[NODES]))
    wait_until(lambda: not stranger.is_alive, timeout_s=90.0, what="the stranger is refused", poll_s=0.2)
    text = stranger.log_text()
    assert "Failed to initialize the connection to the SuperLink" in text, text
    assert registered(cluster) == NODES


def test_wrong_authority_is_refused_by_the_command_line(cluster: LocalCluster, tmp_path: Path) -> None:
    """`flwr-ha` with another cluster's `ca.crt` trusts no replica, and says so."""
    write_certificates(tmp_path, ["127.0.0.1"])
    other = TlsSettings(ca=tmp_path / "ca.crt", cert=tmp_path / "server.crt", key=tmp_path / "server.key")
    with pytest.raises(CoordinationError, match="its certificate is not signed by the ca"):
        Operator(replace(cluster.settings, tls=other)).get("/cluster")
    assert Operator(cluster.settings).get("/cluster")["cluster"] == "local"


def test_plain_text_is_refused_by_the_command_line(cluster: LocalCluster) -> None:
    """Without TLS in the settings nothing is said to a replica that has it, and the sentence gives the cause."""
    plain = replace(cluster.settings, tls=TlsSettings(), enable_supernode_auth=False)
    with pytest.raises(CoordinationError, match="it may speak TLS where the settings name no certificates"):
        Operator(plain).get("/cluster")


def test_wrong_secret_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    """An operator without the secret of this cluster changes nothing."""
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("the secret of another cluster")
    with pytest.raises(ConfigError, match="secret-file does not hold the secret of this cluster"):
        Operator(replace(cluster.settings, secret_file=secret)).post("/pause", {})
    assert cluster.get("/cluster")["paused"] is False


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/switchover"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/blobs")],
)
def test_changes_need_the_secret(cluster: LocalCluster, method: str, path: str) -> None:
    """Whatever changes something answers 401 to a stranger."""
    tls = client_context(cluster.settings.tls.ca)
    for replica in cluster.settings.replicas:
        with httpx.Client(verify=tls, trust_env=False) as client:
            headers = {"Upgrade": PROTOCOL}
            assert client.request(method, f"https://{replica.api}{path}", json={}, headers=headers).status_code == 401


def test_flower_trusts_the_authority_only(cluster: LocalCluster, tmp_path: Path) -> None:
    """`flwr` with another authority's certificate gets no connection to the public address."""
    write_certificates(tmp_path, ["127.0.0.1"])
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "ha"\n[superlink.ha]\naddress = "{cluster.address}"\n'
        f'root-certificates = "{tmp_path / "ca.crt"}"\n'
    )
    stranger = LocalCluster(cluster.folder, replace(cluster.plan, environment={"FLWR_HOME": str(home)}))
    with pytest.raises(HaError, match="Connection to the SuperLink is unavailable"):
        stranger.flwr("ls", "ha")
    cluster.flwr("ls", "ha")


def test_secrets_are_nowhere_to_be_seen(cluster: LocalCluster) -> None:
    """Neither the shared secret nor a session token is in a log, in an answer, or on a command line."""
    secret_file = cluster.settings.data_dir / "secret"
    assert secret_file.stat().st_mode & 0o077 == 0
    hidden = {secret_file.read_text().strip(), *tokens(cluster)}
    assert len(hidden) > 1, "no ServerApp token was found, the test looks in the wrong place"
    texts = [json.dumps(cluster.get(path)) for path in ("/cluster", "/history", "/events")]
    texts += [file.read_text(errors="replace") for file in cluster.folder.rglob("*.log")]
    texts += [file.read_text(errors="replace") for file in cluster.folder.rglob("events.jsonl")]
    texts += [command_line(pid) for program in cluster.replicas.values() for pid in program.tree()]
    for text in texts:
        assert not any(secret in text for secret in hidden)
    for folder in (cluster.settings.data_dir / f"replica-{replica_id}" for replica_id in cluster.replicas):
        assert folder.stat().st_mode & 0o077 == 0


def test_expired_certificate_keeps_a_replica_from_starting(cluster: LocalCluster, tmp_path: Path) -> None:
    """One sentence that names the setting, exit status 2, no traceback."""
    authority = make_authority("old")
    expired = issue(authority, "expired", ["127.0.0.1"], days=-1)
    for name, content in (
        ("ca.crt", authority.certificate_pem()),
        ("server.crt", expired.certificate_pem()),
        ("server.key", expired.key_pem()),
    ):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_bytes(content)
    text = cluster.config.read_text().replace(str(cluster.plan.certificates), str(tmp_path))
    (tmp_path / "flwr-ha.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "flwr_ha", "replica", "--id", "0", "--config", str(tmp_path / "flwr-ha.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "tls.cert" in done.stderr
    assert "expired on" in done.stderr
    assert "Traceback" not in done.stderr


def tokens(cluster: LocalCluster) -> set[str]:
    """Return the session tokens, from the environment of the SuperLinks; only their own user can read it."""
    found = set()
    for program in cluster.replicas.values():
        for pid in program.tree():
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found.update(each.split(b"=", 1)[1].decode() for each in environ if each.startswith(b"FLWR_HA_TOKEN="))
    return found


def command_line(pid: int) -> str:
    """Return what `ps` shows of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
