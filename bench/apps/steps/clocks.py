"""Measure the steps of a round that Flower does not have, from within the ServerApp."""

import functools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# Module, and the name by which the module calls what is to be measured.
_WHERE = {
    "undo": [("flwr_ha.serverapp.phases", "capture")],
    "check": [("flwr_ha.serverapp.gather", "why_rejected")],
    "hash": [("flwr_ha.serverapp.gather", "_order")],
    "capture": [("flwr_ha.serverapp.training", "capture"), ("flwr_ha.serverapp.training", "pack")],
    "save": [("flwr_ha.storage.checkpoint", "save")],
}


class Clocks:
    """Add up the seconds of each step, and write a line for each committed round."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def install(self) -> None:
        """Put a clock around each step."""
        from flwr_ha.serverapp.replica_session import ReplicaSession

        for step, places in _WHERE.items():
            for module, name in places:
                self._wrap(step, import_module(module), name)
        self._wrap("note", ReplicaSession, "report")
        self._wrap("note", ReplicaSession, "record")
        self._wrap("commit", ReplicaSession, "commit", self._write)

    def _wrap(self, step: str, owner: Any, name: str, then: Callable[..., None] = lambda *_: None) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **options: Any) -> Any:
            start_s = time.perf_counter()
            result = inner(*args, **options)
            with self._lock:
                self._seconds[step] += time.perf_counter() - start_s
            then(*args)
            return result

        setattr(owner, name, timed)

    def _write(self, session: Any, checkpoint: Any, metrics: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"server_round": checkpoint.server_round, **self._seconds}) + "\n")
        self._seconds.clear()
