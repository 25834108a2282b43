"""What happened on this replica, as structured data: in memory for REST, on disk for later."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr_ha.errors import ConfigError
from flwr_ha.model import utc_now

log = logging.getLogger(__name__)
MAX_MESSAGE = 2000  # characters
_LEVELS = {
    "reply-rejected": logging.WARNING,
    "not-committed": logging.WARNING,
    "disk": logging.WARNING,
    "error": logging.ERROR,
}


class EventLog:
    """Number, keep and log events; safe from any thread.

    Parameters
    ----------
    file : Path
        JSON lines; rotated to ``….1`` at `max_bytes`.
    replica_id : int
        Written into every event.
    size : int
        How many are kept in memory, the newest.
    max_bytes : int
        Size of the file at which it is rotated.
    on_event : callable
        Gets each event, in the thread that adds it.
    """

    def __init__(
        self,
        file: Path,
        *,
        replica_id: int,
        size: int = 2000,
        max_bytes: int = 16 * 1024**2,
        on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._file = file
        self._on_event = on_event
        self._replica_id = replica_id
        self._events: deque[dict[str, Any]] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self._rotated = file.with_name(file.name + ".1")
        self._is_cut = False  # whether the file's last line lacks its end
        self._number = self._last_number()

    def _last_number(self) -> int:
        """Go on counting where an earlier life of this replica ended, so that ``after=`` stays good."""
        for file in (self._file, self._rotated):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"data-dir: {str(file)!r} cannot be read: {error.strerror}") from error
            self._is_cut = self._is_cut or (file == self._file and text[-1:] not in ("", "\n"))
            for line in reversed(text.splitlines()):
                try:
                    return int(json.loads(line)["number"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line that was cut short by a crash
        return 0

    def add(self, kind: str, message: str, **fields: Any) -> None:
        """Append an event; `message` is a sentence for people, `fields` are for programs."""
        with self._lock:
            self._number += 1
            number = self._number
            event = {
                **fields,
                "number": number,
                "at": utc_now(),
                "replica": self._replica_id,
                "kind": kind,
                "message": message[:MAX_MESSAGE],
            }
            self._events.append(event)
            self._write(event)
        self._on_event(event)
        log.log(_LEVELS.get(kind, logging.INFO), "replica %s: %s: %s", self._replica_id, kind, message)

    def _write(self, event: dict[str, Any]) -> None:
        try:
            if self._file.exists() and self._file.stat().st_size > self._max_bytes:
                self._file.replace(self._rotated)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._is_cut else "") + json.dumps(event) + "\n")
            self._is_cut = False
        except OSError as error:  # a full disk must not stop the replica: the event stays in memory
            self._is_cut = True
            log.warning("event log %s cannot be written: %s", self._file, error.strerror)

    def after(self, number: int) -> list[dict[str, Any]]:
        """Return the events in memory whose number is higher, oldest first."""
        with self._lock:
            return [event for event in self._events if event["number"] > number]
