"""The weighted average of replies, against flwr's ``aggregate_arrayrecords``."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from bench.result import Figure, Scale, interleaved, median_ratio
from flwr_ha.serverapp.aggregation import weighted_average

KEY = "num-examples"


def measure(folder: Path, scale: Scale) -> list[Figure]:
    """Average few big and many small replies, turn about."""
    figures = []
    for number, megabytes in ((5, 100), (50, 10)):
        for layers in (1, 8):
            figures += _average(number, megabytes, layers, times=scale.pick(3, 15))
    return figures


def _average(number: int, megabytes: int, layers: int, *, times: int) -> list[Figure]:
    records = replies(number, megabytes, layers)
    ours, plain = interleaved(times, lambda: _seconds(weighted_average, records), lambda: _seconds(None, records))
    is_same = weighted_average(records, KEY).object_id == aggregate_arrayrecords(records, KEY).object_id
    name = f"average of {number} replies of {megabytes} MB in {layers} arrays"
    speed = Figure(
        name=name, value=statistics.median(ours), unit="s", against=statistics.median(plain),
        ratio=1 / median_ratio(ours, plain), goal=2.5, is_more_better=True,
    )  # fmt: skip
    bits = Figure(name=f"{name}: other bits", value=float(not is_same), unit="models", goal=0)
    extra = _extra_models(records, megabytes)
    return [speed, bits, Figure(name=f"{name}: extra memory", value=extra, unit="models", goal=1.1)]


def replies(number: int, megabytes: int, layers: int) -> list[RecordDict]:
    """Return contents of replies with float32 arrays of equal size."""
    rng = np.random.default_rng(0)
    size = megabytes * 1_000_000 // (4 * layers)
    return [
        RecordDict(
            {
                "arrays": ArrayRecord(
                    {f"layer{k}": Array(rng.standard_normal(size, dtype=np.float32)) for k in range(layers)}
                ),
                "metrics": MetricRecord({KEY: 100 + index}),
            }
        )
        for index in range(number)
    ]


def _seconds(average: object, records: list[RecordDict]) -> float:
    start_s = time.perf_counter()
    (weighted_average if average else aggregate_arrayrecords)(records, KEY)
    return time.perf_counter() - start_s


def _extra_models(records: list[RecordDict], megabytes: int) -> float:
    tracemalloc.start()
    try:
        weighted_average(records, KEY)
        return tracemalloc.get_traced_memory()[1] / (megabytes * 1e6)
    finally:
        tracemalloc.stop()
