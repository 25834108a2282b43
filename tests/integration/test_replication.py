"""Blobs reach other replicas over a network that breaks, lies and stalls."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, NoMajorityError
from flwr_ha.storage import lanes, uploads
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.blobserver import blob_routes
from flwr_ha.storage.digests import BlobMissingError
from flwr_ha.storage.replication import Peer, PeerClient, Replicator

SECRET = "correct horse"
MAX_BYTES = 64 << 20
LIMIT_S = 30.0


class Server:
    """A real uvicorn server in a thread, on a free port, which serves one store."""

    def __init__(self, store):
        self.store = store
        self.requests = []
        routes = blob_routes(store, authorize=self._authorize, max_bytes=MAX_BYTES)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="blob-server")

    def _authorize(self, request):
        self.requests.append((request.method, request.headers.get("Upload-Offset"), request.headers.get("Range")))
        return request.headers.get("Authorization") == f"Bearer {SECRET}"

    def methods(self):
        return [method for method, _, _ in self.requests]

    def __enter__(self):
        self._thread.start()
        deadline_s = time.monotonic() + LIMIT_S
        while not self._server.started:
            assert time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self._socket.close()


@dataclass
class Fault:
    """Says what a proxy does to a connection once so many bytes have passed."""

    kind: str  # cut, flip or hold
    after: int
    is_answer: bool = False  # counts the bytes of the answers, else those of the requests


class Proxy:
    """Stands between a client and a server; each connection takes the next fault of the plan, or none."""

    def __init__(self, server, plan):
        self._target = server.port
        self._plan = list(plan)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.is_released = threading.Event()
        self.is_holding = threading.Event()
        self._sockets, self._threads = [self._listener], []
        self._start(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_released.set()
        for each in list(self._sockets):
            _shut(each)
        for thread in list(self._threads):
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for each in self._sockets:
            each.close()

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, name="proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                fault = self._plan.pop(0) if self._plan else None
                self._start(self._pump, client, server, fault if fault and not fault.is_answer else None)
                self._start(self._pump, server, client, fault if fault and fault.is_answer else None)

    def _pump(self, source, sink, fault):
        passed = 0
        with suppress(OSError):
            while data := bytearray(source.recv(65536)):
                position = fault.after - passed if fault else len(data)
                passed += len(data)
                if position < len(data):
                    if fault.kind == "flip":
                        data[position] ^= 1
                    else:
                        sink.sendall(data[:position])
                        if fault.kind == "cut":
                            break
                        self.is_holding.set()
                        self.is_released.wait(LIMIT_S)
                        del data[:position]
                    fault = None
                sink.sendall(data)
        _shut(source)
        _shut(sink)


def _shut(each):
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def own(tmp_path):
    return BlobStore(tmp_path / "own")


@pytest.fixture
def servers(tmp_path, stack):
    """Two running replicas, ids 1 and 2."""
    return [stack.enter_context(Server(BlobStore(tmp_path / f"replica-{i}"))) for i in (1, 2)]


@pytest.fixture
def connect(stack):
    """Return a function that makes a client of a server or proxy."""

    def make(target, *, secret=SECRET, **settings):
        peer = Peer(1, f"127.0.0.1:{target.port}")
        return stack.enter_context(PeerClient(peer, secret=secret, **settings))

    return make


@pytest.fixture
def replicate(stack, own):
    """Return a function that makes a replicator to servers or proxies, with ids from 1."""

    def make(*targets, **settings):
        peers = [Peer(i, f"127.0.0.1:{target.port}") for i, target in enumerate(targets, 1)]
        return stack.enter_context(Replicator(own, peers, secret=SECRET, **settings))

    return make


def damage(store, digest):
    """Flip a bit on the disk, unseen by size or time stamps."""
    path = store.path(digest)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def no_server():
    """Return a peer at a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Peer(9, f"127.0.0.1:{free.getsockname()[1]}")


