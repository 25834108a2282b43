"""What a run needs to go on: its arrays, the strategy's state, the history; never pickle.

A checkpoint is one main blob, a safetensors file with the small arrays, and one blob of raw bytes
(a part) for each array of 256 KiB and more. An array that has not changed since the round before
keeps its digest and is neither stored nor sent again. Importing this module does not import numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from os import fstat
from typing import TYPE_CHECKING, Any

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.batches import Batch
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import CHUNK_BYTES, Buffer
from flwr_ha.storage.manifest import GROUPS, ArrayInfo, Manifest, read_manifest
from flwr_ha.storage.tensorfile import Header, TensorEntry, format_header, layout

if TYPE_CHECKING:
    from flwr_ha.storage.arrays import Array

PART_BYTES = 256 * 1024
_THREADS = 2  # one hashes while another waits for the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Hold all that a run needs to go on after a round.

    Attributes
    ----------
    run_id : str
        Flower's run id, unsigned decimal.
    server_round : int
        Round that it ends, counts from 1; 0 is the initial model.
    num_rounds : int
        Rounds that the run is to have.
    arrays : dict of str to ndarray
        The model; any shape, any dtype but object; the order is kept.
    strategy_arrays : dict of str to ndarray
        Arrays of the strategy (momenta), the same.
    state : Mapping of str to Any
        The strategy's plain values and the configs: JSON, with NaN and infinity; floats are exact,
        tuples come back as lists and keys as strings.
    history : Mapping of str to Any
        Metrics of all rounds so far, the same.
    """

    run_id: str
    server_round: int
    num_rounds: int
    arrays: dict[str, Array]
    strategy_arrays: dict[str, Array] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """Name the blobs of a checkpoint.

    Attributes
    ----------
    digest : str
        Main blob.
    parts : tuple of str
        Blobs of the large arrays, each once.
    model_digest : str
        Covers the model's arrays alone.
    size_bytes : int
        Main blob and parts, in bytes.
    """

    digest: str
    parts: tuple[str, ...]
    model_digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """Hold one array on its way into the store; `data` is None once it lies in a part blob."""

    key: str
    info: ArrayInfo
    digest: str
    size_bytes: int
    data: memoryview | None


def save(
    checkpoint: Checkpoint, store: BlobStore, *, on_part: Callable[[str], None] = lambda _: None
) -> SavedCheckpoint:
    """Store a checkpoint; equal checkpoints give equal digests.

    Parameters
    ----------
    checkpoint : Checkpoint
        What to store; its arrays must not change meanwhile.
    store : BlobStore
        Where to.
    on_part : callable
        Gets the digest of each part as soon as `BlobStore.open_to_send` finds it, from several threads.

    Raises
    ------
    CheckpointError
        The disk refuses, or something in it is neither JSON nor a plain array; the message names
        it. Blobs that were stored before that are collected later.
    """
    from flwr_ha.storage.arrays import SAFETENSORS, combined_digest, digest_of

    batch = Batch(store)
    named = [(f"{group}/{name}", array) for group in GROUPS for name, array in getattr(checkpoint, group).items()]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-save") as pool:
        packed = list(pool.map(lambda item: _pack(item[0], item[1], batch, on_part), named))
    inline = [item for item in packed if item.data is not None]
    entries = layout([_place(item, SAFETENSORS) for item in inline])
    manifest = Manifest(
        run_id=checkpoint.run_id,
        server_round=checkpoint.server_round,
        num_rounds=checkpoint.num_rounds,
        order=tuple(item.key for item in packed),
        described={item.key: item.info for item in packed if _is_described(item, SAFETENSORS)},
        state=checkpoint.state,
        history=checkpoint.history,
    )
    head = format_header(entries, manifest.to_metadata())
    main: list[Buffer] = [head, *(item.data for item in inline if item.data is not None)]
    digest = digest_of(*main)
    batch.put(digest, main)
    batch.finish()
    parts = {item.digest: item.size_bytes for item in packed if item.data is None}
    return SavedCheckpoint(
        digest=digest,
        parts=tuple(parts),
        model_digest=combined_digest(
            (key.removeprefix("arrays/"), item.info.dtype, item.info.shape, item.digest)
            for key, item in zip(manifest.order, packed, strict=True)
            if key.startswith("arrays/")
        ),
        size_bytes=len(head) + sum(item.size_bytes for item in inline) + sum(parts.values()),
    )


