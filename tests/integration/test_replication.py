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
from flwr_ha.replica.upgrades import Upgrades
from flwr_ha.storage import files, peer, pushing, uploads
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.blobserver import blob_routes
from flwr_ha.storage.digests import BlobMissingError
from flwr_ha.storage.files import CHUNK_BYTES
from flwr_ha.storage.frames import ACCEPTED, HEAD_BYTES, PATH, PROTOCOL, Answer, Head, Kind, answer_bytes, question
from flwr_ha.storage.intake import Intake
from flwr_ha.storage.pushing import Pusher
from flwr_ha.storage.replication import Peer, PeerClient, Replicator

SECRET = "correct horse"
MAX_BYTES = 64 << 20
LIMIT_S = 30.0


class Observed(Intake):
    """Remembers what came over a connection: the offset of each piece, None for each question."""

    def __init__(self, store, log):
        super().__init__(store, max_bytes=MAX_BYTES)
        self._log = log

    def _take(self, connection, head):
        self._log.append(head.offset if head.kind is Kind.PIECE else None)
        super()._take(connection, head)


class Server:
    """A real uvicorn server in a thread, on a free port, which serves one store."""

    def __init__(self, store):
        self.store = store
        self.requests = []
        self.frames = []
        routes = blob_routes(store, authorize=self._authorize)
        self._upgrades = Upgrades(
            lambda connection: Observed(store, self.frames).serve(connection),
            path=PATH,
            protocol=PROTOCOL,
            authorize=lambda given: given == f"Bearer {SECRET}",
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=routes), http=self._upgrades, log_config=None, access_log=False, lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="blob-server")

    def _authorize(self, request):
        self.requests.append((request.method, request.headers.get("Range")))
        return request.headers.get("Authorization") == f"Bearer {SECRET}"

    def pieces(self):
        """Offsets of the pieces that have begun to arrive."""
        return [offset for offset in self.frames if offset is not None]

    def __enter__(self):
        self._thread.start()
        deadline_s = time.monotonic() + LIMIT_S
        while not self._server.started:
            assert time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._upgrades.close()
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
    """Return a function that makes what fetches from a server or proxy."""

    def make(target, *, secret=SECRET):
        return stack.enter_context(PeerClient(Peer(1, f"127.0.0.1:{target.port}"), secret=secret))

    return make


@pytest.fixture
def pusher(stack):
    """Return a function that makes what pushes to a server or proxy."""

    def make(target, *, secret=SECRET, **settings):
        return stack.enter_context(Pusher(Peer(1, f"127.0.0.1:{target.port}"), secret=secret, **settings))

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
def test_pushed_blob_is_on_the_peer_and_not_sent_twice(servers, own, connect, pusher, size):
    """The copy is whole and verified; a second push only asks."""
    digest, push = own.put(os.urandom(size)), pusher(servers[0], chunk_bytes=2_000_000).push
    assert not connect(servers[0]).has(digest)
    push(own, [digest])
    assert connect(servers[0]).has(digest)
    assert servers[0].store.read(digest) == own.read(digest)
    assert servers[0].pieces() == list(range(0, size, 2_000_000))
    push(own, [digest])
    pieces = list(range(0, size, 2_000_000))
    assert servers[0].frames == [None, *pieces, *([None] if pieces else []), None]  # an empty blob is there at once


def test_many_blobs_need_two_questions(servers, own, pusher):
    """A model of many arrays costs no round trip for each of them, nor does one that has hardly changed."""
    digests = [own.put(os.urandom(1000 + i)) for i in range(200)]
    push = pusher(servers[0]).push
    push(own, digests)
    assert servers[0].frames == [None, *[0] * 200, None]
    assert servers[0].store.digests() == tuple(sorted(digests))
    push(own, [*digests, own.put(b"one more")])
    assert servers[0].frames[202:] == [None, 0, None]


