"""Turn rows of Flower's control-plane tables into JSON that is equal for equal control planes, and back."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from typing import Any

from flwr_ha.superlink import schema

INLINE_LIMIT_BYTES = 4096
LOG_CHUNK_ROWS = 500
LOG_CHUNKS_KEPT = 40
NODE_GRACE_S = 60.0  # how long an online node may take to reach the new leader
PENDING = dict.fromkeys(("token", "active_until", "starting_at", "running_at"))

_COUNTERS = {"bytes_sent": 0, "bytes_recv": 0, "clientapp_runtime": 0.0}

Row = dict[str, Any]


def read_rows(
    connection: sqlite3.Connection, table: str, fabs: MutableMapping[str, str], put: Callable[[bytes], str]
) -> list[Row]:
    """Return a table's rows; an app's content is its digest already."""
    if table != "fab":
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]  # noqa: S608 - a constant
    rows = [dict(row) for row in connection.execute("SELECT fab_hash, verifications FROM fab")]
    for row in rows:
        fab_hash = row["fab_hash"]
        if fab_hash not in fabs:
            content = connection.execute("SELECT content FROM fab WHERE fab_hash = ?", (fab_hash,)).fetchone()[0]
            fabs[fab_hash] = put(bytes(content))
        row["content"] = {"blob": fabs[fab_hash]}
    return rows


def neutral(table: str, rows: list[Row], unfinished: Container[int]) -> list[Row]:
    """Return the rows without what changes all the time.

    Parameters
    ----------
    table : str
        Name of the table.
    rows : list of Row
        Its rows.
    unfinished : container of int
        Ids of the unfinished tasks, as the database keeps them.

    Returns
    -------
    list of Row
        The rows; those of other tables as they are.
    """
    match table:
        case "node":
            return [{**row, "online_until": None} for row in rows]
        case "task":
            return [{**row, **PENDING} if row["task_id"] in unfinished else row for row in rows]
        case "run":
            return [{**row, **_COUNTERS} if row["primary_task_id"] in unfinished else row for row in rows]
        case _:
            return rows


def revived(table: str, row: Row, now_s: float) -> Row:
    """Return a row as the next leader needs it."""
    if table == "node" and row["status"] == "online":
        return {**row, "online_until": now_s + NODE_GRACE_S}
    return row


def encoded(rows: Sequence[Row], put: Callable[[bytes], str]) -> list[Row]:
    """Return the rows with their binary values as base64 or as blobs, in an order that depends on content only."""
    found = [{column: _encoded_cell(cell, put) for column, cell in row.items()} for row in rows]
    return sorted(found, key=canonical)


def _encoded_cell(cell: Any, put: Callable[[bytes], str]) -> Any:
    if not isinstance(cell, bytes):
        return cell
    if len(cell) > INLINE_LIMIT_BYTES:
        return {"blob": put(cell)}
    return {"base64": base64.b64encode(cell).decode("ascii")}


def decoded(row: Mapping[str, Any], get_blob: Callable[[str], bytes]) -> Row:
    """Return a row of a snapshot with its binary values in it."""
    return {column: _decoded_cell(cell, get_blob) for column, cell in row.items()}


def _decoded_cell(cell: Any, get_blob: Callable[[str], bytes]) -> Any:
    match cell:
        case {"blob": str(digest)}:
            return get_blob(digest)
        case {"base64": str(text)}:
            return base64.b64decode(text)
        case _:
            return cell


def insert_rows(connection: sqlite3.Connection, table: str, rows: Sequence[Row]) -> None:
    """Write rows into a table; rows with the same key are replaced."""
    if not rows:
        return
    columns = sorted(rows[0])
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    statement = f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})"  # noqa: S608 - names from the schema
    connection.executemany(statement, ([row[column] for column in columns] for row in rows))


def log_chunks(connection: sqlite3.Connection, until: int, put: Callable[[bytes], str]) -> list[dict[str, str]]:
    """Return the newest log lines in chunks of fixed row numbers: a full chunk never changes and is put once."""
    chunks = []
    first = max(0, (until - 1) // LOG_CHUNK_ROWS - LOG_CHUNKS_KEPT + 1) * LOG_CHUNK_ROWS + 1
    for start in range(first, until + 1, LOG_CHUNK_ROWS):
        rows = connection.execute(
            f"SELECT rowid, timestamp, task_id, log FROM {schema.LOG_TABLE} "  # noqa: S608 - a constant
            "WHERE rowid BETWEEN ? AND ? ORDER BY rowid",
            (start, min(start + LOG_CHUNK_ROWS - 1, until)),
        )
        if lines := [list(row) for row in rows]:
            chunks.append({"blob": put(canonical(lines))})
    return chunks


def canonical(value: object) -> bytes:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
