"""What three replicas on one machine must do at least for a commit: hash, write and fsync three times, send twice.

There is no HTTP here, no secret, nothing is named, locked or resumed: what a commit takes beyond this is
their price, and what this takes beyond plain copies is that every replica hashes what it gets.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench.listening import announce, listening
from flwr_ha.storage.files import CHUNK_BYTES, WRITEBACK_BYTES, start_writeback, write_all

_HEADER = struct.Struct(">Q32s")  # bytes and SHA-256 of an array
_DONE = b"k"


@contextmanager
def receivers(folder: Path, number: int) -> Iterator[list[socket.socket]]:
    """Start processes that take arrays, and yield the connections to them."""
    with ExitStack() as stack:
        connections = []
        for index in range(number):
            own = folder / f"bare-{index + 1}"
            own.mkdir(parents=True)
            port, _ = stack.enter_context(listening("bench.bare", folder, index + 1, str(own)))
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
        yield connections


def commit(folder: Path, model: Mapping[str, np.ndarray], connections: Sequence[socket.socket]) -> float:
    """Return the seconds until all have all of it on their disks."""
    start_s = time.perf_counter()
    arrays: list[tuple[memoryview, bytes]] = []
    news = threading.Condition()

    def send(connection: socket.socket) -> None:
        for index in range(len(model)):
            with news:
                while len(arrays) <= index:
                    news.wait()
            data, digest = arrays[index]
            connection.sendall(_HEADER.pack(len(data), digest))
            connection.sendall(data)
        if connection.recv(len(model), socket.MSG_WAITALL) != _DONE * len(model):
            raise ConnectionError("a receiver has ended")

    own = folder / "bare-0"
    own.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(connections)) as pool:
        sent = [pool.submit(send, connection) for connection in connections]
        for name, values in model.items():
            data = memoryview(values).cast("B")
            digest = hashlib.sha256(data).digest()
            with (own / f"array-{name}").open("wb", buffering=0) as file:
                write_all(file.fileno(), data)
                with news:
                    arrays.append((data, digest))
                    news.notify_all()
                os.fsync(file.fileno())
        for each in sent:
            each.result()
    seconds = time.perf_counter() - start_s
    for file in folder.glob("bare-*/array-*"):
        file.unlink()
    return seconds


def _receive(connection: socket.socket, path: Path, size: int, digest: bytes) -> int:
    """Write one array as it comes, and return its descriptor; the disk has begun with it."""
    buffer, sha, begun, end = memoryview(bytearray(CHUNK_BYTES)), hashlib.sha256(), 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while end < size:
        count = connection.recv_into(buffer[: min(size - end, CHUNK_BYTES)], 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("the sender has ended")
        write_all(descriptor, buffer[:count])
        sha.update(buffer[:count])
        end += count
        if end - begun >= WRITEBACK_BYTES:
            start_writeback(descriptor, begun, end - begun)
            begun = end
    if sha.digest() != digest:
        raise ValueError("other bytes have arrived")
    return descriptor


def _finish(connection: socket.socket, descriptor: int) -> None:
    os.fsync(descriptor)
    os.close(descriptor)
    connection.sendall(_DONE)


def main() -> None:
    """Take arrays from one sender until it ends."""
    port_file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as finishing:
        announce(listener.getsockname()[1], port_file)
        connection, _ = listener.accept()
        with connection:
            number = 0
            while header := connection.recv(_HEADER.size, socket.MSG_WAITALL):
                size, digest = _HEADER.unpack(header)
                number += 1
                descriptor = _receive(connection, folder / f"array-{number}", size, digest)
                finishing.submit(_finish, connection, descriptor)


if __name__ == "__main__":
    main()
