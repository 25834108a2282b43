"""ZooKeeper behind TLS, with entries that belong to one user: who comes in, and who is refused with which words."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import NoAuthError

from flwr_ha.certs import issue, make_authority, write_certificates
from flwr_ha.coordination.protocol import Create
from flwr_ha.coordination.zookeeper import ZooKeeperStore
from flwr_ha.errors import CoordinationError
from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import JAVA_OPTIONS, MAIN_CLASS, free_ports, node_mode, require_zookeeper
from flwr_ha.settings import ZooKeeperSettings

pytestmark = [pytest.mark.zookeeper, pytest.mark.timeout(120)]

SESSION_TIMEOUT_S = 8.0
REFUSED_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureNode:
    """One ZooKeeper node with a plain and a TLS port, and a user of its own for SASL."""

    folder: Path
    plain: str
    secure: str

    def settings(self, **changes: object) -> ZooKeeperSettings:
        """Return settings that it accepts, with changes."""
        return ZooKeeperSettings(**{"ca": self.folder / "ca.crt", **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureNode]:
    """Run ZooKeeper with TLS and SASL."""
    class_path = require_zookeeper()
    folder = tmp_path_factory.mktemp("secure")
    write_certificates(folder, ["127.0.0.1"])
    pem = folder / "keystore.pem"
    pem.write_bytes((folder / "server.crt").read_bytes() + (folder / "server.key").read_bytes())
    plain, secure = free_ports(2)
    (folder / "jaas.conf").write_text(
        'Server { org.apache.zookeeper.server.auth.DigestLoginModule required user_alice="wonderland"; };\n'
    )
    lines = [
        "tickTime=500",
        "maxSessionTimeout=60000",
        f"dataDir={folder / 'data'}",
        f"clientPortAddress=127.0.0.1\nclientPort={plain}",
        f"secureClientPortAddress=127.0.0.1\nsecureClientPort={secure}",
        "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory",
        f"ssl.keyStore.location={pem}\nssl.keyStore.type=PEM",
        f"ssl.trustStore.location={folder / 'ca.crt'}\nssl.trustStore.type=PEM",
        "ssl.clientAuth=want",
        "authProvider.sasl=org.apache.zookeeper.server.auth.SASLAuthenticationProvider",
        "admin.enableServer=false\nforceSync=no\n4lw.commands.whitelist=srvr",
    ]
    (folder / "zoo.cfg").write_text("\n".join(lines) + "\n")
    options = [*JAVA_OPTIONS, f"-Djava.security.auth.login.config={folder / 'jaas.conf'}"]
    program = Program(
        "ZooKeeper",
        ["java", *options, "-cp", f"{class_path}:/usr/share/java/*", MAIN_CLASS, str(folder / "zoo.cfg")],
        log_file=folder / "zookeeper.log",
        environment={},
    )
    try:
        wait_until(lambda: node_mode(plain), timeout_s=60.0, what="ZooKeeper serves", poll_s=0.1)
        yield SecureNode(folder=folder, plain=f"127.0.0.1:{plain}", secure=f"127.0.0.1:{secure}")
    finally:
        program.kill_tree()


@pytest.fixture
def open_store() -> Iterator[Callable[..., ZooKeeperStore]]:
    """Return a function that opens stores; they are closed at the end."""
    opened: list[ZooKeeperStore] = []

    def open_one(
        hosts: str,
        security: ZooKeeperSettings,
        *,
        password: str = "",
        root: str = "/flwr-ha/shared",
        timeout_s: float = 20.0,
    ) -> ZooKeeperStore:
        store = ZooKeeperStore(hosts, root, session_timeout_s=SESSION_TIMEOUT_S, security=security, password=password)
        opened.append(store)
        store.start(lambda: None, timeout_s=timeout_s)
        return store

    yield open_one
    for store in opened:
        store.close()


def test_store_works_over_tls(node: SecureNode, open_store: Callable[..., ZooKeeperStore]) -> None:
    """With the right authority everything goes on as without TLS."""
    store = open_store(node.secure, node.settings(), root="/flwr-ha/tls")
    store.transact([Create("runs/1", b"one", is_ephemeral=False)])
    found = store.get("runs/1")
    assert found is not None
    assert found.data == b"one"


def test_wrong_authority_is_refused(
    node: SecureNode, open_store: Callable[..., ZooKeeperStore], tmp_path: Path
) -> None:
    """A ZooKeeper that another authority vouches for is not ours; the sentence says so."""
    write_certificates(tmp_path / "other", ["127.0.0.1"])
    security = ZooKeeperSettings(ca=tmp_path / "other" / "ca.crt")
    with pytest.raises(CoordinationError, match="its certificate is not signed by the ca"):
        open_store(node.secure, security, timeout_s=REFUSED_TIMEOUT_S)


def test_plain_zookeeper_is_refused_where_tls_is_set(
    node: SecureNode, open_store: Callable[..., ZooKeeperStore]
) -> None:
    """Settings with a `ca` never fall back to plain text."""
    with pytest.raises(CoordinationError, match="did not answer within"):
        open_store(node.plain, node.settings(), timeout_s=REFUSED_TIMEOUT_S)


def test_plain_client_is_refused_by_the_tls_port(node: SecureNode, open_store: Callable[..., ZooKeeperStore]) -> None:
    """Without `ca` the TLS port lets nobody in."""
    with pytest.raises(CoordinationError, match="did not answer within"):
        open_store(node.secure, ZooKeeperSettings(), timeout_s=REFUSED_TIMEOUT_S)


@pytest.mark.parametrize("auth", ["digest", "sasl"])
def test_entries_belong_to_their_user(
    node: SecureNode, open_store: Callable[..., ZooKeeperStore], auth: str, tmp_path: Path
) -> None:
    """What a user's replicas have written nobody else reads, changes or joins."""
    root, owner = f"/flwr-ha/{auth}", _user(node, tmp_path, auth, "alice")
    store = open_store(node.secure, owner, password="wonderland", root=root)
    store.transact([Create("leader", b"0", is_ephemeral=True)])
    assert store.children("") == ("leader",) or store.get("leader") is not None

    stranger = KazooClient(hosts=node.plain, timeout=SESSION_TIMEOUT_S)
    stranger.start(timeout=20.0)
    try:
        with pytest.raises(NoAuthError):
            stranger.get(f"{root}/leader")
        with pytest.raises(NoAuthError):
            stranger.set(f"{root}/leader", b"9")
    finally:
        stranger.stop()
        stranger.close()
    with pytest.raises(CoordinationError, match="refused the user"):
        open_store(node.secure, node.settings(), root=root, timeout_s=REFUSED_TIMEOUT_S)


