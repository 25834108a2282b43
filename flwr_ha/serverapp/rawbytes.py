"""A ``bytes`` object whose content is written once, in place: results of a model's size are not copied."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

_HUGE_FROM_BYTES = 4 << 20
_PAGE_BYTES = mmap.PAGESIZE

_libc = ctypes.CDLL(None)
_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_ssize_t]
_address = ctypes.pythonapi.PyBytes_AsString
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object]


def new_bytes(size_bytes: int) -> tuple[bytes, NDArray[np.uint8]]:
    """Return bytes that are not filled yet, and the view through which they must be.

    Parameters
    ----------
    size_bytes : int
        Their number; 2 or more, since shorter ones are shared by the interpreter.

    Returns
    -------
    data : bytes
        Give it away only when it is filled: from then on it must never change.
    memory : ndarray
        (size_bytes,) uint8, writable; keep `data` as long as this is in use.

    Notes
    -----
    Python's documentation of ``PyBytes_FromStringAndSize`` allows just this for a new object. Big
    ones ask for huge pages, as numpy does for its arrays: filling them costs half the time.
    """
    data: bytes = _new(None, size_bytes)
    address = _address(data)
    if size_bytes >= _HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-address // _PAGE_BYTES) * _PAGE_BYTES
        length = (address + size_bytes - start) // _PAGE_BYTES * _PAGE_BYTES
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    memory = np.ctypeslib.as_array((ctypes.c_ubyte * size_bytes).from_address(address))
    return data, memory
