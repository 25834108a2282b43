"""The header of a safetensors file, written and read with the standard library alone.

Notes
-----
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, a JSON object, then
the tensors without gaps). The agent reads headers and must not load numpy, and `checkpoint`
writes tensors straight from memory while hashing; the safetensors library offers neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from flwr_ha.errors import CheckpointCorruptError, CheckpointError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_METADATA = "__metadata__"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Say where one tensor lies.

    Attributes
    ----------
    name : str
        Its name.
    dtype : str
        Type in the words of safetensors (``F32``).
    shape : tuple of int
        Its shape.
    start, end : int
        Its bytes, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Hold what precedes the tensors of a file.

    Attributes
    ----------
    metadata : Mapping of str to str
        What the writer said about the file.
    entries : tuple of TensorEntry
        Tensors in the order of their bytes.
    size_bytes : int
        Where the tensors start in the file.
    """

    metadata: Mapping[str, str]
    entries: tuple[TensorEntry, ...]
    size_bytes: int


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; raise `CheckpointCorruptError` for a key that comes twice and for what is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"a checkpoint's header is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorEntry, ...]:
    """Place tensors, given as (name, dtype, shape), one behind the other."""
    entries, end = [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries.append(TensorEntry(name=name, dtype=dtype, shape=shape, start=start, end=end))
    return tuple(entries)


def format_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes that precede the tensors; equal input gives equal bytes.

    Raises
    ------
    CheckpointError
        They would be more than `parse_header` takes: keep less in plain values, and more in arrays.
    """
    fields: dict[str, Any] = {_METADATA: dict(metadata)}
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # readers may map the tensors, which likes alignment
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"names, state and metrics take {len(text)} bytes of JSON in a checkpoint, more than {MAX_HEADER_BYTES}: "
            "let the strategy keep what is big in arrays, or not at all"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def parse_header(file: BinaryIO, file_bytes: int) -> Header:
    """Read and check the header at the start of a file.

    Parameters
    ----------
    file : BinaryIO
        The file, at its start.
    file_bytes : int
        Its size; what the header says is held against it before memory is taken.

    Raises
    ------
    CheckpointCorruptError
        It is not the header of a safetensors file of this size: take another copy.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if file_bytes < _LENGTH_BYTES or length > min(file_bytes - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise CheckpointCorruptError(f"a checkpoint of {file_bytes} bytes cannot have a header of {length} bytes")
    fields = strict_json(file.read(length))
    if not isinstance(fields, dict):
        raise CheckpointCorruptError("a checkpoint's header is not a JSON object")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointCorruptError("a checkpoint's metadata is not an object of strings")
    entries = sorted((_entry(name, field) for name, field in fields.items()), key=lambda e: (e.start, e.end))
    end = 0
    for entry in entries:
        if entry.start != end:
            raise CheckpointCorruptError(f"tensor {entry.name!r} of a checkpoint overlaps another or leaves a gap")
        end = entry.end
    if _LENGTH_BYTES + length + end != file_bytes:
        raise CheckpointCorruptError(f"a checkpoint's tensors end at byte {end}, its file elsewhere")
    return Header(metadata=metadata, entries=tuple(entries), size_bytes=_LENGTH_BYTES + length)


def _entry(name: str, field: Any) -> TensorEntry:
    match field:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            dtype in ITEM_BYTES and is_shape(shape) and is_shape([start, end])
        ):
            if math.prod(shape) * ITEM_BYTES[dtype] == end - start:
                return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), start=start, end=end)
    raise CheckpointCorruptError(f"tensor {name!r} of a checkpoint is described wrongly")


def is_shape(value: Any) -> bool:
    """Whether a parsed JSON value is a list of at most 64 plain numbers from 0 to 2**63."""
    return (
        isinstance(value, list)
        and len(value) <= 64  # numpy's limit
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
