"""Tables for people, from the JSON that the replicas answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

_STYLES = {
    "leader": "bold green",
    "running": "green",
    "training": "green",
    "evaluating": "green",
    "finished": "bold",
    "waiting": "yellow",
    "starting": "yellow",
    "unreachable": "red",
    "failed": "red",
}


def _table(title: str, *headings: str, wrapped: Collection[str]) -> Table:
    """Return a table that fits a terminal of 80 columns: in a narrow one only `wrapped` columns become narrower."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=len(title))
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading not in wrapped)
    return table


def styled(text: str) -> Text:
    """Return a state or role in its colour."""
    return Text(text, style=_STYLES.get(text, ""))


def replica_table(cluster: dict[str, Any]) -> Table:
    """Return the replicas of ``GET /cluster``; their lag is in rounds."""
    paused = "  (automatic failover is paused)" if cluster["paused"] else ""
    title = f"Cluster {cluster['cluster']}, term {cluster['term']}{paused}"
    table = _table(title, "Replica", "Role", "State", "Address", "API", "Lag", wrapped=("Address", "API"))
    for replica in cluster["replicas"]:
        lag = replica["lag_rounds"]
        table.add_row(
            str(replica["id"]),
            styled(replica["role"]),
            styled(replica["state"]),
            replica["address"],
            replica["api"],
            "-" if lag is None else str(lag),
        )
    return table


def run_table(cluster: dict[str, Any]) -> Table:
    """Return the runs of ``GET /cluster``, oldest first, each with its app below its id."""
    table = _table(
        "Runs", "Run and app", "State", "Round", "Nodes", "Copies", "Metrics, reason", wrapped=("Metrics, reason",)
    )
    for run in cluster["runs"]:
        checkpoint = run["checkpoint"]
        newest = run["metrics"].get(str(run["server_round"]), {})
        table.add_row(
            f"{run['run_id']}\n{run['app']}",
            styled(run["state"]),
            f"{run['server_round']}/{run['num_rounds'] or '?'}",
            f"{run['nodes_online']} of {run['min_nodes']}" if run["min_nodes"] else str(run["nodes_online"]),
            ", ".join(map(str, checkpoint["copies"])) if checkpoint else "-",
            "\n".join(filter(None, (metrics_text(newest), run["reason"]))),
        )
    return table


def metrics_text(metrics: dict[str, Any]) -> str:
    """Return metrics in one line, numbers with four digits."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


def history_table(history: list[dict[str, Any]]) -> Table:
    """Return the leadership changes of ``GET /history``."""
    table = _table("Leadership changes", "Term", "Leader", "At", "Reason", wrapped=("Reason",))
    for change in history:
        table.add_row(str(change["term"]), str(change["leader"]), change["at"], change["reason"])
    return table


def checkpoint_table(run_id: str, entries: list[dict[str, Any]]) -> Table:
    """Return the committed rounds of one run."""
    title = f"Committed rounds of run {run_id}"
    table = _table(title, "Round", "Term", "Kept", "Bytes", "Committed at", "Model digest", wrapped=("Model digest",))
    for entry in entries:
        table.add_row(
            str(entry["server_round"]),
            str(entry["term"]),
            "yes" if entry["kept"] else "no",
            f"{entry['bytes']:,}",
            entry["committed_at"],
            entry["model_digest"],
        )
    return table
