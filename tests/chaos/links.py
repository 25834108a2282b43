"""TCP connections that can be cut silently, and a ZooKeeper connection whose answer gets lost."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from flwr_ha.storage.frames import HEAD_BYTES, PROTOCOL, Head, Kind, names_bytes

MULTI = 14  # ZooKeeper's operation code of a transaction
_HEADER = struct.Struct(">iii")  # length of what follows, xid, operation code
_CHUNK_BYTES = 1 << 16


class Frames:
    """Cut a stream of ZooKeeper's length-prefixed messages into messages; the first is the handshake."""

    def __init__(self) -> None:
        self._buffer = b""
        self._is_greeted = False

    def feed(self, data: bytes) -> list[tuple[int, int]]:
        """Take bytes and return (xid, operation code) of the messages that are whole now, without the handshake."""
        self._buffer += data
        found = []
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">i", self._buffer)
            if len(self._buffer) < 4 + length:
                break
            message, self._buffer = self._buffer[: 4 + length], self._buffer[4 + length :]
            if self._is_greeted and length >= 8:
                _, xid, code = _HEADER.unpack_from(message)
                found.append((xid, code))
            self._is_greeted = True
        return found


class PulledBlobs:
    """Find the bytes of blobs in what a replica answers over HTTP."""

    def __init__(self) -> None:
        self._mark = b"application/octet-stream"  # in the header in front of a blob, and in no other
        self._is_next = False

    def find(self, data: bytes) -> range | None:
        """Take what was read from the connection at once; return where in it a blob begins, if one does."""
        position = 0
        if self._mark in data:
            end = data.find(b"\r\n\r\n", data.index(self._mark))
            self._is_next = True
            position = len(data) if end < 0 else end + 4
        if not self._is_next or position >= len(data):
            return None
        self._is_next = False
        return range(position, len(data))


class PushedBlobs:
    """Find the bytes of blobs in what a replica pushes to another."""

    def __init__(self) -> None:
        self._is_upgraded = False
        self._head = b""
        self._left = 0  # bytes that belong to the frame
        self._is_new_piece = False

    def find(self, data: bytes) -> range | None:
        """Take what was read from the connection at once; return where in it a piece begins, if one does."""
        position, found = 0, None
        if not self._is_upgraded:
            if f"Upgrade: {PROTOCOL}".encode() not in data:
                return None
            self._is_upgraded, position = True, data.index(b"\r\n\r\n") + 4
        while position < len(data):
            if self._left:
                end = min(position + self._left, len(data))
                if self._is_new_piece:
                    found, self._is_new_piece = found or range(position, end), False
                self._left -= end - position
            else:
                end = min(position + HEAD_BYTES - len(self._head), len(data))
                self._head += data[position:end]
                if len(self._head) == HEAD_BYTES:
                    head, self._head = Head.from_bytes(self._head), b""
                    self._is_new_piece = head.kind is Kind.PIECE
                    self._left = head.count if self._is_new_piece else names_bytes(head.count)
            position = end
        return found


class Link:
    """Pass one kind of connection on to a port of this machine; make it with `Links.add`.

    Parameters
    ----------
    target : int
        Port on 127.0.0.1.
    loop : AbstractEventLoop
        Where it runs.
    """

    def __init__(self, target: int, loop: asyncio.AbstractEventLoop) -> None:
        self.port = 0
        self.lost_replies = 0
        self.flipped_bits = 0
        self._target = target
        self._loop = loop
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._to_lose = 0
        self._to_flip = 0
        self._server: asyncio.Server | None = None

    def cut(self) -> None:
        """Let nothing through any more; connections stay, as behind a cable that was pulled."""
        self._loop.call_soon_threadsafe(self._is_open.clear)

    def heal(self) -> None:
        """Let everything through again, also what was sent meanwhile, as TCP does."""
        self._loop.call_soon_threadsafe(self._is_open.set)

    def lose_reply(self) -> None:
        """Break the connection when the answer to the next ZooKeeper transaction comes: applied, but nobody is told."""
        self._to_lose += 1

    def flip_bits(self, blobs: int) -> None:
        """Change one bit in each of the next so many blobs, whichever way they go."""
        self._to_flip += blobs

    def _spoil(self, blobs: PulledBlobs | PushedBlobs, data: bytes) -> bytes:
        found = blobs.find(data)
        if not found or self._to_flip <= 0:
            return data
        self._to_flip -= 1
        self.flipped_bits += 1
        at = (found.start + found.stop) // 2
        return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._is_open.wait()
            await self._carry(reader, writer)
        finally:
            writer.transport.abort()  # also when all links are closed while this one is cut

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost: set[int] = set()
        sent, answered = Frames(), Frames()
        pushed, pulled = PushedBlobs(), PulledBlobs()

        def request(data: bytes) -> bytes:
            for xid, code in sent.feed(data):
                if code == MULTI and self._to_lose > 0:
                    self._to_lose -= 1
                    lost.add(xid)
            return self._spoil(pushed, data)

        def answer(data: bytes) -> bytes:
            is_lost = any(xid in lost for xid, _ in answered.feed(data))
            return b"" if is_lost else self._spoil(pulled, data)

        with suppress(OSError, asyncio.CancelledError):
            there, onward = await asyncio.open_connection("127.0.0.1", self._target)
            pumps = [
                asyncio.ensure_future(self._pump(reader, onward, request)),
                asyncio.ensure_future(self._pump(there, writer, answer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                onward.transport.abort()
        self.lost_replies += bool(lost)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, changed: Callable[[bytes], bytes]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._is_open.wait()
                passed = changed(data)
                if not passed:
                    return
                writer.write(passed)
                await writer.drain()


class Links:
    """Run all links in one thread; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._links: list[Link] = []

    def __enter__(self) -> Links:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def add(self, target: int) -> Link:
        """Return a link to a port of this machine that listens on another one."""
        link = Link(target, self._loop)
        asyncio.run_coroutine_threadsafe(link.open(), self._loop).result(10.0)
        self._links.append(link)
        return link

    async def _close(self) -> None:
        for link in self._links:
            link.close()
        own = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)  # an aborted transport is closed by a callback of the loop
