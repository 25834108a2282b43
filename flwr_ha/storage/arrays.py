"""numpy arrays as plain bytes and back, every dtype but object; the only part of storage that needs numpy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.digests import PREFIX
from flwr_ha.storage.files import Buffer

Array = np.ndarray[Any, Any]

SAFETENSORS = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<u2": "U16",
    "<i2": "I16",
    "<f2": "F16",
    "<u4": "U32",
    "<i4": "I32",
    "<f4": "F32",
    "<u8": "U64",
    "<i8": "I64",
    "<f8": "F64",
}


def describe(name: str, dtype: np.dtype[Any]) -> Any:
    """Return a dtype as JSON: numpy's own description (``<f4``, or a list of fields).

    Raises
    ------
    CheckpointError
        Its values are Python objects, or numpy's description does not lead back to it: convert the
        array. The message says which.
    """
    if not dtype.hasobject:
        described: Any = np.lib.format.dtype_to_descr(dtype)
        if np.lib.format.descr_to_dtype(described) == dtype:
            return json.loads(json.dumps(described))
    raise CheckpointError(f"array {name!r} cannot be put in a checkpoint: its dtype is {dtype}")


def dtype_from(described: Any) -> np.dtype[Any]:
    """Return the dtype that `describe` described; raise `CheckpointCorruptError` if it never did."""
    try:
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(_with_tuples(described))
    except (TypeError, ValueError, KeyError, IndexError, RecursionError, SyntaxError, OverflowError) as error:
        raise CheckpointCorruptError(f"a checkpoint names an unknown dtype {str(described)[:100]!r}") from error
    if dtype.hasobject:
        raise CheckpointCorruptError("a checkpoint names a dtype of Python objects")
    return dtype


def _with_tuples(described: Any) -> Any:
    """Turn JSON's lists into the tuples that numpy wants: a field, its title, its shape."""
    if not isinstance(described, list):
        return described
    fields = []
    for name, base, *shape in described:
        title = tuple(name) if isinstance(name, list) else name
        fields.append((title, _with_tuples(base), *(tuple(sizes) for sizes in shape)))
    return fields


def raw_bytes(array: Array) -> memoryview:
    """Return the bytes of an array in C order, its own memory where it lies so."""
    if array.nbytes == 0:
        return memoryview(b"")
    flat = np.asarray(array, order="C").reshape(-1)
    return flat.view(np.uint8).data


def digest_of(*chunks: Buffer) -> str:
    """Return the digest of bytes, which may come in pieces."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return PREFIX + sha.hexdigest()


def empty_array(described: Any, shape: tuple[int, ...], size_bytes: int) -> tuple[Array, memoryview]:
    """Return a new array and a view of its bytes, to be filled.

    Raises
    ------
    CheckpointCorruptError
        `size_bytes` are not what dtype and shape need; no memory is taken then.
    """
    dtype = dtype_from(described)
    if math.prod(shape) * dtype.itemsize != size_bytes:
        raise CheckpointCorruptError(f"an array of {shape} {dtype} cannot have {size_bytes} bytes")
    if size_bytes == 0:
        return np.empty(shape, dtype), memoryview(bytearray())
    data = np.empty(size_bytes, np.uint8)
    return data.view(dtype).reshape(shape), data.data


def combined_digest(arrays: Iterable[tuple[str, Any, tuple[int, ...], str]]) -> str:
    """Return the digest over (name, described dtype, shape, digest of the bytes) of each array.

    Notes
    -----
    Each array adds 8 bytes (little-endian length) and that many bytes of JSON, so that no two
    models can run into each other, and no byte of an array is read twice.
    """
    sha = hashlib.sha256()
    for name, described, shape, digest in arrays:
        line = json.dumps([name, described, list(shape), digest], separators=(",", ":")).encode()
        sha.update(len(line).to_bytes(8, "little") + line)
    return PREFIX + sha.hexdigest()


def model_digest(arrays: Mapping[str, Array]) -> str:
    """Return the digest of a model: names in order, dtypes, shapes and bytes of its arrays, no more.

    Raises
    ------
    CheckpointError
        An array holds Python objects.
    """
    return combined_digest(
        (name, describe(name, array.dtype), array.shape, digest_of(raw_bytes(array))) for name, array in arrays.items()
    )