# One peer


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 5_000_001])
def test_pushed_blob_is_on_the_peer_and_not_sent_twice(servers, own, connect, size):
    """The copy is whole and verified; a second push only asks."""
    digest, client = own.put(os.urandom(size)), connect(servers[0], chunk_bytes=2_000_000)
    assert not client.has(digest)
    client.push(own, digest)
    assert client.has(digest)
    assert servers[0].store.read(digest) == own.read(digest)
    patches = servers[0].methods().count("PATCH")
    assert patches == max(1, -(-size // 2_000_000))
    client.push(own, digest)
    assert servers[0].methods().count("PATCH") == patches


def test_push_goes_on_where_the_connection_was_cut(servers, own, connect, stack):
    """What the peer has received is not sent again."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 3_000_000), Fault("cut", 2_000_000)]))
    digest = own.put(os.urandom(8_000_000))
    connect(proxy).push(own, digest)
    assert servers[0].store.read(digest) == own.read(digest)
    offsets = [int(offset) for method, offset, _ in servers[0].requests if method == "PATCH"]
    assert len(offsets) == 3
    assert offsets[0] == 0
    assert 2_000_000 < offsets[1] <= 3_000_000
    assert offsets[1] + 1_000_000 < offsets[2] <= offsets[1] + 2_000_000


def test_upload_outlives_both_processes(tmp_path, own, connect, stack):
    """A new sender and a restarted receiver go on with the bytes on the disk."""
    digest = own.put(os.urandom(4_000_000))
    with Server(BlobStore(tmp_path / "peer")) as server:
        proxy = stack.enter_context(Proxy(server, [Fault("cut", 2_500_000)] + [Fault("cut", 0)] * 20))
        with pytest.raises(CheckpointError, match="replica 1"):
            connect(proxy).push(own, digest)
    with Server(BlobStore(tmp_path / "peer")) as server:
        connect(server).push(own, digest)
        assert int(server.requests[1][1]) > 1_000_000
        assert server.store.read(digest) == own.read(digest)


def test_push_gives_up_after_a_few_attempts_without_progress(servers, own, connect, stack):
    """A line that never carries a byte is reported, not tried for ever."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 0)] * 50))
    with pytest.raises(CheckpointError, match=r"replica 1 \(127.0.0.1:\d+\): "):
        connect(proxy).push(own, own.put(b"data"))


@pytest.mark.parametrize("position", [1000, 1_500_000, 2_900_000])
def test_bytes_changed_on_the_way_are_noticed_and_sent_again(servers, own, connect, stack, position):
    """No peer ever counts a copy that is not the blob."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("flip", position)]))
    digest = own.put(os.urandom(3_000_000))
    connect(proxy).push(own, digest)
    assert servers[0].store.read(digest) == own.read(digest)
    assert servers[0].methods().count("PATCH") == 2


def test_bad_own_copy_is_not_spread(servers, own, connect):
    """The peer refuses the bytes, the sender looks at its own copy and moves it away."""
    digest = own.put(os.urandom(100_000))
    damage(own, digest)
    with pytest.raises(CheckpointCorruptError):
        connect(servers[0]).push(own, digest)
    assert not servers[0].store.has(digest)
    assert not own.has(digest)
    with pytest.raises(BlobMissingError):
        connect(servers[0]).push(own, digest)


def test_wrong_secret_is_refused(servers, own, connect):
    """Neither reading nor writing works, and the message says what to check."""
    there, here = servers[0].store.put(b"there"), own.put(b"here")
    client = connect(servers[0], secret="guess")
    for use in (lambda: client.has(there), lambda: client.pull(own, there), lambda: client.push(own, here)):
        with pytest.raises(CheckpointError, match="refuses the secret"):
            use()
    assert not servers[0].store.has(here)
    assert not own.has(there)
    answer = httpx.patch(f"http://127.0.0.1:{servers[0].port}/blobs/{here}", content=b"here", trust_env=False)
    assert answer.status_code == 401
    assert servers[0].store.partial_bytes(here) == 0


def test_full_disk_of_the_peer_is_reported_and_its_space_given_back(servers, own, connect, monkeypatch):
    """The status 507 reaches the operator as words."""
    digest = own.put(os.urandom(3_000_000))

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "write_all", full)
    with pytest.raises(CheckpointError, match="has a full disk"):
        connect(servers[0]).push(own, digest)
    assert servers[0].store.partial_bytes(digest) == 0


def test_two_pushes_of_one_blob_at_once_do_not_corrupt_it(servers, own, connect):
    """They share one upload: each goes on where the other is."""
    digest = own.put(os.urandom(20_000_000))
    clients = [connect(servers[0], chunk_bytes=3_000_000 + i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda client: client.push(own, digest), clients))
    assert servers[0].store.read(digest) == own.read(digest)


def test_pulled_blob_is_verified_and_resumed(servers, own, connect, stack):
    """A broken download goes on with a range request."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 3_000_000, is_answer=True)]))
    digest = servers[0].store.put(os.urandom(8_000_000))
    connect(proxy).pull(own, digest)
    assert own.read(digest) == servers[0].store.read(digest)
    first, second = [header for method, _, header in servers[0].requests if method == "GET"]
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 2_000_000


def test_pull_notices_changed_bytes(servers, own, connect, stack):
    """What comes in is never taken on trust; nothing of it stays."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("flip", 500_000, is_answer=True)]))
    digest = servers[0].store.put(os.urandom(1_000_000))
    with pytest.raises(CheckpointCorruptError, match="replica 1"):
        connect(proxy).pull(own, digest)
    assert not own.has(digest)
    assert own.partial_bytes(digest) == 0


def test_pull_survives_a_wrong_leftover(servers, own, connect):
    """The beginning came from somebody else and is wrong: it is dropped and all is pulled anew."""
    data = os.urandom(1_000_000)
    digest = servers[0].store.put(data)
    own.receive(digest, len(data)).append(0, b"wrong")
    connect(servers[0]).pull(own, digest)
    assert own.read(digest) == data


def test_pull_finishes_a_leftover_that_is_complete(servers, own, connect):
    """All bytes were there, only the rename was missing: the peer answers 416."""
    data = os.urandom(1_000)
    digest = servers[0].store.put(data)
    own.receive(digest, len(data)).append(0, data)
    connect(servers[0]).pull(own, digest)
    assert own.read(digest) == data


def test_abort_ends_a_transfer_that_hangs(servers, own, connect, stack):
    """Closing a replica does not wait for a frozen peer."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000)]))
    client, digest = connect(proxy, timeout_s=LIMIT_S), own.put(os.urandom(50_000_000))
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(client.push, own, digest)
        assert proxy.is_holding.wait(LIMIT_S)
        start_s = time.monotonic()
        client.abort()
        with pytest.raises(CheckpointError, match="given up"):
            push.result(LIMIT_S)
    assert time.monotonic() - start_s < LIMIT_S / 3
    with pytest.raises(CheckpointError):
        client.has(digest)


# The protocol


def test_statuses_are_those_of_the_protocol(servers, stack):
    """Other implementations can rely on them."""
    store, data = servers[0].store, os.urandom(1000)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    web = stack.enter_context(
        httpx.Client(
            base_url=f"http://127.0.0.1:{servers[0].port}",
            headers={"Authorization": f"Bearer {SECRET}"},
            trust_env=False,
        )
    )

    def patch(offset, content, total=1000, name=digest):
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(total)}
        answer = web.patch(f"/blobs/{name}", content=content, headers=headers)
        return answer.status_code, answer.headers.get("Upload-Offset")

    path = f"/blobs/{digest}"
    assert (web.head(path).status_code, web.head(path).headers["Upload-Offset"]) == (404, "0")
    assert web.get(path).status_code == 404
    assert patch(5, data[5:]) == (409, "0")
    assert patch(0, data[:300]) == (202, "300")
    assert web.head(path).headers["Upload-Offset"] == "300"
    assert patch(300, b"x" * 701)[0] == 400
    assert patch(300, b"x" * 700) == (422, None)
    assert patch(300, data[300:]) == (409, "0")
    assert patch(0, data[:999]) == (202, "999")
    assert patch(999, data[999:]) == (200, None)
    assert patch(0, data) == (200, None)
    head = web.head(path)
    assert (head.status_code, head.headers["Content-Length"]) == (200, "1000")
    assert web.get(path).content == store.read(digest) == data
    part = web.get(path, headers={"Range": "bytes=990-"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, data[990:], "bytes 990-999/1000")
    assert web.get(path, headers={"Range": "bytes=1000-"}).status_code == 416
    assert patch(0, b"", total=MAX_BYTES + 1, name="sha256:" + "0" * 64)[0] == 413
    assert patch(2, b"", total=1, name="sha256:" + "0" * 64)[0] == 400
    assert web.patch("/blobs/sha256:" + "0" * 64).status_code == 400
    for name in ("sha256:0", "..%2f..%2fetc%2fpasswd", "sha256:" + "A" * 64):
        assert web.get(f"/blobs/{name}").status_code in (400, 404)
        assert patch(0, b"x", 1, name)[0] in (400, 404)
    assert store.digests() == (digest,)


def test_bad_copy_is_not_served(tmp_path, stack):
    """A replica that finds its copy corrupt says that it has none."""
    store = BlobStore(tmp_path)
    digest = store.put(os.urandom(1000))
    damage(store, digest)
    server = stack.enter_context(Server(BlobStore(tmp_path)))
    client = stack.enter_context(PeerClient(Peer(1, f"127.0.0.1:{server.port}"), secret=SECRET))
    assert not client.has(digest)
    with pytest.raises(CheckpointError, match="has no good copy"):
        client.pull(BlobStore(tmp_path / "own"), digest)


# All peers


def test_protected_blobs_are_on_all_peers_that_are_named(servers, own, replicate):
    """Every returned peer holds every blob."""
    digests = [own.put(os.urandom(size)) for size in (10, 300_000, 2_000_000)]
    assert replicate(*servers).protect(digests, needed=2, timeout_s=LIMIT_S) == (1, 2)
    for server in servers:
        assert server.store.digests() == tuple(sorted(digests))


def test_nothing_is_waited_for_when_nothing_is_needed(servers, own, replicate, eventually):
    """The copies follow nevertheless."""
    digest = own.put(b"data")
    replicate(*servers).protect([digest], needed=0, timeout_s=0.0)
    eventually(lambda: all(server.store.has(digest) for server in servers))
    with pytest.raises(BlobMissingError):
        replicate(*servers).protect(["sha256:" + "0" * 64], needed=0, timeout_s=0.0)


def test_slow_peer_does_not_delay_and_gets_its_copy_later(servers, own, replicate, stack, eventually):
    """The commit waits for the fast one; the slow one catches up within the grace."""
    proxy = stack.enter_context(Proxy(servers[1], [Fault("hold", 100_000)]))
    replicator, digest = replicate(servers[0], proxy, timeout_s=LIMIT_S), own.put(os.urandom(5_000_000))
    assert replicator.protect([digest], needed=1, timeout_s=LIMIT_S) == (1,)
    assert proxy.is_holding.wait(LIMIT_S)
    assert not servers[1].store.has(digest)
    proxy.is_released.set()
    eventually(lambda: servers[1].store.has(digest))


def test_newer_blob_replaces_older_one_that_waits_for_a_slow_peer(servers, own, replicate, stack, eventually):
    """The backlog of a peer is one job: it gets the first and the newest, not all in between."""
    proxy = stack.enter_context(Proxy(servers[1], [Fault("hold", 100_000)]))
    replicator = replicate(servers[0], proxy, timeout_s=LIMIT_S)
    digests = [own.put(os.urandom(2_000_000 + i)) for i in range(4)]
    for digest in digests:
        assert replicator.protect([digest], needed=1, timeout_s=LIMIT_S) == (1,)
        assert proxy.is_holding.wait(LIMIT_S)
    proxy.is_released.set()
    eventually(lambda: servers[1].store.has(digests[3]))
    assert servers[1].store.digests() == tuple(sorted((digests[0], digests[3])))


def test_push_that_nobody_waits_for_ends_after_the_grace(servers, own, replicate, stack, eventually):
    """A peer that stays slow costs neither threads nor bandwidth for ever."""
    proxy = stack.enter_context(Proxy(servers[1], [Fault("hold", 100_000)]))
    replicator, digest = replicate(servers[0], proxy, grace_s=0.0, timeout_s=LIMIT_S), own.put(os.urandom(50_000_000))
    assert replicator.protect([digest], needed=1, timeout_s=LIMIT_S) == (1,)
    assert proxy.is_holding.wait(LIMIT_S)
    proxy.is_released.set()
    second = own.put(b"second" * 300_000)
    assert replicator.protect([second], needed=2, timeout_s=LIMIT_S) == (1, 2)
    assert servers[1].store.digests() == (second,)


def test_peer_that_is_needed_is_not_kept_busy_with_an_old_blob(servers, own, replicate, stack):
    """The fast peer is dead: the push of an older checkpoint to the slow one makes way at once."""
    proxy = stack.enter_context(Proxy(servers[1], [Fault("hold", 100_000)]))
    replicator = replicate(servers[0], proxy, timeout_s=LIMIT_S)
    old, new = own.put(os.urandom(50_000_000)), own.put(os.urandom(2_000_000))
    assert replicator.protect([old], needed=1, timeout_s=LIMIT_S) == (1,)
    assert proxy.is_holding.wait(LIMIT_S)
    servers[0].__exit__()
    assert replicator.protect([new], needed=1, timeout_s=LIMIT_S) == (2,)
    assert servers[1].store.digests() == (new,)


def test_small_blob_does_not_wait_behind_a_large_one(servers, own, replicate, stack):
    """A snapshot of the control plane passes a checkpoint that is under way to the same peer."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000)]))
    replicator = replicate(proxy, timeout_s=LIMIT_S)
    large, small = own.put(os.urandom(50_000_000)), own.put(b"small")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replicator.protect, [large], needed=1, timeout_s=LIMIT_S)
        assert proxy.is_holding.wait(LIMIT_S)
        assert replicator.protect([small], needed=1, timeout_s=LIMIT_S) == (1,)
        assert not waiting.done()
        proxy.is_released.set()
        assert waiting.result(LIMIT_S) == (1,)


def test_calls_at_once_do_not_take_each_others_place(servers, own, replicate):
    """Runs that commit at the same time all get their copies."""
    replicator = replicate(*servers)
    groups = [[own.put(os.urandom(1_200_000)), own.put(os.urandom(20))] for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda group: replicator.protect(group, needed=2, timeout_s=LIMIT_S), groups))
    assert results == [(1, 2)] * 8


def test_too_few_copies_are_no_majority_and_the_peers_are_named(servers, own, stack):
    """Dead peers are reported at once, with the reason of each; the good copy is not counted twice."""
    gone = no_server()
    peers = [gone, Peer(1, f"127.0.0.1:{servers[0].port}")]
    replicator = stack.enter_context(Replicator(own, peers, secret=SECRET))
    start_s = time.monotonic()
    with pytest.raises(NoMajorityError, match=rf"of 2 needed copies.*{gone.api}.*refused") as caught:
        replicator.protect([own.put(b"data")], needed=2, timeout_s=3600)
    assert time.monotonic() - start_s < LIMIT_S
    assert isinstance(caught.value, CheckpointError)
    alone = stack.enter_context(Replicator(own, [], secret=SECRET))
    with pytest.raises(NoMajorityError, match="there are 0 other replicas"):
        alone.protect([own.put(b"data")], needed=1, timeout_s=3600)


def test_offered_blob_is_sent_once(servers, own, replicate, eventually):
    """The commit finds what was offered before it."""
    sent = []
    replicator = replicate(*servers)
    replicator.on_push = lambda peer, sent_bytes, seconds: sent.append((peer, sent_bytes))
    offered, other = own.put(os.urandom(2_000_000)), own.put(os.urandom(1_500_000))
    replicator.offer([offered])
    eventually(lambda: len(sent) == 2)
    assert replicator.protect([offered, other], needed=2, timeout_s=LIMIT_S) == (1, 2)
    assert sorted(sent) == [(1, 1_500_000), (1, 2_000_000), (2, 1_500_000), (2, 2_000_000)]


def test_commit_takes_over_the_push_of_its_own_part(servers, own, replicate, stack):
    """An offer that is under way neither makes way for the commit that needs it nor ends after the grace."""
    sent = []
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000)]))
    replicator = replicate(proxy, timeout_s=LIMIT_S, grace_s=0.2)
    replicator.on_push = lambda peer, sent_bytes, seconds: sent.append(sent_bytes)
    offered = own.put(os.urandom(30_000_000))
    replicator.offer([offered])
    assert proxy.is_holding.wait(LIMIT_S)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replicator.protect, [offered], needed=1, timeout_s=LIMIT_S)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)  # longer than the grace
        proxy.is_released.set()
        assert waiting.result(LIMIT_S) == (1,)
    assert sent == [30_000_000]
    assert servers[0].methods() == ["HEAD", "PATCH", "PATCH", "HEAD"]  # 16 MiB in one request at most


def test_offer_makes_way_for_the_commit_of_another_run(servers, own, replicate, stack):
    """What nobody waits for yet does not hold up a commit that cannot do without the peer."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000)]))
    replicator = replicate(proxy, timeout_s=LIMIT_S)
    offered, wanted = own.put(os.urandom(50_000_000)), own.put(os.urandom(2_000_000))
    replicator.offer([offered])
    assert proxy.is_holding.wait(LIMIT_S)
    assert replicator.protect([wanted], needed=1, timeout_s=LIMIT_S) == (1,)
    assert servers[0].store.digests() == (wanted,)


def test_blob_that_is_collected_during_a_long_push_is_sent_again(servers, own, replicate, stack, monkeypatch):
    """The first blob gets old on the peer while the last one is on its way: it is there at the commit all the same."""
    now_s = [time.monotonic()]
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 3_000_000)]))
    first, second = own.put(os.urandom(2_000_000)), own.put(os.urandom(4_000_000))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replicate(proxy, timeout_s=LIMIT_S).protect, [first, second], needed=1, timeout_s=LIMIT_S)
        assert proxy.is_holding.wait(LIMIT_S)
        servers[0].store.delete(first)
        now_s[0] += 200.0
        proxy.is_released.set()
        assert waiting.result(LIMIT_S) == (1,)
    assert servers[0].store.digests() == tuple(sorted((first, second)))


