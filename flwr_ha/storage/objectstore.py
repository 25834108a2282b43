"""Blobs in a store that is durable by itself (S3, GCS, Azure, NFS): its word replaces the majority."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import PREFIX, is_digest, validate_digest
from flwr_ha.storage.files import CHUNK_BYTES

_AT_ONCE = 4
_REFRESH_S = 3600.0
_T = TypeVar("_T")


class _Objects(Protocol):
    """Hold the blobs; raises what it likes."""

    def put(self, store: BlobStore, digest: str) -> None:
        """Store a blob durably, as a whole or not at all."""
        ...

    def chunks(self, digest: str) -> Iterator[bytes]:
        """Read a blob, unverified."""
        ...

    def collect(self, keep: Collection[str], min_age_s: float) -> tuple[str, ...]:
        """Remove blobs that are old and not to be kept."""
        ...


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
        self._objects: _Objects
        if url.startswith("file://"):
            self._objects = _Folder(BlobStore(Path(url.removeprefix("file://"))))
        else:
            self._objects = _Bucket(*_open_file_system(url, options or {}))
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="object-storage")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Start nothing more; may be called twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)

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

    def collect(self, keep: Collection[str], *, min_age_s: float) -> tuple[str, ...]:
        """Remove what nobody names any more; parameters as in `BlobStore.collect`.

        Objects younger than two hours stay in any case: `protect` stores an object anew that is
        older than one, so that an old leader that still collects cannot remove what a new one needs.
        """
        return self._explained("collect old blobs", lambda: self._objects.collect(keep, min_age_s))

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
            yield chunk

    def _each(self, task: Callable[[str], None], digests: Sequence[str], timeout_s: float) -> None:
        for digest in digests:
            validate_digest(digest)
        futures = [self._pool.submit(task, digest) for digest in dict.fromkeys(digests)]
        done, missing = wait(futures, timeout_s)
        for future in missing:
            future.cancel()
        for future in done:
            future.result()
        if missing:
            raise CheckpointError(f"{self._url} has not answered within {timeout_s:g} s")

    def _explained(self, what: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"cannot {what} in {self._url}: it is not there") from error
        except Exception as error:  # every library behind fsspec has errors of its own
            raise CheckpointError(f"cannot {what} in {self._url}: {error or type(error).__name__}") from error


class _Folder:
    """A folder that all replicas see; the same layout and the same care as a replica's own blobs."""

    def __init__(self, folder: BlobStore) -> None:
        self._folder = folder

    def put(self, store: BlobStore, digest: str) -> None:
        with store.open_unverified(digest) as file:
            self._folder.put_known(digest, iter(lambda: file.read(CHUNK_BYTES), b""))

    def chunks(self, digest: str) -> Iterator[bytes]:
        with self._folder.path(digest).open("rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")

    def collect(self, keep: Collection[str], min_age_s: float) -> tuple[str, ...]:
        return self._folder.collect(keep, min_age_s=max(min_age_s, 2 * _REFRESH_S))


class _Bucket:
    """A file system of fsspec whose objects appear as a whole."""

    def __init__(self, system: Any, prefix: str) -> None:
        self._system = system
        self._folder = f"{prefix.rstrip('/')}/blobs"

    def put(self, store: BlobStore, digest: str) -> None:
        key, size = self._key(digest), store.size(digest)
        if self._size(key) == size and self._age_s(key) < _REFRESH_S:
            return
        self._system.makedirs(self._folder, exist_ok=True)
        self._system.put_file(str(store.path(digest)), key)
        found = self._size(key)
        if found != size:
            raise OSError(f"{size} bytes were sent, {found} are there")

    def chunks(self, digest: str) -> Iterator[bytes]:
        with self._system.open(self._key(digest), "rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")

    def collect(self, keep: Collection[str], min_age_s: float) -> tuple[str, ...]:
        if not self._system.exists(self._folder):
            return ()
        named = {self._key(digest) for digest in keep}
        gone = []
        for key in sorted(self._system.find(self._folder)):
            digest = PREFIX + key.rpartition("/")[2]
            is_old = is_digest(digest) and self._key(digest) not in named
            if is_old and self._age_s(self._key(digest)) >= max(min_age_s, 2 * _REFRESH_S):
                self._system.rm_file(self._key(digest))
                gone.append(digest)
        return tuple(gone)

    def _key(self, digest: str) -> str:
        return f"{self._folder}/{digest.removeprefix(PREFIX)}"

    def _size(self, key: str) -> int | None:
        try:
            return int(self._system.info(key)["size"])
        except FileNotFoundError:
            return None

    def _age_s(self, key: str) -> float:
        return float((datetime.now(UTC) - self._system.modified(key)).total_seconds())


def _open_file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return fsspec's file system and the path in it."""
    try:
        import fsspec

        system, prefix = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise ConfigError(
            f"storage = {url!r} needs a package that is not installed ({error}): pip install 'flwr-ha[s3]'"
        ) from error
    except ValueError as error:
        raise ConfigError(f"storage = {url!r} is no storage that is known: {error}") from error
    return system, prefix
