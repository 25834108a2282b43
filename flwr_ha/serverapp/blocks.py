"""The values of an Array, block by block: from its bytes in memory, or from where they are kept on disk."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from flwr_ha.serverapp.arrays import view
from flwr_ha.serverapp.spill import SpilledArray


class Blocks(Protocol):
    """Give the values of one array in C order, a piece at a time."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the elements from `start` to `stop`, (stop - start,); valid until the next call."""
        ...


class BlocksInMemory:
    """Give views of the bytes that an Array holds.

    Parameters
    ----------
    array : Array
        Serialized by numpy.

    Raises
    ------
    ValueError
        It is not plain numbers in C order with one dimension or more: read it as a whole.
    """

    def __init__(self, array: Array) -> None:
        values = view(array)
        if values.ndim == 0 or not values.flags.c_contiguous or values.dtype.kind not in "biufc":
            raise ValueError("it cannot be read in blocks")
        self.dtype: np.dtype[Any] = values.dtype
        self.shape: tuple[int, ...] = values.shape
        self._flat = values.reshape(-1)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a view, without a copy."""
        return self._flat[start:stop]


def blocks_of(array: Array) -> Blocks:
    """Return the blocks of an Array; ValueError where it must be read as a whole."""
    return array.blocks() if isinstance(array, SpilledArray) else BlocksInMemory(array)
