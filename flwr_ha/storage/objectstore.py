"""Blobs in a store that is durable by itself (S3, GCS, Azure, NFS): its word replaces the majority."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, HaError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import validate_digest
from flwr_ha.storage.objects import Bucket, Folder, Objects, open_file_system

_AT_ONCE = 4
_FILE = "file://"
_T = TypeVar("_T")


def folders_below(url: str) -> tuple[str, ...]:
    """List the folders directly below a URL that `ObjectStorage` may have been given.

    Parameters
    ----------
    url : str
        As for `ObjectStorage`.

    Returns
    -------
    tuple of str
        Their URLs, sorted; none where nothing is stored there yet.

    Raises
    ------
    CheckpointError
        The store does not answer, or refuses.
    ConfigError
        The URL is unknown, or the package that it needs is not installed; says which.
    """
    prefix = url.rstrip("/")

    def names() -> list[str]:
        if url.startswith(_FILE):
            # Not every folder: to open one that holds no blobs would make an empty store of it.
            return [found.parent.name for found in Path(prefix.removeprefix(_FILE)).glob("*/blobs")]
        system, path = open_file_system(prefix, {})
        try:
            entries = system.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    return tuple(f"{prefix}/{name}" for name in sorted(_explained("list folders", url, names)))


class ObjectStorage:
    """Keep blobs under an fsspec URL, as ``<prefix>/blobs/<hex>``; a stand-in for `Replicator`.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, ``memory://prefix``, … or ``file:///shared/folder``, which is written
        with fsync and needs no fsspec.
    store : BlobStore
        The own copies.
    options : Mapping of str to Any
        Settings for the fsspec file system (``endpoint_url``, ``key``, …).

    Raises
    ------
    ConfigError
        The URL is unknown, or the package that it needs is not installed; says which.
    """

    def __init__(self, url: str, store: BlobStore, *, options: Mapping[str, Any] | None = None) -> None:
        self._store = store
        self._url = url
        self._objects: Objects
        if url.startswith(_FILE):
            self._objects = Folder(BlobStore(Path(url.removeprefix(_FILE))))
        else:
            self._objects = Bucket(*open_file_system(url, options or {}))
        self._is_closed = threading.Event()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="object-storage")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way soon, from any thread; may be called twice."""
        self._is_closed.set()
        self._pool.shutdown(wait=False)  # what waits begins, and fails: its caller waits for it

    def protect(self, digests: Sequence[str], *, needed: int = 0, timeout_s: float) -> tuple[int, ...]:
        """Store the blobs; return no ids, since no replica is needed for their safety.

        Parameters
        ----------
        digests : Sequence of str
            Blobs in the own store.
        needed : int
            Not used; `Replicator` has it.
        timeout_s : float
            Longest wait, in seconds.

        Raises
        ------
        CheckpointCorruptError
            The own copy is missing or bad: save again.
        CheckpointError
            Not all are stored: nothing is committed, try again later.
        """
        self._each(self._put, digests, timeout_s)
        return ()

    def offer(self, digests: Sequence[str]) -> None:
        """Do nothing: `protect` stores several at once, and what is never committed costs nothing."""

    def fetch(self, digests: Sequence[str], *, timeout_s: float) -> None:
        """Put good copies of the blobs into the own store.

        Parameters
        ----------
        digests : Sequence of str
            What is needed; good copies that are there already are kept.
        timeout_s : float
            Longest time for all, in seconds.

        Raises
        ------
        CheckpointCorruptError
            What is stored does not match its digest: take an older checkpoint.
        CheckpointError
            One is not there, or not in time.
        """
        self._each(self._get, [digest for digest in digests if not self._store.is_good(digest)], timeout_s)

    def collect(
        self, needed: Callable[[], Collection[str]], *, may_remove: Callable[[], bool], timeout_s: float
    ) -> tuple[str, ...]:
        """Remove what nobody needs any more, and store again what is needed but not there.

        Parameters
        ----------
        needed : callable
            Returns all digests that must stay, read after this call; raises `HaError` where it does not know
            all of them.
        may_remove : callable
            Whether the caller may still act for the cluster; asked before each removal.
        timeout_s : float
            Longest time for storing again, in seconds.

        Returns
        -------
        tuple of str
            Digests of the removed blobs.

        Notes
        -----
        Any number of replicas may call it by mistake, and each may be stopped at any point. A commit begins
        with `protect`, which stores an object anew that is older than an hour; what is removed is older than
        two. So an object that is old in the listing is in use only if it was committed before, and then
        `needed`, which is read after the listing, has it; or if it was stored again since, and then it is not
        old any more when it is looked at once more. A folder is locked between that look and the removal. A
        bucket is not: a replica that is frozen between the two for so long that another one commits these
        very bytes removes them afterwards, and the new leader's next call stores them again from its own disk.
        """
        there = self._explained("list blobs", self._objects.digests)
        old = [
            digest for digest in there if self._explained(f"look at {digest}", partial(self._objects.is_old, digest))
        ]
        needed_now = frozenset(needed())
        self.protect(sorted(needed_now.difference(there)), timeout_s=timeout_s)
        gone = []
        for digest in old:
            if digest in needed_now:
                continue
            if not may_remove():
                break
            if self._explained(f"remove {digest}", partial(self._objects.remove_old, digest)):
                gone.append(digest)
        return tuple(gone)

    def _put(self, digest: str) -> None:
        self._store.verify(digest)  # nobody else looks at the bytes before they are needed
        self._explained(f"store {digest}", lambda: self._objects.put(self._store, digest))

    def _get(self, digest: str) -> None:
        try:
            self._store.put_known(digest, self._chunks(digest))
        except CheckpointCorruptError as error:
            raise CheckpointCorruptError(f"the copy of {digest} in {self._url} is corrupt") from error

    def _chunks(self, digest: str) -> Iterator[bytes]:
        chunks = self._objects.chunks(digest)
        while chunk := self._explained(f"read {digest}", lambda: next(chunks, b"")):
            self._check_is_open()
            yield chunk

    def _each(self, task: Callable[[str], None], digests: Sequence[str], timeout_s: float) -> None:
        for digest in digests:
            validate_digest(digest)
        self._check_is_open()

        def act(digest: str) -> None:
            self._check_is_open()
            task(digest)

        futures = [self._pool.submit(act, digest) for digest in dict.fromkeys(digests)]
        done, missing = wait(futures, timeout_s)
        for future in missing:
            future.cancel()
        for future in done:
            future.result()
        if missing:
            raise CheckpointError(f"{self._url} has not answered within {timeout_s:g} s")

    def _check_is_open(self) -> None:
        if self._is_closed.is_set():
            raise CheckpointError(f"{self._url} is not used any more: the replica ends")

    def _explained(self, what: str, call: Callable[[], _T]) -> _T:
        return _explained(what, self._url, call)


def _explained(what: str, url: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except HaError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot {what} in {url}: it is not there") from error
    except Exception as error:  # every library behind fsspec has errors of its own
        raise CheckpointError(f"cannot {what} in {url}: {error or type(error).__name__}") from error
