"""The commit logs beside the blobs: which of them are committed rounds, readable with the cluster down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr_ha.errors import CheckpointError
from flwr_ha.model import Head
from flwr_ha.storage.files import disk_errors, fsync_folder, make_folder, temporary_file, write_all

FOLDER = "committed"
FORMAT = 1


def write_committed(root: Path, logs: Mapping[str, Sequence[Head]]) -> None:
    """Replace the files of some runs, each as a whole; those of other runs stay.

    Parameters
    ----------
    root : Path
        Folder of a blob store.
    logs : mapping of str to sequence of Head
        Commits of each run, oldest first.

    Raises
    ------
    CheckpointError
        The disk refuses; each file is as it was or as it should be.
    """
    folder = root / FOLDER
    with disk_errors(root):
        make_folder(folder)
        for run_id, log in logs.items():
            data = json.dumps({"format": FORMAT, "commits": [head.to_json() for head in log]}).encode()
            with temporary_file(root / "temporary") as (descriptor, temporary):
                write_all(descriptor, data)
                os.fsync(descriptor)
                temporary.replace(folder / f"{run_id}.json")
        fsync_folder(folder)


def committed_runs(root: Path) -> frozenset[str]:
    """Return the runs of which a blob store holds the commit log."""
    try:
        return frozenset(path.stem for path in (root / FOLDER).iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise CheckpointError(f"{root / FOLDER} cannot be read: {error.strerror}") from error


def read_committed(root: Path, run_id: str) -> list[dict[str, Any]]:
    """Return the commits of a run that a blob store knows of, oldest first; empty where there are none.

    Raises
    ------
    CheckpointError
        The file cannot be read, or a newer flwr_ha has written it.
    """
    path = root / FOLDER / f"{run_id}.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    match value:
        case {"format": 1, "commits": list(commits)}:
            return commits
        case {"format": int(number)} if number != FORMAT:
            raise CheckpointError(f"{path} was written by a newer flwr_ha (format {number}): use that one")
        case _:
            raise CheckpointError(f"{path} is no commit log of flwr_ha")
