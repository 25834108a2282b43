"""Who is refused by a replica's API, and with which words: in one process, over real sockets and real TLS."""

from __future__ import annotations

import hashlib
import select
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.applications import Starlette

from flwr_ha.certs import issue, make_authority, write_certificates
from flwr_ha.coordination.connection import SocketKeeper
from flwr_ha.errors import CheckpointError, ConfigError
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.settings import Endpoint, TlsSettings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.peer import Peer
from flwr_ha.storage.pushing import Pusher
from flwr_ha.tls import check_server_files, client_context

SECRET = "a secret of the replicas"
MAX_BYTES = 1000
Serve = Callable[[TlsSettings], int]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an authority and a certificate for this machine."""
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder, [])
    return folder


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """Return the store behind the server."""
    return BlobStore(tmp_path / "served")


@pytest.fixture
def own(tmp_path: Path) -> BlobStore:
    """Return the store of the client."""
    return BlobStore(tmp_path / "own")


@pytest.fixture
def serve(store: BlobStore) -> Iterator[Serve]:
    """Return a function that serves the store and returns the port."""
    with ExitStack() as stack:

        def start(tls: TlsSettings) -> int:
            server = stack.enter_context(ApiServer(Endpoint("127.0.0.1", 0), tls=tls))
            routes, upgrades = blob_api(store, secret=SECRET, max_bytes=MAX_BYTES)
            server.start(Starlette(routes=routes), upgrades=upgrades)
            return server.port

        yield start


def files(folder: Path) -> TlsSettings:
    """Return the settings that name the files of a folder."""
    return TlsSettings(ca=folder / "ca.crt", cert=folder / "server.crt", key=folder / "server.key")


def push(own: BlobStore, port: int, *, ca: Path | None, secret: str = SECRET, content: bytes = b"blob") -> None:
    """Push a blob to the server as a replica does."""
    tls = None if ca is None else client_context(ca)
    with Pusher(Peer(1, f"127.0.0.1:{port}"), secret=secret, tls=tls, timeout_s=5.0) as pusher:
        pusher.push(own, [own.put(content)])


def test_blobs_are_pushed_over_tls(serve: Serve, store: BlobStore, own: BlobStore, certificates: Path) -> None:
    """With the right authority and secret the blob arrives."""
    push(own, serve(files(certificates)), ca=certificates / "ca.crt")
    assert store.has("sha256:" + hashlib.sha256(b"blob").hexdigest())


def test_large_blobs_are_pushed_over_tls(tmp_path: Path, own: BlobStore, certificates: Path) -> None:
    """Neither end waits for the other for ever where both have much to say, and all arrives."""
    store = BlobStore(tmp_path / "served")
    digests = [own.put(bytes([i]) * 3_000_000) for i in range(10)]
    with ApiServer(Endpoint("127.0.0.1", 0), tls=files(certificates)) as server:
        routes, upgrades = blob_api(store, secret=SECRET, max_bytes=10**9)
        server.start(Starlette(routes=routes), upgrades=upgrades)
        tls = client_context(certificates / "ca.crt")
        with Pusher(Peer(1, f"127.0.0.1:{server.port}"), secret=SECRET, tls=tls) as pusher:
            pusher.push(own, digests)
    assert store.digests() == tuple(sorted(digests))
    assert all(store.is_good(digest) for digest in digests)


def test_wrong_authority_is_refused(serve: Serve, own: BlobStore, certificates: Path, tmp_path: Path) -> None:
    """A replica with another authority's certificate gets nothing."""
    write_certificates(tmp_path / "other", [])
    with pytest.raises(CheckpointError, match="its certificate is not signed by the ca"):
        push(own, serve(files(certificates)), ca=tmp_path / "other" / "ca.crt")


def test_expired_certificate_is_refused(serve: Serve, own: BlobStore, tmp_path: Path) -> None:
    """Clients refuse it, and a replica with one does not even start."""
    authority = make_authority("test CA")
    expired = issue(authority, "expired", ["127.0.0.1"], days=-2)
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem())
    (tmp_path / "server.crt").write_bytes(expired.certificate_pem())
    (tmp_path / "server.key").write_bytes(expired.key_pem())
    (tmp_path / "server.key").chmod(0o600)

    with pytest.raises(CheckpointError, match="its certificate has expired"):
        push(own, serve(files(tmp_path)), ca=tmp_path / "ca.crt")
    with pytest.raises(ConfigError, match=r"tls\.cert = .* expired on "):
        check_server_files(files(tmp_path))


