"""Flower's Result as JSON and back, and the metrics of a round for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from flwr_ha.model import Metrics

_PARTS = {
    "train": "train_metrics_clientapp",
    "evaluate": "evaluate_metrics_clientapp",
    "server": "evaluate_metrics_serverapp",
}


def result_to_json(result: Result) -> dict[str, Any]:
    """Return the metrics of all rounds as a JSON object; the arrays are kept elsewhere."""
    return {
        part: {str(server_round): dict(metrics) for server_round, metrics in getattr(result, name).items()}
        for part, name in _PARTS.items()
    }


def result_from_json(history: Mapping[str, Any], arrays: ArrayRecord) -> Result:
    """Return the Result of all rounds that ``result_to_json`` described."""
    parts = {
        name: {int(server_round): MetricRecord(dict(metrics)) for server_round, metrics in history[part].items()}
        for part, name in _PARTS.items()
    }
    return Result(arrays=arrays, **parts)


def metrics_for_people(result: Result, server_round: int) -> Metrics:
    """Return the metrics that best describe the model after a round.

    Those of the server's own evaluation, else of the clients' evaluation, else of their training.
    NaN and infinite values are left out: JSON cannot say them.
    """
    for name in ("evaluate_metrics_serverapp", "evaluate_metrics_clientapp", "train_metrics_clientapp"):
        if metrics := getattr(result, name).get(server_round):
            return {key: value for key, value in metrics.items() if _is_finite(value)}
    return {}


def _is_finite(value: Any) -> bool:
    return all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)