def test_asking_for_a_blob_keeps_it_from_being_collected(servers, own, replicate, eventually):
    """Whoever has asked for a blob may commit a name for it, so its age starts again."""
    store, digest = servers[0].store, servers[0].store.put(own.read(own.put(b"data" * 500_000)))
    before_ns = store.path(digest).stat().st_ctime_ns
    eventually(lambda: time.time_ns() > before_ns + 20_000_000)  # the clock of the file system has moved on
    assert replicate(servers[0]).protect([digest], needed=1, timeout_s=LIMIT_S) == (1,)
    assert store.path(digest).stat().st_ctime_ns > before_ns


def test_time_limit_holds(servers, own, replicate, stack):
    """A peer that neither answers nor fails is given up for this commit."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 10)]))
    replicator = replicate(proxy, timeout_s=LIMIT_S)
    with pytest.raises(NoMajorityError, match=r"0 of 1 needed.*replica 1.*not done within 0\.2 s"):
        replicator.protect([own.put(b"data")], needed=1, timeout_s=0.2)


def test_bad_own_copy_is_reported_as_such(servers, own, replicate):
    """The caller has to save again: more peers would not help."""
    digest = own.put(os.urandom(10_000))
    damage(own, digest)
    with pytest.raises(CheckpointCorruptError):
        replicate(*servers).protect([digest], needed=1, timeout_s=LIMIT_S)


def test_peers_can_change(servers, own, replicate):
    """Who left gets nothing more; who came gets what follows; a callable is asked each time."""
    first, second = own.put(b"first"), own.put(b"second")
    replicator = replicate(servers[0])
    assert replicator.protect([first], needed=1, timeout_s=LIMIT_S) == (1,)
    replicator.set_peers([Peer(2, f"127.0.0.1:{servers[1].port}")])
    assert replicator.protect([second], needed=1, timeout_s=LIMIT_S) == (2,)
    assert servers[0].store.digests() == (first,)
    assert servers[1].store.digests() == (second,)
    replicator.set_peers([])
    with pytest.raises(NoMajorityError):
        replicator.protect([second], needed=1, timeout_s=LIMIT_S)


def test_threads_have_names_and_end(servers, own, stack):
    """Nothing of a closed replicator is left running, a frozen peer or not."""
    proxy = stack.enter_context(Proxy(servers[1], [Fault("hold", 100_000)]))
    peers = [Peer(1, f"127.0.0.1:{servers[0].port}"), Peer(2, f"127.0.0.1:{proxy.port}")]
    with Replicator(own, lambda: peers, secret=SECRET, timeout_s=LIMIT_S) as replicator:
        replicator.protect([own.put(os.urandom(9_000_000))], needed=1, timeout_s=LIMIT_S)
        assert proxy.is_holding.wait(LIMIT_S)
        assert {t.name for t in threading.enumerate()} >= {"replication-1-large", "replication-2-large"}
    assert not [t.name for t in threading.enumerate() if t.name.startswith("replication")]


def test_closing_ends_a_fetch_that_hangs(servers, own, stack):
    """A replica that is stopped while it takes over does not wait ten minutes for a big checkpoint."""
    digest = servers[0].store.put(os.urandom(9_000_000))
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000, is_answer=True)] * 9))
    replicator = stack.enter_context(
        Replicator(own, [Peer(1, f"127.0.0.1:{proxy.port}")], secret=SECRET, timeout_s=LIMIT_S)
    )
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(replicator.fetch, [digest], timeout_s=600.0)
        assert proxy.is_holding.wait(LIMIT_S)
        start_s = time.monotonic()
        replicator.close()
        with pytest.raises(CheckpointError, match="given up"):
            fetch.result(LIMIT_S)
    assert time.monotonic() - start_s < LIMIT_S / 3
    with pytest.raises(CheckpointError, match="the replica ends"):
        replicator.fetch([digest], timeout_s=LIMIT_S)
    with pytest.raises(NoMajorityError):
        replicator.protect([own.put(b"late")], needed=1, timeout_s=LIMIT_S)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("replication")]


# Getting blobs back


def test_good_copy_comes_from_the_second_peer_when_the_first_is_corrupt(servers, own, replicate):
    """Local copies that are bad are replaced, good ones are kept, and each missing one is found somewhere."""
    data = [os.urandom(50_000) for _ in range(3)]
    digests = [server.store.put(each) for server, each in zip((servers[0], servers[0], servers[1]), data, strict=True)]
    servers[1].store.put(data[0])
    damage(servers[0].store, digests[0])
    os.utime(servers[0].store.path(digests[0]))
    own.put(data[1])
    damage(own, digests[1])
    with pytest.raises(CheckpointCorruptError):
        own.read(digests[1])
    replicate(*servers).fetch(digests, timeout_s=LIMIT_S)
    assert [own.read(digest) for digest in digests] == data
    assert not servers[0].store.has(digests[0])


def test_corrupt_transfer_is_replaced_by_another_peers_copy(servers, own, replicate, stack):
    """A line that changes bits is as bad as a bad copy."""
    plan = [Fault("flip", 200_000, is_answer=True)] * 9
    proxy = stack.enter_context(Proxy(servers[0], plan))
    digest = servers[0].store.put(os.urandom(500_000))
    with pytest.raises(CheckpointError, match=f"no good copy of {digest}.*replica 1"):
        replicate(proxy).fetch([digest], timeout_s=LIMIT_S)
    servers[1].store.put(servers[0].store.read(digest))
    replicate(proxy, servers[1]).fetch([digest], timeout_s=LIMIT_S)
    assert own.is_good(digest)


def test_blob_that_nobody_has_is_named_with_the_peers(servers, own, replicate, stack):
    """The operator learns what is lost and who was asked."""
    digest = "sha256:" + "0" * 64
    with pytest.raises(CheckpointError, match=rf"{digest}.*replica 1.*replica 2") as caught:
        replicate(*servers).fetch([digest], timeout_s=LIMIT_S)
    assert "no good copy" in str(caught.value)
    gone = stack.enter_context(Replicator(own, [no_server()], secret=SECRET))
    with pytest.raises(CheckpointError, match=r"replica 9.*refused"):
        gone.fetch([digest], timeout_s=LIMIT_S)
    alone = stack.enter_context(Replicator(own, [], secret=SECRET))
    with pytest.raises(CheckpointError, match="there are no other replicas"):
        alone.fetch([digest], timeout_s=LIMIT_S)


def test_frozen_peer_does_not_delay_a_fetch(servers, own, replicate, stack):
    """The blobs come from whoever answers first; nobody waits for the other."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 0)]))
    digest = servers[1].store.put(os.urandom(100_000))
    start_s = time.monotonic()
    replicate(proxy, servers[1], timeout_s=LIMIT_S).fetch([digest], timeout_s=LIMIT_S)
    assert time.monotonic() - start_s < LIMIT_S / 3
    assert own.is_good(digest)