def test_blobs_that_were_sent_ahead_are_made_durable_by_the_question_for_them(servers, own, pusher, eventually):
    """An offer costs no wait for the disk; what nobody asks for afterwards is no blob."""
    first, second = own.put(os.urandom(300_000)), own.put(os.urandom(300_000))
    push = pusher(servers[0]).push
    push(own, [first, second], is_settled=False)
    eventually(lambda: servers[0].store.partial_bytes(second) == 300_000)
    assert servers[0].store.digests() == ()
    push(own, [first])
    assert servers[0].store.digests() == (first,)
    assert servers[0].frames == [None, 0, 0, None]


def test_push_goes_on_where_the_connection_was_cut(servers, own, pusher, stack):
    """What the peer has received is not sent again."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 3_000_000), Fault("cut", 2_000_000)]))
    digest = own.put(os.urandom(8_000_000))
    pusher(proxy).push(own, [digest])
    assert servers[0].store.read(digest) == own.read(digest)
    offsets = servers[0].pieces()
    assert len(offsets) == 3
    assert offsets[0] == 0
    assert 2_000_000 - CHUNK_BYTES < offsets[1] <= 3_000_000
    assert offsets[1] + 1_000_000 - CHUNK_BYTES < offsets[2] <= offsets[1] + 2_000_000


def test_upload_outlives_both_processes(tmp_path, own, pusher, stack):
    """A new sender and a restarted receiver go on with the bytes on the disk."""
    digest = own.put(os.urandom(4_000_000))
    with Server(BlobStore(tmp_path / "peer")) as server:
        proxy = stack.enter_context(Proxy(server, [Fault("cut", 2_500_000)] + [Fault("cut", 0)] * 20))
        with pytest.raises(CheckpointError, match="replica 1"):
            pusher(proxy).push(own, [digest])
    with Server(BlobStore(tmp_path / "peer")) as server:
        pusher(server).push(own, [digest])
        assert server.pieces()[0] > 1_000_000
        assert server.store.read(digest) == own.read(digest)


def test_connection_that_was_closed_meanwhile_is_made_anew(servers, own, pusher, monkeypatch):
    """A round takes longer than a receiver waits in silence: that is no failure, and costs no pause."""
    push = pusher(servers[0]).push
    first, second = own.put(b"first"), own.put(b"second")
    push(own, [first])
    servers[0]._upgrades.close()
    servers[0]._upgrades._is_closed = False
    monkeypatch.setattr(peer.Patience, "has_more", lambda self: pytest.fail("it was taken for a failure"))
    push(own, [second])
    assert servers[0].store.digests() == tuple(sorted((first, second)))


def test_push_gives_up_after_a_few_attempts_without_progress(servers, own, pusher, stack):
    """A line that never carries a byte is reported, not tried for ever."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 0)] * 50))
    with pytest.raises(CheckpointError, match=r"replica 1 \(127.0.0.1:\d+\): "):
        pusher(proxy).push(own, [own.put(b"data")])


@pytest.mark.parametrize("position", [1000, 1_500_000, 2_900_000])
def test_bytes_changed_on_the_way_are_noticed_and_sent_again(servers, own, pusher, stack, position):
    """No peer ever counts a copy that is not the blob."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("flip", position)]))
    digest = own.put(os.urandom(3_000_000))
    pusher(proxy).push(own, [digest])
    assert servers[0].store.read(digest) == own.read(digest)
    assert servers[0].pieces() == [0, 0]


@pytest.mark.parametrize("position", range(170, 320, 10))
def test_flipped_bit_in_the_protocol_itself_never_spoils_a_blob(servers, own, pusher, stack, position):
    """Whichever byte changes, of the request, a head or a question: the push arrives whole or says that it failed."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("flip", position)]))
    digests = [own.put(os.urandom(40 + i)) for i in range(2)]
    with suppress(CheckpointError):
        pusher(proxy, timeout_s=0.5).push(own, digests)
        assert servers[0].store.digests() == tuple(sorted(digests))
    assert all(servers[0].store.is_good(digest) for digest in servers[0].store.digests())