def _pack(key: str, array: Array, batch: Batch, on_part: Callable[[str], None]) -> _Packed:
    from flwr_ha.storage.arrays import describe, digest_of, raw_bytes

    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{key!r} cannot name an array in a checkpoint: it is not Unicode text") from error
    dtype = describe(key, array.dtype)
    data = raw_bytes(array)
    digest = digest_of(data)
    is_part = len(data) >= PART_BYTES
    if is_part:
        batch.put(digest, [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)])
        on_part(digest)
    return _Packed(
        key=key,
        info=ArrayInfo(dtype=dtype, shape=array.shape, digest=digest if is_part else ""),
        digest=digest,
        size_bytes=len(data),
        data=None if is_part else data,
    )


def _is_described(item: _Packed, codes: Mapping[str, str]) -> bool:
    return item.data is None or not isinstance(item.info.dtype, str) or item.info.dtype not in codes


def _place(item: _Packed, codes: Mapping[str, str]) -> tuple[str, str, tuple[int, ...]]:
    if _is_described(item, codes):
        return item.key, "U8", (item.size_bytes,)
    return item.key, codes[item.info.dtype], item.info.shape


class CheckpointReader:
    """Read one checkpoint piece by piece; `opened` makes it."""

    def __init__(self, file: BufferedReader, header: Header, manifest: Manifest, store: BlobStore) -> None:
        self.manifest = manifest
        self._file = file
        self._store = store
        self._entries: dict[str, TensorEntry] = {entry.name: entry for entry in header.entries}
        self._start = header.size_bytes

    def array(self, key: str) -> Array:
        """Return a new, writable array; parts may be read by several threads at once.

        Raises
        ------
        CheckpointCorruptError
            Its bytes are missing, or not what they must be: take another copy.
        """
        from flwr_ha.storage.arrays import SAFETENSORS, empty_array

        info = self.manifest.described.get(key)
        if info is not None and info.digest:
            array, buffer = empty_array(info.dtype, info.shape, self._store.size(info.digest))
            self._store.read_into(info.digest, buffer)
            return array
        entry = self._entries[key]
        if info is None:
            dtypes = {code: dtype for dtype, code in SAFETENSORS.items()}
            info = ArrayInfo(dtype=dtypes[entry.dtype], shape=entry.shape)
        array, buffer = empty_array(info.dtype, info.shape, entry.end - entry.start)
        self._file.seek(self._start + entry.start)
        if self._file.readinto(buffer) != len(buffer):
            raise CheckpointCorruptError(f"array {key!r} of a checkpoint is cut off")
        return array


@contextmanager
def opened(digest: str, store: BlobStore) -> Iterator[CheckpointReader]:
    """Open a checkpoint for reading; errors as in `load`."""
    with store.open(digest) as file:
        try:
            header, manifest = read_manifest(file, fstat(file.fileno()).st_size)
        except CheckpointError as error:
            raise type(error)(f"{digest}: {error}") from error
        yield CheckpointReader(file, header, manifest, store)


def load(digest: str, store: BlobStore) -> Checkpoint:
    """Return a checkpoint whose arrays are new and writable.

    Raises
    ------
    CheckpointCorruptError
        A blob is missing (`BlobMissingError`) or bad (`BlobCorruptError`, moved away); these two
        say which in `digest`: fetch it from a peer, load again. Otherwise the checkpoint itself is
        no good: take an older one.
    CheckpointError
        A newer flwr_ha has made it: install that one.
    """
    with opened(digest, store) as reader:
        manifest = reader.manifest
        parts = [key for key, info in manifest.described.items() if info.digest]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-load") as pool:
            loaded = dict(zip(parts, pool.map(reader.array, parts), strict=True))
        loaded |= {key: reader.array(key) for key in manifest.order if key not in loaded}
    groups: dict[str, dict[str, Array]] = {group: {} for group in GROUPS}
    for key in manifest.order:
        group, _, name = key.partition("/")
        groups[group][name] = loaded[key]
    return Checkpoint(
        run_id=manifest.run_id,
        server_round=manifest.server_round,
        num_rounds=manifest.num_rounds,
        state=manifest.state,
        history=manifest.history,
        **groups,
    )


def references(digest: str, store: BlobStore) -> tuple[str, ...]:
    """Return the digests of the parts that a checkpoint needs; errors as in `load`."""
    with opened(digest, store) as reader:
        return reader.manifest.parts


def model_digest(arrays: Mapping[str, Array]) -> str:
    """Return the digest of a model: names in order, dtypes, shapes and bytes of its arrays, no more."""
    from flwr_ha.storage import arrays as plain

    return plain.model_digest(arrays)
