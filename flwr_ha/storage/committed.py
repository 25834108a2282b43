"""The commit log beside the blobs: which of them are committed rounds, readable with the cluster down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr_ha.errors import CheckpointError
from flwr_ha.model import Head
from flwr_ha.storage.files import disk_errors, fsync_folder, temporary_file, write_all

FILE = "committed.json"
FORMAT = 1
MAX_ENTRIES = 1000


def write_committed(root: Path, logs: Mapping[str, Sequence[Head]]) -> None:
    """Replace the file as a whole.

    Parameters
    ----------
    root : Path
        Folder of a blob store.
    logs : mapping of str to sequence of Head
        Commit log of each run, oldest first; the newest `MAX_ENTRIES` of each are written.

    Raises
    ------
    CheckpointError
        The disk refuses; the file is as it was.
    """
    runs = {run_id: [head.to_json() for head in log[-MAX_ENTRIES:]] for run_id, log in logs.items()}
    data = json.dumps({"format": FORMAT, "runs": runs}).encode()
    with disk_errors(root), temporary_file(root / "temporary") as (descriptor, temporary):
        write_all(descriptor, data)
        os.fsync(descriptor)
        temporary.replace(root / FILE)
        fsync_folder(root)


def read_committed(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the commit logs that a blob store holds, by run id; empty where there are none.

    Raises
    ------
    CheckpointError
        The file cannot be read, or a newer flwr_ha has written it.
    """
    path = root / FILE
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    match value:
        case {"format": 1, "runs": dict(runs)}:
            return runs
        case {"format": int(number)}:
            raise CheckpointError(f"{path} was written by a newer flwr_ha (format {number}): use that one")
        case _:
            raise CheckpointError(f"{path} is no commit log of flwr_ha")
