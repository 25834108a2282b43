"""What all commands share: options, output, exit statuses."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.live import Live

from flwr_ha.errors import ConfigError, CoordinationError, HaError

WATCH_EVERY_S = 1.0
DONE, REFUSED, WRONG_USE = 0, 1, 2

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with the settings; else FLWR_HA_CONFIG, else ./pyproject.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
JsonLogOption = Annotated[bool, typer.Option("--json", help="Log one JSON object a line.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Print it again every second, until Ctrl-C.")]


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_handler(stream: TextIO, *, as_json: bool) -> logging.Handler:
    """Return what writes a log for people or for programs."""
    handler = logging.StreamHandler(stream)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if as_json else text)
    return handler


def set_up_logging(*, as_json: bool = False) -> None:
    """Send the log to standard error, one line an entry; JSON objects for programs."""
    logging.basicConfig(level=logging.INFO, handlers=[log_handler(sys.stderr, as_json=as_json)])
    for name in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns ten times a second while ZooKeeper is away, which our own event log says once.
    logging.getLogger("kazoo").setLevel(logging.ERROR)


def run_guarded(act: Callable[[], Any]) -> int:
    """Run `act` and return the exit status: 0 done, 1 refused or failed, 2 wrong use or settings."""
    try:
        act()
    except ConfigError as error:
        return _complain(error, WRONG_USE)
    except HaError as error:
        return _complain(error, REFUSED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
        return REFUSED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else REFUSED if error.code else DONE
    return DONE


def _complain(error: HaError, status: int) -> int:
    print(f"flwr-ha: {error}", file=sys.stderr)
    return status


def show(make: Callable[[], Any], as_table: Callable[[Any], Any], *, as_json: bool, watch: bool = False) -> None:
    """Print what `make` returns, as JSON or as a table; with `watch` again and again, until Ctrl-C.

    While it watches, a cluster that does not answer is shown as such: it may come back.
    """
    if not watch:
        value = make()
        if as_json:
            print(json.dumps(value, indent=2), flush=True)
        else:
            Console(highlight=False).print(as_table(value))
        return
    try:
        if as_json:
            _watch_json(make)
        else:
            _watch_table(make, as_table)
    except KeyboardInterrupt:
        return


def _watch_json(make: Callable[[], Any]) -> None:
    """Print one line a second."""
    while True:
        try:
            print(json.dumps(make()), flush=True)
        except CoordinationError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        time.sleep(WATCH_EVERY_S)


def _watch_table(make: Callable[[], Any], as_table: Callable[[Any], Any]) -> None:
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                seen = as_table(make())
            except CoordinationError as error:
                seen = str(error)
            if console.is_terminal:
                live.update(seen, refresh=True)
            else:
                console.print(seen)  # to a file or a pipe a live picture would print nothing before its end
            time.sleep(WATCH_EVERY_S)
