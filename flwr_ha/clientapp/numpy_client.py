"""Let a classic NumPyClient answer Message-API strategies."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from flwr_ha.errors import ConfigError

if TYPE_CHECKING:
    from flwr.clientapp.typing import ClientAppCallable

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that a SuperNode shows it

_NUMPY = "numpy.ndarray"  # flwr.common.constant.SType.NUMPY


def numpy_client_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn a Message-API instruction into the classic form, and the answer back.

    The instruction holds one ArrayRecord and at most one ConfigRecord, under any names; the reply
    holds the arrays under the names that were sent, and a MetricRecord with ``num-examples``, the
    client's metrics and, after an evaluation, ``loss``. Other kinds of messages pass unchanged.

    Raises
    ------
    ConfigError
        The content or the client's answer does not fit; change the client.
    """
    category = message.metadata.message_type.partition(".")[0]
    if category not in ("train", "evaluate") or not message.content.array_records:
        return call_next(message, context)
    is_train = category == "train"
    key, arrays = _only(message.content.array_records, "ArrayRecord")
    message.content = _classic_instruction(message.content, arrays, "fitins" if is_train else "evaluateins")
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content = _train_reply(reply.content, key, arrays) if is_train else _evaluate_reply(reply.content)
    return reply


def _classic_instruction(content: RecordDict, arrays: ArrayRecord, prefix: str) -> RecordDict:
    configs = content.config_records
    config = dict(_only(configs, "ConfigRecord")[1]) if configs else {}
    # The positions are the names: classic clients know a list of arrays.
    listed = {str(index): Array("", (), array.stype, array.data) for index, array in enumerate(arrays.values())}
    if not listed:
        listed = {"_empty": Array("", (), _NUMPY, b"")}
    return RecordDict({f"{prefix}.parameters": ArrayRecord(listed), f"{prefix}.config": ConfigRecord(config)})


def _train_reply(content: RecordDict, key: str, sent: ArrayRecord) -> RecordDict:
    _check_status(content, "fitres")
    answered = [array for name, array in _record(content, "fitres.parameters").items() if name != "_empty"]
    if len(answered) != len(sent):
        raise ConfigError(f"fit() returned {len(answered)} arrays, {len(sent)} were sent")
    named = {name: _described(array) for name, array in zip(sent, answered, strict=True)}
    return RecordDict({key: ArrayRecord(named), "metrics": _metrics(content, "fitres")})


def _evaluate_reply(content: RecordDict) -> RecordDict:
    _check_status(content, "evaluateres")
    metrics = _metrics(content, "evaluateres")
    return RecordDict({"metrics": MetricRecord({"loss": _record(content, "evaluateres.loss")["loss"], **metrics})})


def _metrics(content: RecordDict, prefix: str) -> MetricRecord:
    """Return the number of examples and the client's own metrics; the Message API takes numbers only."""
    number = _record(content, f"{prefix}.num_examples")["num_examples"]
    own = dict(_record(content, f"{prefix}.metrics"))
    numbers = {name: value for name, value in own.items() if isinstance(value, int | float)}
    if len(numbers) < len(own):
        logger.warning("metrics that are no numbers are left out: %s", ", ".join(own.keys() - numbers.keys()))
    values = {name: int(value) if isinstance(value, bool) else value for name, value in numbers.items()}
    return MetricRecord({**values, "num-examples": number})


def _described(array: Array) -> Array:
    """Return the array with its dtype and shape, which the classic form leaves out."""
    if array.stype != _NUMPY:
        raise ConfigError(f"fit() returned an array that is serialized as {array.stype!r}, not by numpy")
    return Array(np.load(io.BytesIO(array.data), allow_pickle=False))


def _check_status(content: RecordDict, prefix: str) -> None:
    status = _record(content, f"{prefix}.status")
    if status["code"] != 0:
        raise ConfigError(f"the client refused: {status['message']}")


def _record(content: RecordDict, name: str) -> Any:
    return content[name]


def _only(records: Any, kind: str) -> tuple[str, Any]:
    if len(records) != 1:
        raise ConfigError(f"the message holds {len(records)} {kind}s: a NumPyClient takes one")
    ((name, record),) = records.items()
    return name, record