def test_bad_own_copy_is_not_spread(servers, own, pusher):
    """The peer refuses the bytes, the sender looks at its own copy and moves it away."""
    digest = own.put(os.urandom(100_000))
    damage(own, digest)
    with pytest.raises(CheckpointCorruptError):
        pusher(servers[0]).push(own, [digest])
    assert not servers[0].store.has(digest)
    assert not own.has(digest)
    with pytest.raises(BlobMissingError):
        pusher(servers[0]).push(own, [digest])


def test_good_blobs_arrive_beside_a_bad_one(servers, own, pusher):
    """They become blobs in one go; one that is spoiled does not spoil the others."""
    good, bad = own.put(os.urandom(1000)), own.put(os.urandom(1000))
    damage(own, bad)
    with pytest.raises(CheckpointCorruptError):
        pusher(servers[0]).push(own, [good, bad])
    assert servers[0].store.digests() == (good,)


def test_wrong_secret_is_refused(servers, own, connect, pusher):
    """Neither reading nor writing works, and the message says what to check."""
    there, here = servers[0].store.put(b"there"), own.put(b"here")
    client, push = connect(servers[0], secret="guess"), pusher(servers[0], secret="guess").push
    for use in (lambda: client.has(there), lambda: client.pull(own, [there]), lambda: push(own, [here])):
        with pytest.raises(CheckpointError, match="refuses the secret"):
            use()
    assert not servers[0].store.has(here)
    assert not own.has(there)
    assert servers[0].frames == []


def test_full_disk_of_the_peer_is_reported_and_its_space_given_back(servers, own, pusher, monkeypatch):
    """The sender stops before it has sent all, and the operator is told why."""
    digest = own.put(os.urandom(60_000_000))

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "write_all", full)
    with pytest.raises(CheckpointError, match="has a full disk"):
        pusher(servers[0], chunk_bytes=1_000_000).push(own, [digest])
    assert servers[0].store.partial_bytes(digest) == 0
    assert len(servers[0].pieces()) < 60


def test_two_pushes_of_one_blob_at_once_do_not_corrupt_it(servers, own, pusher):
    """They share one upload: each goes on where the other is."""
    digest = own.put(os.urandom(20_000_000))
    pushers = [pusher(servers[0], chunk_bytes=3_000_000 + i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: each.push(own, [digest]), pushers))
    assert servers[0].store.read(digest) == own.read(digest)


def test_pulled_blob_is_verified_and_resumed(servers, own, connect, stack):
    """A broken download goes on with a range request."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("cut", 3_000_000, is_answer=True)]))
    digest = servers[0].store.put(os.urandom(8_000_000))
    assert connect(proxy).pull(own, [digest]) == {}
    assert own.read(digest) == servers[0].store.read(digest)
    first, second = [header for method, header in servers[0].requests if method == "GET"]
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 2_000_000


def test_pull_notices_changed_bytes(servers, own, connect, stack):
    """What comes in is never taken on trust; nothing of it stays."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("flip", 500_000, is_answer=True)]))
    digest = servers[0].store.put(os.urandom(1_000_000))
    other = servers[0].store.put(os.urandom(1_000))
    problems = connect(proxy).pull(own, [digest, other])
    assert list(problems) == [digest]
    assert problems[digest].startswith("replica 1")
    assert own.is_good(other)
    assert not own.has(digest)
    assert own.partial_bytes(digest) == 0


def test_pull_survives_a_wrong_leftover(servers, own, connect):
    """The beginning came from somebody else and is wrong: it is dropped and all is pulled anew."""
    data = os.urandom(1_000_000)
    digest = servers[0].store.put(data)
    own.receive(digest, len(data)).append(0, b"wrong")
    assert connect(servers[0]).pull(own, [digest]) == {}
    assert own.read(digest) == data


def test_pull_finishes_a_leftover_that_is_complete(servers, own, connect):
    """All bytes were there, only the rename was missing: the peer answers 416."""
    data = os.urandom(1_000)
    digest = servers[0].store.put(data)
    own.receive(digest, len(data)).append(0, data)
    assert connect(servers[0]).pull(own, [digest]) == {}
    assert own.read(digest) == data


