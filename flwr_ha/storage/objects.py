"""Where shared blobs lie: in a folder that all replicas see, or in a bucket behind fsspec."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Protocol

from flwr_ha.errors import ConfigError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import PREFIX, is_digest
from flwr_ha.storage.files import CHUNK_BYTES, locked

REFRESH_S = 3600.0
"""An object that is older is stored anew when somebody needs it, in seconds."""
GRACE_S = 2 * REFRESH_S
"""An object that is younger is never removed, in seconds."""
_CLOCK_S = 60.0


class Objects(Protocol):
    """Hold blobs for all replicas; each method raises what the library behind it likes."""

    def put(self, store: BlobStore, digest: str) -> None:
        """Store a blob durably, as a whole or not at all."""
        ...

    def chunks(self, digest: str) -> Iterator[bytes]:
        """Read a blob, unverified."""
        ...

    def digests(self) -> tuple[str, ...]:
        """List the blobs."""
        ...

    def is_old(self, digest: str) -> bool:
        """Whether a blob is there and was last stored `GRACE_S` ago or earlier, by the store's own clock."""
        ...

    def remove_old(self, digest: str) -> bool:
        """Remove a blob if it is old at this moment, and say whether it was."""
        ...


class Folder:
    """A folder that all replicas see; the same layout and the same care as a replica's own blobs."""

    def __init__(self, folder: BlobStore) -> None:
        self._folder = folder
        self._lock = folder.root / "lock"

    def put(self, store: BlobStore, digest: str) -> None:
        """See `Objects`."""
        with store.open_unverified(digest) as file:
            self._folder.put_known(digest, iter(lambda: file.read(CHUNK_BYTES), b""))

    def chunks(self, digest: str) -> Iterator[bytes]:
        """See `Objects`."""
        with self._folder.path(digest).open("rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")

    def digests(self) -> tuple[str, ...]:
        """See `Objects`."""
        return self._folder.digests()

    def is_old(self, digest: str) -> bool:
        """See `Objects`."""
        with suppress(FileNotFoundError):
            return self._age_s(digest) >= GRACE_S
        return False

    def remove_old(self, digest: str) -> bool:
        """See `Objects`; under the lock that `BlobStore.refresh` takes before it calls a blob good."""
        with locked(self._lock):
            is_old = self.is_old(digest)
            if is_old:
                self._folder.delete(digest)
        return is_old

    def _age_s(self, digest: str) -> float:
        """Return seconds since the last change, by the clock of the file system: it may be another machine's."""
        changed_s = self._folder.path(digest).stat().st_ctime
        self._lock.touch(mode=0o600)
        return self._lock.stat().st_ctime - changed_s


class Bucket:
    """A file system of fsspec whose objects appear as a whole."""

    def __init__(self, system: Any, prefix: str) -> None:
        self._system = system
        self._folder = f"{prefix.rstrip('/')}/blobs"
        self._clock = f"{prefix.rstrip('/')}/clock"
        self._clock_lock = threading.Lock()
        self._seen: datetime | None = None
        self._seen_s = 0.0

    def put(self, store: BlobStore, digest: str) -> None:
        """See `Objects`."""
        key, size = self._key(digest), store.size(digest)
        if self._size(key) == size and self._age_s(key) < REFRESH_S:
            return
        self._system.makedirs(self._folder, exist_ok=True)
        self._system.put_file(str(store.path(digest)), key)
        found = self._size(key)
        if found != size:
            raise OSError(f"{size} bytes were sent, {found} are there")

    def chunks(self, digest: str) -> Iterator[bytes]:
        """See `Objects`."""
        with self._system.open(self._key(digest), "rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")

    def digests(self) -> tuple[str, ...]:
        """See `Objects`."""
        if not self._system.exists(self._folder):
            return ()
        names = (PREFIX + key.rpartition("/")[2] for key in self._system.find(self._folder))
        return tuple(sorted(name for name in names if is_digest(name)))

    def is_old(self, digest: str) -> bool:
        """See `Objects`."""
        with suppress(FileNotFoundError):
            return self._age_s(self._key(digest)) >= GRACE_S
        return False

    def remove_old(self, digest: str) -> bool:
        """See `Objects`; another replica may store the object anew between the look and the removal."""
        is_old = self.is_old(digest)
        if is_old:
            self._system.rm_file(self._key(digest))
        return is_old

    def _key(self, digest: str) -> str:
        return f"{self._folder}/{digest.removeprefix(PREFIX)}"

    def _size(self, key: str) -> int | None:
        try:
            return int(self._system.info(key)["size"])
        except FileNotFoundError:
            return None

    def _age_s(self, key: str) -> float:
        return float((self._now() - self._system.modified(key)).total_seconds())

    def _now(self) -> datetime:
        """Return the time of the store's own clock: that of this machine may be hours wrong."""
        with self._clock_lock:
            boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
            if self._seen is None or boot_s - self._seen_s > _CLOCK_S:
                self._system.makedirs(self._folder, exist_ok=True)
                self._system.pipe_file(self._clock, b"")
                self._seen, self._seen_s = self._system.modified(self._clock), boot_s
            return self._seen + timedelta(seconds=boot_s - self._seen_s)


def open_file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
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
