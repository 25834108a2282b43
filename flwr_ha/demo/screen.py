"""What the demo shows: lines that stay, and below them, on a terminal, the present state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flwr_ha import tables

REFRESH_PER_S = 4
BAR_WIDTH = 30


class Screen:
    """Print lines with the seconds since the start, and keep a live picture below them on a terminal.

    Parameters
    ----------
    console : Console
        Where to; a file or a pipe gets the lines only.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start_s = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._drawn_s = float("-inf")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    def say(self, line: str, style: str = "") -> None:
        """Print a line that stays."""
        text = Text(f"{self.elapsed_s:6.1f} s  ", style="dim")
        text.append(line, style=style or "not dim")
        self._console.print(text, soft_wrap=True)

    def show(self, content: RenderableType) -> None:
        """Print what stays as it is: the first line, the report."""
        self._console.print(content, soft_wrap=not isinstance(content, Table), highlight=False)

    def draw(self, cluster: dict[str, Any] | None, note: str) -> None:
        """Redraw the picture of the cluster; nothing happens where there is no terminal.

        Parameters
        ----------
        cluster : dict or None
            The answer of ``GET /cluster``; None where no replica answers.
        note : str
            What the demo itself does at the moment.
        """
        now_s = time.monotonic()
        if self._live is None or now_s - self._drawn_s < 1 / REFRESH_PER_S:
            return
        self._drawn_s = now_s
        self._live.update(picture(cluster, f"{self.elapsed_s:6.1f} s  {note}"), refresh=True)


def picture(cluster: dict[str, Any] | None, note: str) -> RenderableType:
    """Return replicas, runs and progress as something that rich can draw, short enough for a small terminal."""
    if cluster is None:
        return Text(note, style="yellow")
    replicas = Table.grid(padding=(0, 2))
    for replica in cluster["replicas"]:
        lag = f"{replica['lag_rounds']} rounds behind" if replica["lag_rounds"] else ""
        role = tables.styled(replica["role"]) if replica["state"] == "running" else Text("-")
        replicas.add_row(f"replica {replica['id']}", role, tables.styled(replica["state"]), lag)
    parts: list[RenderableType] = [replicas]
    for run in cluster["runs"]:
        metrics = tables.metrics_text(run["metrics"].get(str(run["server_round"]), {}))
        progress = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(run["num_rounds"], 1), completed=run["server_round"], width=BAR_WIDTH)
        progress.add_row(bar, f"{run['server_round']}/{run['num_rounds'] or '?'} rounds committed", metrics)
        parts += [progress, Text(state_line(run))]
    leader = "nobody leads" if cluster["leader"] is None else f"replica {cluster['leader']} leads"
    title = f"{leader}, term {cluster['term']}"
    return Panel(Group(*parts, Text(note, style="bold")), title=title, title_align="left")


def changes(before: dict[str, Any] | None, after: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """Return what is worth a line, with its style, between two answers of ``GET /cluster``."""
    lines: list[tuple[str, str]] = []
    if after["leader"] is not None and (before is None or after["term"] != before["term"]):
        lines.append((f"replica {after['leader']} leads (term {after['term']})", "bold green"))
    old_states = {replica["id"]: replica["state"] for replica in before["replicas"]} if before else {}
    for replica in after["replicas"]:
        was = old_states.get(replica["id"], "unreachable")
        if replica["state"] != was:
            lines.append((f"replica {replica['id']}: {was} -> {replica['state']}", ""))
    old_runs = {run["run_id"]: run for run in before["runs"]} if before else {}
    for run in after["runs"]:
        lines += run_changes(old_runs.get(run["run_id"]), run)
    return lines


def run_changes(before: dict[str, Any] | None, after: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is worth a line of one run."""
    lines: list[tuple[str, str]] = []
    if before is None:
        lines.append((f"run {after['run_id']} of app {after['app']}", ""))
    done = after["server_round"]
    if done and (before is None or done > before["server_round"]):
        metrics = tables.metrics_text(after["metrics"].get(str(done), {}))
        lines.append((f"round {done}/{after['num_rounds']} is committed: {metrics}", "green"))
    if before is None or (after["state"], after["min_nodes"]) != (before["state"], before["min_nodes"]):
        lines.append((state_line(after), ""))
    return lines


def state_line(run: dict[str, Any]) -> str:
    """Return what a run does, in one line."""
    nodes = f"{run['nodes_online']} of {run['min_nodes'] or '?'} nodes online"
    reason = f", {run['reason']}" if run["reason"] and run["reason"] != nodes else ""
    if run["state"] in ("finished", "failed", "stopped"):
        return f"the run is {run['state']}{reason}"
    if run["state"] == "training" and not run["min_nodes"]:  # Flower runs it, but it has not said anything yet
        return f"the ServerApp starts: it goes on after committed round {run['server_round']}"
    return f"round {run['server_round'] + 1}: {run['state']}, {nodes}{reason}"
