"""The weighted average of Flower's FedAvg, block by block: the same bits in a fraction of the time.

Flower copies each array twice and makes temporaries of the model's size. Here all replies are added
up one block after the other, so that the operands stay in the processor's cache, straight into the
bytes of the result.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy import strategy_utils
from numpy.typing import NDArray

from flwr_ha.serverapp.arrays import NUMPY
from flwr_ha.serverapp.blocks import Blocks, blocks_of
from flwr_ha.serverapp.rawbytes import new_bytes

_USERS = ("flwr.serverapp.strategy.fedavg", "flwr.serverapp.strategy.multikrum")
_BLOCK = 104 << 10  # elements at a time, at most: a block of the sum and of a product stay in the cache of one core
_THREADS = min(4, len(os.sched_getaffinity(0)))
_NAME = "aggregate_arrayrecords"
_Term = tuple[Blocks, float, np.dtype[Any]]  # a reply's array, its weight, the dtype of their product
_plain = strategy_utils.aggregate_arrayrecords


@contextmanager
def fast_averages() -> Iterator[None]:
    """Let Flower's strategies average with `weighted_average` inside.

    FedAvg, everything built on its ``aggregate_train`` and MultiKrum call a function of their
    module. It is replaced only where it is Flower's own, and put back at the end.
    """
    replaced = [module for module in map(import_module, _USERS) if getattr(module, _NAME, None) is _plain]
    try:
        for module in replaced:
            setattr(module, _NAME, weighted_average)
        yield
    finally:
        for module in replaced:
            setattr(module, _NAME, _plain)


def weighted_average(records: list[RecordDict], weighting_metric_name: str) -> ArrayRecord:
    """Return what Flower's ``aggregate_arrayrecords`` returns, bit for bit.

    Parameters
    ----------
    records : list of RecordDict
        Replies, in the order in which they are to be added up.
    weighting_metric_name : str
        Metric that holds the weight of a reply.

    Returns
    -------
    ArrayRecord
        One array for each name.
    """
    weights = [cast(float, next(iter(r.metric_records.values()))[weighting_metric_name]) for r in records]
    total = sum(weights)
    named: dict[str, list[tuple[Array, float]]] = {}
    for record, weight in zip(records, weights, strict=True):
        for arrays in record.array_records.values():
            for name, array in arrays.items():
                named.setdefault(name, []).append((array, weight / total))
    averages: dict[str, Array] = {}
    batches = _batches(fill for name, terms in named.items() for fill in _begin(averages, name, terms))
    taking = threading.Lock()

    def work() -> None:
        while batch := _taken(batches, taking):
            _run(batch)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="average") as pool:
        for thread in [pool.submit(work) for _ in range(_THREADS)]:
            thread.result()
    return ArrayRecord(averages)


@dataclass(frozen=True, slots=True)
class _Fill:
    """One part of a result that is still to be computed: `part` are its elements from `offset` on."""

    part: NDArray[Any]
    terms: Sequence[_Term]
    offset: int


def _begin(averages: dict[str, Array], name: str, terms: Sequence[tuple[Array, float]]) -> Iterator[_Fill]:
    """Add an average, and yield what must be done until it is complete.

    Threads come for it when they need more to do: the views of one array's replies go before those of the next come.
    """
    try:
        sources = [(blocks_of(array), weight) for array, weight in terms]
    except ValueError:
        sources = []
    if not sources or any(source.shape != sources[0][0].shape for source, _ in sources):
        averages[name] = _average_as_a_whole(terms)
        return
    averages[name], fills = _average_by_blocks(sources)
    yield from fills


def _average_as_a_whole(terms: Sequence[tuple[Array, float]]) -> Array:
    """Do what Flower does: for scalars, Fortran order and whatever else is no plain row of numbers."""
    (first, weight), *others = terms
    total = first.numpy() * weight
    for array, weight in others:
        total += array.numpy() * weight
    return Array(np.asarray(total))


def _average_by_blocks(sources: Sequence[tuple[Blocks, float]]) -> tuple[Array, Iterator[_Fill]]:
    shape, dtype = sources[0][0].shape, _product(*sources[0])
    header = _header(dtype, shape)
    size_bytes = math.prod(shape) * dtype.itemsize
    data, memory = new_bytes(len(header) + size_bytes)
    memory[: len(header)] = np.frombuffer(header, np.uint8)
    total = memory[len(header) :].view(dtype)
    terms = [(source, weight, _product(source, weight)) for source, weight in sources]
    block = math.ceil(total.size / math.ceil(total.size / _BLOCK)) if total.size else 1  # all of one size, or nearly
    fills = (_Fill(total[start : start + block], terms, start) for start in range(0, total.size, block))
    return Array(dtype=str(dtype), shape=shape, stype=NUMPY, data=data), fills


def _taken(batches: Iterator[list[_Fill]], lock: threading.Lock) -> list[_Fill]:
    """Return the next batch, or an empty one at the end."""
    with lock:
        return next(batches, [])


def _batches(fills: Iterable[_Fill]) -> Iterator[list[_Fill]]:
    """Put small arrays together, so that threads do not fight for the interpreter over each bias."""
    batch: list[_Fill] = []
    size = 0
    for fill in fills:
        batch.append(fill)
        size += fill.part.size
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def _run(batch: Sequence[_Fill]) -> None:
    for fill in batch:
        _add_up(fill.part, fill.terms, fill.offset)


def _add_up(part: NDArray[Any], terms: Sequence[_Term], offset: int) -> None:
    """Add up one part of the result; numpy lets other threads run meanwhile."""
    (first, weight, _), *others = terms
    end = offset + part.size
    products = {dtype: np.empty(part.size, dtype) for dtype in {dtype for _, _, dtype in others}}
    np.multiply(first.read(offset, end), weight, out=part)
    for source, factor, dtype in others:
        np.multiply(source.read(offset, end), factor, out=products[dtype])
        np.add(part, products[dtype], out=part)


def _product(source: Blocks, weight: float) -> np.dtype[Any]:
    """Return the dtype of values times the weight: integers become floats."""
    return cast("np.dtype[Any]", (np.zeros(1, source.dtype) * weight).dtype)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what ``numpy.save`` writes before the values."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()
