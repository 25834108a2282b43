"""Know the versions of Flower and of its database that the control plane can be carried between."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sqlite3
from pathlib import Path

from flwr_ha.errors import ConfigError

KNOWN_VERSIONS = ((1, 41), (1, 42))  # 1.41 <= flwr < 1.43, as pyproject.toml declares

# Alembic revision of Flower's database -> fingerprint of the tables that we read and write. Control planes go from one
# revision to another where the fingerprints are equal: add a revision only after a look at the values in the columns.
KNOWN_SCHEMAS = {
    "d90a2f91f23c": "sha256:d90fd4a935a530170b3876a3e9213cf6134b2f0d5368d618b38aae19053322b6",  # flwr 1.41.0
    "d9bd9d502cf9": "sha256:d90fd4a935a530170b3876a3e9213cf6134b2f0d5368d618b38aae19053322b6",  # flwr 1.42.0
}

# In the order in which rows are written: a task comes last, after the run and the app that it needs.
CONTROL_TABLES = (
    "node",
    "fab",
    "federation_app",
    "connector",
    "automation",
    "run_series",
    "series_context",
    "series_runs",
    "run",
    "run_connector",
    "task",
)
LOG_TABLE = "task_logs"

_REVISION = re.compile(r"^(down_)?revision[^=\n]*=\s*(\([^)]*\)|[^\n]*)", re.MULTILINE)
_WHAT_TO_DO = 'install a known one with: pip install "flwr>=1.41,<1.43"'


def check_flower() -> None:
    """Check that the installed Flower is one whose inside we know; does not import flwr.

    Raises
    ------
    ConfigError
        flwr is missing, or its version or its database schema is unknown: install a known version.
    """
    known = " and ".join(f"{major}.{minor}" for major, minor in KNOWN_VERSIONS)
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"flwr is not installed; {_WHAT_TO_DO}.") from error
    if _major_minor(version) not in KNOWN_VERSIONS:
        raise ConfigError(f"flwr {version} is installed, but flwr-ha knows flwr {known} only; {_WHAT_TO_DO}.")
    revision = installed_revision()
    if revision not in KNOWN_SCHEMAS:
        raise ConfigError(
            f"flwr {version} has the database schema {revision}, but flwr-ha knows {', '.join(KNOWN_SCHEMAS)} only; "
            "install a newer flwr-ha or flwr 1.42.0."
        )


def installed_revision() -> str:
    """Return the newest Alembic revision that the installed flwr would migrate a database to.

    Returns
    -------
    str
        The revision; several heads are joined by commas, and ``""`` stands for none.
    """
    spec = importlib.util.find_spec("flwr")  # of a top-level package: does not import it
    if spec is None or spec.origin is None:
        return ""
    versions = Path(spec.origin).parent / "supercore" / "state" / "alembic" / "versions"
    revisions: set[str] = set()
    replaced: set[str] = set()
    for file in versions.glob("rev_*.py"):
        for down, value in _REVISION.findall(file.read_text(encoding="utf-8")):
            (replaced if down else revisions).update(re.findall(r"[\"']([0-9a-f]+)[\"']", value))
    return ",".join(sorted(revisions - replaced))


def fingerprint(connection: sqlite3.Connection) -> tuple[str, str]:
    """Describe the schema of a database.

    Parameters
    ----------
    connection : sqlite3.Connection
        An open database of a SuperLink.

    Returns
    -------
    tuple of str
        The Alembic revision, and ``sha256:…`` over the names of the tables and columns that we use.
    """
    revisions = ",".join(row[0] for row in connection.execute("SELECT version_num FROM alembic_version ORDER BY 1"))
    lines = [
        f"{table}({','.join(sorted(columns_of(connection, table)))})" for table in sorted((*CONTROL_TABLES, LOG_TABLE))
    ]
    return revisions, "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def columns_of(connection: sqlite3.Connection, table: str) -> list[str]:
    """Return the names of a table's columns in the order in which the database keeps them."""
    return [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]


def check_schema(connection: sqlite3.Connection) -> tuple[str, str]:
    """Return the fingerprint of a database after checking that it is known.

    Parameters
    ----------
    connection : sqlite3.Connection
        An open database of a SuperLink.

    Returns
    -------
    tuple of str
        See `fingerprint`.

    Raises
    ------
    ConfigError
        The schema is unknown: nothing may be read from or written to it; install a known flwr.
    """
    try:
        revision, columns = fingerprint(connection)
    except sqlite3.OperationalError as error:
        raise ConfigError(f"the SuperLink's database has no schema yet ({error}); wait until it is ready.") from error
    if KNOWN_SCHEMAS.get(revision) != columns:
        raise ConfigError(
            f"the SuperLink's database has the unknown schema {revision} ({columns[:19]}…); flwr-ha knows "
            f"{', '.join(KNOWN_SCHEMAS)}; {_WHAT_TO_DO}."
        )
    return revision, columns


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