def test_abort_ends_a_transfer_that_hangs(servers, own, pusher, stack):
    """Closing a replica does not wait for a frozen peer."""
    proxy = stack.enter_context(Proxy(servers[0], [Fault("hold", 100_000)]))
    client, digest = pusher(proxy, timeout_s=LIMIT_S), own.put(os.urandom(50_000_000))
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(client.push, own, [digest])
        assert proxy.is_holding.wait(LIMIT_S)
        start_s = time.monotonic()
        client.abort()
        with pytest.raises(CheckpointError, match="given up"):
            push.result(LIMIT_S)
    assert time.monotonic() - start_s < LIMIT_S / 3
    with pytest.raises(CheckpointError):
        client.push(own, [digest])


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
    path = f"/blobs/{digest}"
    assert web.head(path).status_code == web.get(path).status_code == 404
    store.put(data)
    head = web.head(path)
    assert (head.status_code, head.headers["Content-Length"]) == (200, "1000")
    assert web.get(path).content == data
    part = web.get(path, headers={"Range": "bytes=990-"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, data[990:], "bytes 990-999/1000")
    assert web.get(path, headers={"Range": "bytes=1000-"}).status_code == 416
    for name in ("sha256:0", "..%2f..%2fetc%2fpasswd", "sha256:" + "A" * 64):
        assert web.get(f"/blobs/{name}").status_code in (400, 404)
    upgrade = {"Connection": "Upgrade", "Upgrade": PROTOCOL}
    assert web.get("/blobs").status_code == 426
    assert web.get("/blobs", headers={**upgrade, "Upgrade": "websocket"}).status_code == 426
    assert web.get("/blobs", headers={**upgrade, "Authorization": "Bearer guess"}).status_code == 401


class Sender:
    """Speaks the protocol of pushes byte by byte."""

    def __init__(self, server):
        self._socket = socket.create_connection(("127.0.0.1", server.port), LIMIT_S)
        self._file = self._socket.makefile("rb")
        request = f"GET {PATH} HTTP/1.1\r\nUpgrade: {PROTOCOL}\r\nAuthorization: Bearer {SECRET}\r\n"
        for part in (request[:9], request[9:50], request[50:], "\r\n"):  # as a slow network would
            self._socket.sendall(part.encode())
        assert self._file.read(len(ACCEPTED)) == ACCEPTED

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._socket.close()

    def send(self, data):
        self._socket.sendall(data)

    def piece(self, digest, offset, data, total=1000):
        self.send(Head(Kind.PIECE, digest, offset, total, len(data)).to_bytes() + data)

    def answer(self):
        return Answer.from_bytes(self._file.read(answer_bytes(self._file.read(4))))

    def ask(self, **sizes):
        self.send(question({f"sha256:{name}": size for name, size in sizes.items()}))
        return self.answer()

    def is_closed(self):
        return self._file.read(1) == b""


def test_pieces_and_questions_follow_the_protocol(servers):
    """Pieces go where the blob ends; what does not fit is dropped, and the answer says where to go on."""
    store, data = servers[0].store, os.urandom(1000)
    name = hashlib.sha256(data).hexdigest()
    digest = f"sha256:{name}"
    with Sender(servers[0]) as sender:
        assert sender.ask(**{name: 1000}) == Answer({digest: 0})
        sender.piece(digest, 5, data[5:])
        assert sender.ask(**{name: 1000}) == Answer({digest: 0})
        sender.piece(digest, 0, data[:300])
        assert sender.ask(**{name: 1000}) == Answer({digest: 300})
        sender.piece(digest, 300, b"x" * 700)
        answer = sender.ask(**{name: 1000})
        assert (answer.lacking, answer.spoiled.keys()) == ({digest: 0}, {digest})
        sender.piece(digest, 0, data[:999])
        sender.piece(digest, 999, data[999:])
        assert store.digests() == ()
        assert sender.ask(**{name: 1000}) == Answer()
        assert store.read(digest) == data
        sender.piece(digest, 0, data)
        assert sender.ask(**{name: 1000}) == Answer()
        assert sender.ask() == Answer()
    assert store.digests() == (digest,)


def test_blob_that_is_too_large_is_refused_before_it_has_come(servers):
    """The sender is told at once, and whatever it has sent meanwhile is dropped."""
    with Sender(servers[0]) as sender:
        sender.piece("sha256:" + "0" * 64, 0, b"some of it", total=MAX_BYTES + 1)
        assert "does not take blobs of this size" in sender.answer().refusal
        sender.piece("sha256:" + "1" * 64, 0, b"x" * 1000)
        assert "does not take blobs of this size" in sender.ask(**{"1" * 64: 1000}).refusal
    assert list(servers[0].store.root.glob("*/*")) == []


@pytest.mark.parametrize(
    "frame",
    [
        bytes(HEAD_BYTES),
        b"\x03" + bytes(HEAD_BYTES - 1),
        Head(Kind.PIECE, "sha256:" + "0" * 64, 1, 1, 1).to_bytes(),
        Head(Kind.QUESTION, "sha256:" + "0" * 64, 0, 0, 1_000_000).to_bytes(),
    ],
)
def test_what_is_no_frame_ends_the_connection(servers, frame):
    """Nothing is guessed: the sender connects anew."""
    with Sender(servers[0]) as sender:
        sender.send(frame)
        assert sender.is_closed()


def test_connections_that_end_in_the_middle_leave_no_thread(servers, eventually):
    """A dead sender costs nothing."""
    with Sender(servers[0]) as sender:
        sender.send(Head(Kind.PIECE, "sha256:" + "0" * 64, 0, 100, 50).to_bytes() + b"half")
        eventually(lambda: servers[0].frames == [0])
        assert [t for t in threading.enumerate() if t.name == "upgraded"]
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "upgraded"])


