"""Say whether a reply can be used: pure, the answer is a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from flwr_ha.serverapp.arrays import NUMPY, view

_REAL = ("float", "int", "uint", "bool")
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
    sent : ArrayRecord or None
        What was sent: where an array of it is not finite already, such as a mask of minus infinities, replies need not
        be either.
    """

    shapes: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
    weight_key: str | None = None
    sent: ArrayRecord | None = None


def expect(sent: RecordDict, *, same_arrays: bool, weight_key: str | None) -> Expectation:
    """Return what replies to this content must look like.

    Arrays are compared, where that is wanted, if exactly one ArrayRecord was sent: then Flower's
    strategies want one of the same form back from training.
    """
    records = list(sent.array_records.values())
    if not same_arrays or len(records) != 1:
        return Expectation(weight_key=weight_key)
    (record,) = records
    return Expectation(
        shapes={name: _form(_values(record, name)) for name in record}, weight_key=weight_key, sent=record
    )


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
    weight = _weight(content, key)
    if weight is None:
        return f"the metric {key!r} is missing"
    if isinstance(weight, (bool, list)) or not math.isfinite(weight) or weight < 0:
        return f"the metric {key!r} is {weight!r}, not a number from 0"
    return None


def _weight(content: RecordDict, key: str) -> Any:
    return next((record[key] for record in content.metric_records.values() if key in record), None)


def why_weightless(replies: Sequence[Message], weight_key: str | None) -> str | None:
    """Return why no average can be made of valid replies: all of them weigh nothing; None: it can."""
    if weight_key is None or not replies or any(_weight(reply.content, weight_key) for reply in replies):
        return None
    return f"the metric {weight_key!r} is 0 in all of them"


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
    if not _is_finite(values) and (expectation.sent is None or _is_finite(_values(expectation.sent, name))):
        return "holds NaN or infinite values"
    return None


def _form(values: NDArray[Any] | None) -> tuple[str, tuple[int, ...]]:
    return ("bytes", ()) if values is None else (str(values.dtype), values.shape)


def _is_alike(form: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Whether shapes are the same, and dtypes, or both are real numbers.

    An average is float64 for float32 models with FedAdam and its like, and for whole numbers with any strategy: the
    counter of a batch normalization is int64 in each reply, and float64 in what is sent from the second round on.
    """
    are_numbers = all(dtype.startswith(_REAL) for dtype in (form[0], wanted[0]))
    return form[1] == wanted[1] and (form[0] == wanted[0] or are_numbers)


def _is_serialized_model(form: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Whether both are flat byte strings: XGBoost models travel so, and they grow."""
    return form[0] == wanted[0] == "uint8" and len(form[1]) == len(wanted[1]) == 1


def _is_finite(values: NDArray[Any] | None) -> bool:
    if values is None or values.dtype.kind not in "fc":
        return True
    flat = values.reshape(-1, order="F" if values.flags.f_contiguous else "C")
    return all(bool(np.isfinite(flat[start : start + _BLOCK]).all()) for start in range(0, flat.size, _BLOCK))