def test_certificate_of_another_host_is_refused(serve: Serve, own: BlobStore, tmp_path: Path) -> None:
    """The name counts, not only the authority."""
    authority = make_authority("test CA")
    elsewhere = issue(authority, "elsewhere", ["elsewhere.example"])
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem())
    (tmp_path / "server.crt").write_bytes(elsewhere.certificate_pem())
    (tmp_path / "server.key").write_bytes(elsewhere.key_pem())
    with pytest.raises(CheckpointError, match="its certificate is not for this name or address"):
        push(own, serve(files(tmp_path)), ca=tmp_path / "ca.crt")


def test_plain_peer_is_refused(serve: Serve, own: BlobStore, certificates: Path) -> None:
    """TLS towards a plain server, and plain text towards a TLS server: both end with a hint at the cause."""
    with pytest.raises(CheckpointError, match="it does not speak TLS"):
        push(own, serve(TlsSettings()), ca=certificates / "ca.crt")
    with pytest.raises(CheckpointError, match="it may speak TLS where the settings name no certificates"):
        push(own, serve(files(certificates)), ca=None)


def test_replica_with_a_wrong_secret_is_refused(serve: Serve, own: BlobStore, certificates: Path) -> None:
    """TLS alone is not enough."""
    with pytest.raises(CheckpointError, match="refuses the secret"):
        push(own, serve(files(certificates)), ca=certificates / "ca.crt", secret="another secret")


def test_blob_that_is_too_big_is_refused(serve: Serve, own: BlobStore) -> None:
    """The limit is looked at before a byte is written."""
    with pytest.raises(CheckpointError, match="does not take blobs of this size"):
        push(own, serve(TlsSettings()), ca=None, content=b"x" * (MAX_BYTES + 1))


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "path",
    [
        "sha256:../../../etc/passwd",
        "sha256:..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 64 + "%00",
        "sha256:" + "a" * 64 + "%0a",
        "sha512:" + "a" * 64,
    ],
)
def test_paths_in_digests_lead_nowhere(serve: Serve, store: BlobStore, method: str, path: str) -> None:
    """Only a digest is a digest; nothing else reaches the disk."""
    before = sorted(store.root.rglob("*"))
    status, _ = raw(serve(TlsSettings()), method, f"/blobs/{path}", secret=SECRET)
    assert status in (400, 404)
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_blobs_need_the_secret(serve: Serve, method: str) -> None:
    """Models are read and written by replicas only."""
    status, _ = raw(serve(TlsSettings()), method, "/blobs/sha256:" + "a" * 64, secret="")
    assert status == 401


def test_keys_are_for_their_owner_only(certificates: Path, tmp_path: Path) -> None:
    """`flwr-ha certs` writes keys with mode 600, and a replica refuses one that others can read."""
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((certificates / name).stat().st_mode) == 0o600
    write_certificates(tmp_path, [])
    (tmp_path / "server.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"can be read by others: chmod 600"):
        check_server_files(files(tmp_path))


def test_key_of_another_certificate_is_refused(certificates: Path, tmp_path: Path) -> None:
    """Two files that do not belong together are a wrong setting, said before anything starts."""
    write_certificates(tmp_path, [])
    mixed = TlsSettings(ca=tmp_path / "ca.crt", cert=tmp_path / "server.crt", key=certificates / "server.key")
    with pytest.raises(ConfigError, match="does not belong to the certificate"):
        check_server_files(mixed)


def test_certificates_are_renewed_by_the_same_authority(tmp_path: Path) -> None:
    """Called again, the authority stays, so that nobody needs a new `ca.crt`."""
    write_certificates(tmp_path, ["10.0.0.1", "flower.example"])
    authority, server = (tmp_path / "ca.crt").read_bytes(), (tmp_path / "server.crt").read_bytes()
    write_certificates(tmp_path, ["10.0.0.1"])
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "server.crt").read_bytes() != server
    check_server_files(files(tmp_path))


def raw(port: int, method: str, path: str, *, secret: str) -> tuple[int, bytes]:
    """Send a request whose path no client library has tidied up."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
        connection.sendall((head + "\r\n").encode())
        with connection.makefile("rb") as answer:
            content = answer.read()
    return int(content.split(b" ", 2)[1]), content


def test_reader_of_a_dropped_connection_never_takes_ciphertext_for_an_answer(certificates: Path) -> None:
    """What had arrived before the connection to ZooKeeper was dropped is still read through TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    keeper = SocketKeeper(5.0, client_context(certificates / "ca.crt"))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(5.0)
        accepted = pool.submit(lambda: context.wrap_socket(listener.accept()[0], server_side=True))
        client = keeper.create_connection(address=listener.getsockname(), hostname="127.0.0.1", timeout=5.0)
        stack.enter_context(client)
        server = stack.enter_context(accepted.result(5.0))
        server.sendall(b"first")
        assert client.recv(100) == b"first"
        server.sendall(b"second")
        assert select.select([client], [], [], 5.0)[0]
        keeper.drop_connection()
        assert client.recv(100) == b"second"
