"""Say whether a reply can be used: pure, the answer is a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from flwr_ha.serverapp.arrays import NUMPY, view

_BLOCK = 1 << 20  # elements that are checked at a time: the temporaries stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Say what the replies of one phase must look like.

    Attributes
    ----------
    shapes : mapping of str to (str, tuple of int), or None
        dtype and shape of each array; None: arrays are not compared with what was sent.
    weight_key : str or None
        Metric by which replies are weighted, as ``num-examples``; None: there is none.
    """

    shapes: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
    weight_key: str | None = None


def expect(sent: RecordDict, *, is_train: bool, weight_key: str | None) -> Expectation:
    """Return what replies to this content must look like.

    Arrays are compared only where exactly one ArrayRecord was sent for training: then Flower's
    strategies want one of the same form back.
    """
    records = list(sent.array_records.values())
    if not is_train or len(records) != 1:
        return Expectation(weight_key=weight_key)
    return Expectation(shapes={name: _form(_values(records[0], name)) for name in records[0]}, weight_key=weight_key)


def _values(record: ArrayRecord, name: str) -> NDArray[Any] | None:
    """Return the values of one array, or None where numpy did not serialize it."""
    array = record[name]
    return view(array) if array.stype == NUMPY else None


def why_rejected(reply: Message, expectation: Expectation, *, node: int) -> str | None:
    """Return why a reply cannot be used, as a sentence that names the node; None: it can.

    Parameters
    ----------
    reply : Message
        As it was pulled.
    expectation : Expectation
        What was asked for.
    node : int
        Node that was asked.
    """
    reason = _why_error(reply) or _why_weight(reply.content, expectation) or _why_arrays(reply.content, expectation)
    return f"node {node}: {reason}" if reason else None


def _why_error(reply: Message) -> str | None:
    if reply.has_error():
        return f"error {reply.error.code}: {reply.error.reason}"
    return None if reply.has_content() else "the reply is empty"


def _why_weight(content: RecordDict, expectation: Expectation) -> str | None:
    key = expectation.weight_key
    if key is None:
        return None
    weight = next((record[key] for record in content.metric_records.values() if key in record), None)
    if weight is None:
        return f"the metric {key!r} is missing"
    if isinstance(weight, (bool, list)) or not math.isfinite(weight) or weight <= 0:
        return f"the metric {key!r} is {weight!r}, not a positive number"
    return None


def _why_arrays(content: RecordDict, expectation: Expectation) -> str | None:
    records = list(content.array_records.values())
    if expectation.shapes is not None:
        if len(records) != 1:
            return f"the reply holds {len(records)} array records, not one"
        if missing := [name for name in expectation.shapes if name not in records[0]]:
            return f"array {missing[0]!r} is missing"
        if foreign := [name for name in records[0] if name not in expectation.shapes]:
            return f"array {foreign[0]!r} was not asked for"
    for record in records:
        for name in record:
            if reason := _why_array(record, name, expectation):
                return f"array {name!r} {reason}"
    return None


def _why_array(record: ArrayRecord, name: str, expectation: Expectation) -> str | None:
    try:
        values = _values(record, name)
    except (ValueError, OSError) as error:
        return f"cannot be read: {error}"
    form = _form(values)
    wanted = expectation.shapes[name] if expectation.shapes is not None else form
    if not (_is_alike(form, wanted) or _is_serialized_model(form, wanted)):
        return f"is {form[0]} {form[1]}, not {wanted[0]} {wanted[1]}"
    if values is not None and not _is_finite(values):
        return "holds NaN or infinite values"
    return None


def _form(values: NDArray[Any] | None) -> tuple[str, tuple[int, ...]]:
    return ("bytes", ()) if values is None else (str(values.dtype), values.shape)


def _is_alike(form: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Whether shapes are the same, and dtypes but for the precision.

    FedAdam and its like send float64 from the second round on; a float32 model answers in float32.
    """
    is_same_kind = form[0] == wanted[0] or (form[0].startswith("float") and wanted[0].startswith("float"))
    return is_same_kind and form[1] == wanted[1]


def _is_serialized_model(form: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Whether both are flat byte strings: XGBoost models travel so, and they grow."""
    return form[0] == wanted[0] == "uint8" and len(form[1]) == len(wanted[1]) == 1


def _is_finite(values: NDArray[Any]) -> bool:
    if values.dtype.kind not in "fc":
        return True
    flat = values.reshape(-1, order="F" if values.flags.f_contiguous else "C")
    return all(bool(np.isfinite(flat[start : start + _BLOCK]).all()) for start in range(0, flat.size, _BLOCK))
