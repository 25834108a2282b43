"""Tables for people, from the JSON that the replicas answer."""

from __future__ import annotations

from typing import Any

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


def styled(text: str) -> Text:
    """Return a state or role in its colour."""
    return Text(text, style=_STYLES.get(text, ""))


def replica_table(cluster: dict[str, Any]) -> Table:
    """Return the replicas of ``GET /cluster``."""
    paused = "  (automatic failover is paused)" if cluster["paused"] else ""
    table = Table(title=f"Cluster {cluster['cluster']}, term {cluster['term']}{paused}", title_justify="left")
    for heading in ("Replica", "Role", "State", "Address", "API", "Lag in rounds"):
        table.add_column(heading)
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
    """Return the runs of ``GET /cluster``."""
    table = Table(title="Runs", title_justify="left")
    for heading in ("Run", "App", "State", "Round", "Nodes", "Copies on", "Newest metrics", "Reason"):
        table.add_column(heading, overflow="fold")
    for run in cluster["runs"]:
        checkpoint = run["checkpoint"]
        newest = run["metrics"].get(str(run["server_round"]), {})
        table.add_row(
            run["run_id"],
            run["app"],
            styled(run["state"]),
            f"{run['server_round']}/{run['num_rounds'] or '?'}",
            f"{run['nodes_online']} of {run['min_nodes']}" if run["min_nodes"] else str(run["nodes_online"]),
            ", ".join(map(str, checkpoint["copies"])) if checkpoint else "-",
            metrics_text(newest),
            run["reason"],
        )
    return table


def metrics_text(metrics: dict[str, Any]) -> str:
    """Return metrics in one line, numbers with four digits."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


def history_table(history: list[dict[str, Any]]) -> Table:
    """Return the leadership changes of ``GET /history``."""
    table = Table(title="Leadership changes", title_justify="left")
    for heading in ("Term", "Leader", "At", "Reason"):
        table.add_column(heading)
    for change in history:
        table.add_row(str(change["term"]), str(change["leader"]), change["at"], change["reason"])
    return table


def checkpoint_table(run_id: str, entries: list[dict[str, Any]]) -> Table:
    """Return the committed rounds of one run."""
    table = Table(title=f"Committed rounds of run {run_id}", title_justify="left")
    for heading in ("Round", "Term", "Kept", "Bytes", "Committed at", "Model digest"):
        table.add_column(heading)
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
