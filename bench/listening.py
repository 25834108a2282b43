"""Processes of a benchmark that listen on a port of their own choice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr_ha.local.processes import Program, wait_until


@contextmanager
def listening(module: str, folder: Path, number: int, *arguments: str) -> Iterator[tuple[int, Program]]:
    """Start ``python -m module PORT_FILE …``, which calls `announce`, and yield its port; it is killed at the end."""
    name = f"{module}-{number}"
    port_file = folder / f"{name}.port"
    command = [sys.executable, "-m", module, str(port_file), *arguments]
    program = Program(name, command, log_file=folder / "logs" / f"{name}.log", environment={})
    try:
        port = wait_until(lambda: port_file.exists() and port_file.read_text(), timeout_s=60.0, what=name)
        yield int(port), program
    finally:
        program.kill_tree()


def announce(port: int, port_file: Path) -> None:
    """Write a port where `listening` looks for it, as a whole or not at all."""
    temporary = port_file.with_suffix(".new")
    temporary.write_text(str(port))
    temporary.rename(port_file)
