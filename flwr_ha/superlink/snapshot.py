"""Read a control-plane snapshot without a database."""

from __future__ import annotations

import json

from flwr_ha.superlink.watch import unsigned


def unfinished_runs(snapshot: bytes) -> frozenset[str]:
    """Return the ids of the runs that the next leader has to go on with, unsigned decimal."""
    tables = json.loads(snapshot)["tables"]
    unfinished = {task["task_id"] for task in tables["task"] if task["finished_at"] is None}
    return frozenset(unsigned(run["run_id"]) for run in tables["run"] if run["primary_task_id"] in unfinished)