def test_bad_copy_is_not_served(tmp_path, stack):
    """A replica that finds its copy corrupt says that it has none."""
    store = BlobStore(tmp_path)
    digest = store.put(os.urandom(1000))
    damage(store, digest)
    server = stack.enter_context(Server(BlobStore(tmp_path)))
    client = stack.enter_context(PeerClient(Peer(1, f"127.0.0.1:{server.port}"), secret=SECRET))
    assert not client.has(digest)
    with pytest.raises(CheckpointError, match="has no good copy"):
        client.pull(BlobStore(tmp_path / "own"), [digest])


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
    assert servers[0].frames == [None, 0, 16 << 20, None]


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
    monkeypatch.setattr(pushing, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
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


def test_fetched_blobs_wait_for_the_disk_together(servers, own, replicate, monkeypatch):
    """A replica that lacks a model of many arrays does not wait for its disk once for each."""
    digests = [servers[0].store.put(os.urandom(1000 + i)) for i in range(200)]
    waits = []
    monkeypatch.setattr(files, "fsync_folder", lambda folder, do=files.fsync_folder: (waits.append(folder), do(folder)))
    replicate(servers[0]).fetch(digests, timeout_s=LIMIT_S)
    assert own.digests() == tuple(sorted(digests))
    assert 1 <= waits.count(own.path(digests[0]).parent) <= 4


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
    peer = here.Peer(1, f"127.0.0.1:{server.port}")
    with here.PeerClient(peer, secret=here.SECRET) as client, here.Pusher(peer, secret=here.SECRET) as pusher:
        pusher.push(own, [own.put(b"warm up")])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def chunks():
            return (bytes([i]) * 1_000_000 for i in range(250))
        sha = here.hashlib.sha256()
        for chunk in chunks():
            sha.update(chunk)
        digest = "sha256:" + sha.hexdigest()
        own.put_known(digest, chunks())
        pusher.push(own, [digest])
        client.pull(back, [digest])
        back.verify(digest, is_forced=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small_for_a_large_blob(tmp_path):
    """250 MB go out and come back, sender and receiver in one process, with less than 60 MB of memory."""
    command = [sys.executable, "-W", "error", "-c", LARGE_BLOB, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 60_000_000