def test_fetch_ends_at_its_time_limit(servers, own, replicate, stack):
    """A failover does not hang on a peer that stops in the middle."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 200_000, is_answer=True)]))
    digest = servers[0].store.put(os.urandom(5_000_000))
    start_s = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{digest}.*given up"):
        replicate(proxy, timeout_s=LIMIT_S).fetch([digest], timeout_s=0.3)
    assert time.monotonic() - start_s < LIMIT_S / 3


# Memory

LARGE_BLOB = """
import importlib.util, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("replication", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
here.MAX_BYTES = 1 << 30
root = Path(sys.argv[2])
own, back = here.BlobStore(root / "own"), here.BlobStore(root / "back")
with here.Server(here.BlobStore(root / "peer")) as server:
    with here.PeerClient(here.Peer(1, f"127.0.0.1:{server.port}"), secret=here.SECRET) as client:
        client.push(own, own.put(b"warm up"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def chunks():
            return (bytes([i]) * 1_000_000 for i in range(250))
        sha = here.hashlib.sha256()
        for chunk in chunks():
            sha.update(chunk)
        digest = "sha256:" + sha.hexdigest()
        own.put_known(digest, chunks())
        client.push(own, digest)
        client.pull(back, digest)
        back.verify(digest, is_forced=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small_for_a_large_blob(tmp_path):
    """250 MB go out and come back, sender and receiver in one process, with less than 60 MB of memory."""
    command = [sys.executable, "-W", "error", "-c", LARGE_BLOB, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 60_000_000
