"""Between Flower's ArrayRecord and numpy, without copies and in one canonical form."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

NUMPY = "numpy.ndarray"  # flwr.common.constant.SType.NUMPY


def view(array: Array) -> NDArray[Any]:
    """Return an Array's values as a read-only view of its bytes.

    Parameters
    ----------
    array : Array
        Serialized by numpy.

    Returns
    -------
    ndarray
        Any shape and dtype; Fortran order where it was saved so.

    Raises
    ------
    ValueError
        The bytes are not what ``numpy.save`` writes, or hold objects: reject them.
    """
    if array.stype != NUMPY:
        raise ValueError(f"it is serialized as {array.stype!r}, not by numpy")
    data = array.data  # read once: it may come from disk
    version = np.lib.format.read_magic(io.BytesIO(data))
    if version not in ((1, 0), (2, 0)):
        return np.load(io.BytesIO(data), allow_pickle=False)  # type: ignore[no-any-return]  # npy, not npz
    start = 10 if version == (1, 0) else 12
    start += int.from_bytes(data[8:start], "little")
    shape, is_fortran, dtype = _header(data[:start])
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    count = math.prod(shape)
    if count * dtype.itemsize != len(data) - start:
        raise ValueError(f"its bytes do not fit the shape {shape} of {dtype}")
    if count == 0 or dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    flat: NDArray[Any] = np.frombuffer(data, dtype=dtype, count=count, offset=start)
    return flat.reshape(shape, order="F" if is_fortran else "C")


@lru_cache(maxsize=1024)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return what a header says; numpy compiles it as Python, and all replies have the same ones."""
    read = np.lib.format.read_array_header_1_0 if data[6] == 1 else np.lib.format.read_array_header_2_0
    buffer = io.BytesIO(data)
    np.lib.format.read_magic(buffer)
    return read(buffer)


def canonical(record: ArrayRecord) -> ArrayRecord:
    """Return the record as a checkpoint would give it back.

    The content hash of a message covers how an array is laid out. A client finds its cached reply
    after a failover only if the arrays are sent in the same form as before it.
    """
    if all(_is_canonical(array) for array in record.values()):
        return record
    return unpack(*pack(record))


def _is_canonical(array: Array) -> bool:
    if array.stype != NUMPY:
        return True
    values = view(array)
    is_described = array.dtype == str(values.dtype) and tuple(array.shape) == values.shape
    return is_described and values.flags.c_contiguous and array.data[6:8] == b"\x01\x00"


def pack(record: ArrayRecord) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
    """Return the arrays of a record, and what numpy cannot say about those of another serialization."""
    arrays: dict[str, NDArray[Any]] = {}
    foreign: dict[str, list[Any]] = {}
    for name, array in record.items():
        if array.stype == NUMPY:
            arrays[name] = view(array)
        else:
            arrays[name] = np.frombuffer(array.data, np.uint8) if array.data else np.zeros(0, np.uint8)
            foreign[name] = [array.dtype, list(array.shape), array.stype]
    return arrays, foreign


def unpack(arrays: Mapping[str, NDArray[Any]], foreign: Mapping[str, Sequence[Any]]) -> ArrayRecord:
    """Return the record that ``pack`` took apart, in canonical form."""
    record = ArrayRecord()
    for name, values in arrays.items():
        if name in foreign:
            dtype, shape, stype = foreign[name]
            record[name] = Array(dtype, tuple(shape), stype, values.tobytes())
        else:
            record[name] = Array(values if values.flags.c_contiguous else values.copy(order="C"))
    return record