@pytest.mark.parametrize("auth", ["digest", "sasl"])
def test_wrong_password_is_refused(
    node: SecureNode, open_store: Callable[..., ZooKeeperStore], auth: str, tmp_path: Path
) -> None:
    """A wrong password is an error at the start, though kazoo itself reports none."""
    root, owner = f"/flwr-ha/password-{auth}", _user(node, tmp_path, auth, "alice")
    open_store(node.secure, owner, password="wonderland", root=root)
    with pytest.raises(CoordinationError, match="refused the user"):
        open_store(node.secure, owner, password="looking-glass", root=root, timeout_s=REFUSED_TIMEOUT_S)


def test_refusal_is_named_however_late_the_store_looks(
    node: SecureNode, open_store: Callable[..., ZooKeeperStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session is open for kazoo before SASL has ended, and forgets the refusal when it stops a moment later."""
    owner, start = _user(node, tmp_path, "sasl", "alice"), KazooClient.start

    def start_and_wait_for_the_end(client: KazooClient, timeout: float) -> None:
        start(client, timeout=timeout)
        assert client._connection.connection_stopped.wait(timeout)

    monkeypatch.setattr(KazooClient, "start", start_and_wait_for_the_end)
    with pytest.raises(CoordinationError, match="refused the user"):
        open_store(node.secure, owner, password="looking-glass", root="/flwr-ha/late", timeout_s=REFUSED_TIMEOUT_S)


def test_expired_zookeeper_certificate_is_refused(open_store: Callable[..., ZooKeeperStore], tmp_path: Path) -> None:
    """A server whose certificate has expired is refused, and the sentence says why."""
    authority = make_authority("test CA")
    expired = issue(authority, "expired", ["127.0.0.1"], days=-1)
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem())
    (tmp_path / "both.pem").write_bytes(expired.certificate_pem() + expired.key_pem())
    (port,) = free_ports(1)
    server = subprocess.Popen(
        ["openssl", "s_server", "-quiet", "-accept", f"127.0.0.1:{port}", "-cert", str(tmp_path / "both.pem")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.raises(CoordinationError, match="its certificate has expired"):
            open_store(f"127.0.0.1:{port}", ZooKeeperSettings(ca=tmp_path / "ca.crt"), timeout_s=REFUSED_TIMEOUT_S)
    finally:
        server.kill()
        server.communicate()


def _user(node: SecureNode, folder: Path, auth: str, user: str) -> ZooKeeperSettings:
    password_file = folder / "password"
    password_file.touch(mode=0o600)
    return node.settings(auth=auth, user=user, password_file=password_file)
