"""Replies of big models wait on disk until all are there, and are read back block by block.

Each reply that is kept has its arrays replaced by `SpilledArray`: any code that uses Flower's Array
can use them, only that the bytes are read when they are asked for.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, Message
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from flwr_ha.serverapp.arrays import NUMPY, view
from flwr_ha.serverapp.nodes import layers

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

IN_MEMORY_BYTES = 256 * 1024**2  # replies of one phase that need no disk
GROUP_BYTES = 64 * 1024**2  # replies that are pulled at once when they are big
_SMALLEST_BYTES = 64 * 1024  # arrays that are worth a place on disk


def is_spillable(strategy: Strategy) -> bool:
    """Whether the strategy, or one that it wraps, averages as FedAvg does: it can do so from disk."""
    return any(isinstance(layer, FedAvg) for layer in layers(strategy))


class SpillFile:
    """Keep bytes in a file without a name: it is gone with this process, however that ends.

    Parameters
    ----------
    folder : Path or None
        Where the file lies; None: the system's folder for temporary files.

    Raises
    ------
    OSError
        The folder refuses.
    """

    def __init__(self, folder: Path | None) -> None:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        self._end = 0
        weakref.finalize(self, os.close, self._descriptor)  # with the last array that refers to it

    def append(self, data: bytes) -> int:
        """Write bytes behind the others and return where they start; OSError where the disk refuses."""
        start, rest = self._end, memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, self._end)
            rest, self._end = rest[written:], self._end + written
        return start

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer of bytes; OSError where the disk fails."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], start)
            if count == 0:
                raise OSError("a spilled reply is cut off")
            buffer, start = buffer[count:], start + count

    def __deepcopy__(self, memo: object) -> SpillFile:
        """Return the same: what was written never changes."""
        return self


class BlocksOnDisk:
    """Read the values of a spilled array a piece at a time.

    Parameters
    ----------
    file : SpillFile
        Holds them.
    start : int
        Byte at which the values start.
    dtype : dtype
        Their type.
    shape : tuple of int
        Their shape.
    """

    def __init__(self, file: SpillFile, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self._file = file
        self._start = start

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a new array with these elements."""
        block: NDArray[Any] = np.empty(stop - start, self.dtype)
        self._file.read_into(block.view(np.uint8).data, self._start + start * self.dtype.itemsize)
        return block


class SpilledArray(Array):
    """Stand for an Array whose bytes lie on disk; its content hash is known.

    Parameters
    ----------
    array : Array
        Read here for the last time.
    file : SpillFile
        Takes its bytes.

    Raises
    ------
    OSError
        The disk refuses.
    """

    __qualname__ = Array.__qualname__  # Flower writes the name of the class into what it hashes

    def __init__(self, array: Array, file: SpillFile) -> None:
        values = view(array)
        self._blocks: BlocksOnDisk | None = None
        start = file.append(array.data)
        if values.ndim and values.flags.c_contiguous and values.dtype.kind in "biufc":
            header_bytes = len(array.data) - values.nbytes
            self._blocks = BlocksOnDisk(file, start + header_bytes, values.dtype, values.shape)
        self._place: tuple[SpillFile, int, int] | None = (file, start, len(array.data))
        self.dtype, self.shape, self.stype = array.dtype, array.shape, array.stype
        self.__dict__["_object_id"] = array.object_id
        self.is_dirty = False

    @property
    def data(self) -> bytes:
        """All bytes, read anew each time."""
        if self._place is None:
            return cast(bytes, self.__dict__["data"])
        file, start, size_bytes = self._place
        buffer = bytearray(size_bytes)
        file.read_into(memoryview(buffer), start)
        return bytes(buffer)

    @data.setter
    def data(self, value: bytes) -> None:
        self._place = self._blocks = None
        self.__dict__["data"] = value

    def blocks(self) -> BlocksOnDisk:
        """Return the values for reading in blocks; ValueError where they must be read as a whole."""
        if self._blocks is None:
            raise ValueError("it cannot be read in blocks")
        return self._blocks


class Spill:
    """Put the arrays of replies on disk.

    Parameters
    ----------
    folder : Path or None
        Folder of this training; None: the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: SpillFile | None = None
        self._has_failed = False

    def keep(self, reply: Message) -> None:
        """Replace the arrays of a reply; where the disk refuses, they stay in memory."""
        if self._has_failed:
            return
        try:
            if self._file is None:
                self._file = SpillFile(self._folder)
            for record in reply.content.array_records.values():
                for name, array in list(record.items()):
                    if array.stype == NUMPY and _is_big(array):
                        record[name] = SpilledArray(array, self._file)
        except OSError as error:
            self._has_failed = True
            logger.warning("replies stay in memory, the disk refuses them: %s", error)

    def forget(self) -> None:
        """Begin a new file; the old one goes with the last array that refers to it."""
        self._file = None


def _is_big(array: Array) -> bool:
    return math.prod(array.shape) >= _SMALLEST_BYTES  # elements: one byte or more each
