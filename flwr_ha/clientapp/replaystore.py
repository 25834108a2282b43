"""Replies of one node on its disk: bounded, checked on reading, safe for several processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from flwr_ha.storage.files import fsync_folder, make_folder, temporary_file, write_all

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that a SuperNode shows it

_MAGIC = b"flwr_ha replay 1\n"
_SHA_BYTES = 32
_LENGTH = struct.Struct("<Q")
_STALE_TEMPORARY_S = 3600.0


class ReplayStore:
    """Keep replies under a key, the oldest are dropped first.

    An entry is a file: a magic line, the SHA-256 of what follows, the length of a JSON table, the
    table (ids of the reply and the state, and id and length of each object), and the objects as
    Flower serializes them.

    Parameters
    ----------
    folder : Path
        Of one node; made with mode 700 when something is kept.
    max_bytes : int
        All entries together, in bytes.
    max_age_s : float
        Age after which an entry is dropped, in seconds.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 1 << 30, max_age_s: float = 7 * 24 * 3600.0) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s

    def get(self, key: str) -> tuple[RecordDict, RecordDict] | None:
        """Return the reply's content and the state after it, or None; a bad entry is removed."""
        path = self._path(key)
        try:
            if time.time() - path.stat().st_mtime > self._max_age_s:
                path.unlink(missing_ok=True)
                return None
            data = path.read_bytes()
        except OSError:
            return None
        try:
            return _decode(data)
        except Exception as error:  # whatever the bytes hold, training again is the answer
            logger.warning("the cached reply %s is bad (%s) and is removed; it is computed again", path, error)
            _remove(path)
            return None

    def put(self, key: str, content: RecordDict, state: RecordDict) -> None:
        """Keep a reply; what cannot be kept is not, and the log says so."""
        pieces = list(_encode(content, state))
        size = sum(map(len, pieces))
        if size > self._max_bytes:
            logger.warning("a reply of %d bytes is more than the cache holds (%d)", size, self._max_bytes)
            return
        try:
            make_folder(self._folder)
            self._make_room(size)
            self._write(self._path(key), pieces)
        except OSError as error:
            logger.warning("a reply is not kept in %s: %s", self._folder, error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.reply"

    def _write(self, path: Path, pieces: list[bytes]) -> None:
        with temporary_file(self._folder) as (descriptor, temporary):
            for piece in pieces:
                write_all(descriptor, piece)
            os.fsync(descriptor)
            temporary.replace(path)
        fsync_folder(self._folder)

    def _make_room(self, size: int) -> None:
        """Drop what is too old, then the oldest, until `size` more bytes fit; others may do the same."""
        now_s = time.time()  # files carry the time of the wall clock
        entries: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            age_s = now_s - status.st_mtime
            if age_s > (self._max_age_s if path.suffix == ".reply" else _STALE_TEMPORARY_S):
                _remove(path)
            elif path.suffix == ".reply":
                entries.append((status.st_mtime, status.st_size, path))
        total = size + sum(entry[1] for entry in entries)
        for _, entry_bytes, path in sorted(entries):
            if total <= self._max_bytes:
                break
            _remove(path)
            total -= entry_bytes


def _encode(content: RecordDict, state: RecordDict) -> Iterator[bytes]:
    with no_object_id_recompute():
        objects = {**get_all_nested_objects(content), **get_all_nested_objects(state)}
        contents = {object_id: item.deflate() for object_id, item in objects.items()}
        table = {
            "content": content.object_id,
            "state": state.object_id,
            "objects": [[object_id, len(data)] for object_id, data in contents.items()],
        }
    header = json.dumps(table).encode()
    body = [_LENGTH.pack(len(header)), header, *contents.values()]
    sha = hashlib.sha256()
    for piece in body:
        sha.update(piece)
    yield from (_MAGIC, sha.digest(), *body)


def _decode(data: bytes) -> tuple[RecordDict, RecordDict]:
    start = len(_MAGIC) + _SHA_BYTES
    rest = memoryview(data)[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(rest).digest() != data[len(_MAGIC) : start]:
        raise ValueError("its bytes do not match their SHA-256")
    (length,) = _LENGTH.unpack_from(rest)
    position = _LENGTH.size + length
    table = json.loads(bytes(rest[_LENGTH.size : position]))
    contents: dict[str, bytes] = {}
    for object_id, size in table["objects"]:
        contents[object_id] = bytes(rest[position : position + size])
        position += size
    return _inflated(table["content"], contents), _inflated(table["state"], contents)


def _inflated(object_id: str, contents: dict[str, bytes]) -> RecordDict:
    record = inflate_object_from_contents(object_id, contents, keep_object_contents=True)
    if not isinstance(record, RecordDict):
        raise TypeError(f"it holds a {type(record).__name__}")
    return record


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)
