"""Connections that ask for an upgrade leave the web server; all others notice nothing."""

from __future__ import annotations

import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flwr_ha.certs import write_certificates
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.upgrades import AT_ONCE, Upgrades
from flwr_ha.settings import Endpoint, TlsSettings
from flwr_ha.tls import client_context

LIMIT_S = 10.0
ASK = b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nupgrade: Echo\r\nAuthorization: yes\r\n\r\n"
Connect = Callable[[], socket.socket]


def echo(connection: socket.socket) -> None:
    """Answer the request, and then everything that comes."""
    connection.sendall(b"hello ")
    while data := connection.recv(1 << 16):
        connection.sendall(data)


async def page(request: Request) -> PlainTextResponse:
    """Say which page was asked for."""
    return PlainTextResponse(f"page {request.url.path} {len(await request.body())}")


@pytest.fixture(params=["plain", "tls"], scope="module")
def tls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """Return the settings of a server with and without TLS."""
    if request.param == "plain":
        return TlsSettings()
    folder: Path = tmp_path_factory.mktemp("certificates")
    write_certificates(folder, [])
    return TlsSettings(ca=folder / "ca.crt", cert=folder / "server.crt", key=folder / "server.key")


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have uvicorn run on either loop: it takes uvloop where that is installed."""
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)


@pytest.fixture
def server(tls: TlsSettings, loop: None) -> Iterator[ApiServer]:
    """Serve pages, and an echo to whoever asks for it."""
    app = Starlette(routes=[Route("/{path:path}", page, methods=["GET", "POST"])])
    upgrades = Upgrades(echo, path="/echo", protocol="echo", authorize=lambda given: given == "yes")
    with ApiServer(Endpoint("127.0.0.1", 0), tls=tls) as server:
        server.start(app, upgrades=upgrades)
        yield server
    assert not [thread for thread in threading.enumerate() if thread.name == "upgraded"]


@pytest.fixture
def connect(server: ApiServer, tls: TlsSettings) -> Iterator[Connect]:
    """Return a function that connects to the server."""
    with ExitStack() as stack:

        def make() -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), LIMIT_S))
            if tls.is_on:
                context = client_context(tls.ca)
                connection = stack.enter_context(context.wrap_socket(connection, server_hostname="127.0.0.1"))
            return connection

        yield make


def read(connection: socket.socket, count: int) -> bytes:
    """Return so many bytes."""
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        assert more, f"the connection ended after {data!r}"
        data += more
    return data


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """Send and read at once, in one thread: TLS connections must not be used by two."""
    connection.setblocking(False)
    sent, got = 0, bytearray()
    deadline_s = time.monotonic() + LIMIT_S
    while len(got) < len(data):
        assert time.monotonic() < deadline_s, f"{sent} bytes were sent, {len(got)} came back"
        moved = 0
        with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            moved = connection.send(data[sent : sent + 65_536]) if sent < len(data) else 0
            sent += moved
        with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            got += (more := connection.recv(65_536))
            moved += len(more)
        if not moved:
            select.select([connection], [], [], 0.01)
    return bytes(got)


@pytest.mark.parametrize("cuts", [[], [3], [13, 60], list(range(1, len(ASK)))])
def test_request_for_the_protocol_is_taken_over(connect: Connect, cuts: list[int]) -> None:
    """However its bytes arrive, what follows goes to the thread and back."""
    connection = connect()
    for start, end in zip([0, *cuts], [*cuts, len(ASK)], strict=True):
        connection.sendall(ASK[start:end])
    assert read(connection, 6) == b"hello "
    connection.sendall(b"anything")
    assert read(connection, 8) == b"anything"


def test_megabytes_go_both_ways(connect: Connect) -> None:
    """Neither side is held up by the other, and no byte is lost or moved."""
    connection = connect()
    connection.sendall(ASK)
    assert read(connection, 6) == b"hello "
    data = bytes(range(256)) * 40_000
    assert exchange(connection, data) == data


@pytest.mark.parametrize(
    "request_",
    [
        ASK.replace(b"Authorization: yes", b"Authorization: no"),
        ASK.replace(b"upgrade: Echo", b"upgrade: websocket"),
        ASK.replace(b"upgrade: Echo\r\n", b""),
        ASK.replace(b"/echo", b"/other"),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_everything_else_is_the_web_servers(connect: Connect, request_: bytes) -> None:
    """It answers as it always does, on a connection that stays."""
    connection = connect()
    for _ in range(2):
        connection.sendall(request_)
        answer = b""
        while b"page /" not in answer:
            answer += read(connection, 1)
        read(connection, len(request_.split(b" ", 2)[1]) - 1 + 2)
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_pages_are_served_as_ever(server: ApiServer, tls: TlsSettings) -> None:
    """Large bodies and kept connections pass the door."""
    verify = client_context(tls.ca) if tls.is_on else True
    with httpx.Client(
        base_url=f"http{'s' if tls.is_on else ''}://127.0.0.1:{server.port}", verify=verify, trust_env=False
    ) as client:
        for size in (0, 10, 1_000_000):
            assert client.post("/a", content=b"x" * size).text == f"page /a {size}"


def test_head_that_is_too_long_is_the_web_servers(connect: Connect) -> None:
    """The door keeps a few kilobytes of a connection, and no more."""
    connection = connect()
    connection.sendall(ASK[:-2])
    connection.sendall(b"X-Much: " + b"x" * 20_000 + b"\r\n\r\n")
    assert read(connection, 13) == b"HTTP/1.1 200 "


def test_connections_end_with_the_server(tls: TlsSettings, loop: None) -> None:
    """A replica that stops does not wait for its peers."""
    upgrades = Upgrades(echo, path="/echo", protocol="echo", authorize=lambda _: True)
    with ExitStack() as stack:
        with ApiServer(Endpoint("127.0.0.1", 0), tls=tls) as server:
            server.start(Starlette(), upgrades=upgrades)
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), LIMIT_S))
            if tls.is_on:
                context = client_context(tls.ca)
                connection = stack.enter_context(context.wrap_socket(connection, server_hostname="127.0.0.1"))
            connection.sendall(ASK)
            assert read(connection, 6) == b"hello "
        assert connection.recv(1) == b""


def test_threads_are_limited(connect: Connect, eventually: Callable[..., None]) -> None:
    """One connection too many is told so by the web server; when others end, there is room again."""
    connections = [connect() for _ in range(AT_ONCE)]
    for connection in connections:
        connection.sendall(ASK)
        assert read(connection, 6) == b"hello "
    late = connect()
    late.sendall(ASK)
    assert read(late, 9) == b"HTTP/1.1 "
    connections[0].shutdown(socket.SHUT_RDWR)

    def is_served() -> bool:
        again = connect()
        again.sendall(ASK)
        return read(again, 6) == b"hello "

    eventually(is_served)
