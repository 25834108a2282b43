"""Checkpoints in a local folder, for plain Flower and the simulation runtime."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError
from flwr_ha.model import Head, Metrics, Position, RunStatus, utc_now
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import fsync_folder, temporary_file, write_all

if TYPE_CHECKING:
    from flwr_ha.storage.checkpoint import Checkpoint

_FORMAT = 1
_KEPT = 3  # checkpoints


class LocalSession:
    """Keep the rounds of one training in ``FOLDER/APP/NAME``.

    Outside of a replica each process is a new run with a new run id. So what is gone on with is
    found by the app (``publisher/name``) and a name: a training that was killed and is run again
    goes on after its last committed round; one that had finished starts anew. Give trainings that
    must not be taken for each other folders of their own.

    Parameters
    ----------
    folder : Path
        Folder for checkpoints; made where it does not exist.
    run_id : str
        Run id of this process.
    app : str
        ``publisher/name``; may be empty.
    name : str
        Tells trainings of one app apart.

    Raises
    ------
    ConfigError
        The folder cannot be used, or another process trains into it.
    """

    is_once_per_run = False

    def __init__(self, folder: Path, *, run_id: str, app: str, name: str) -> None:
        self.run_id = run_id
        self._app = app
        self._folder = folder / _file_name(app or "app") / _file_name(name)
        self._heads: list[Head] = []
        self._term = 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "training.lock").open("wb")
        except OSError as error:
            raise ConfigError(f"checkpoint_dir {str(folder)!r} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._store = BlobStore(self._folder / "store")
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"another process trains into checkpoint_dir {str(self._folder)!r}") from error
        except BaseException:
            self._lock.close()
            raise

    @property
    def scratch_folder(self) -> Path:
        """Folder of this training."""
        return self._folder

    def head(self) -> Head | None:
        """Return the newest round of an unfinished training, and take over its run id."""
        self._heads = self._read()
        if not self._heads:
            return None
        newest = self._heads[-1]
        self._term = newest.position.term + 1
        if newest.position.server_round >= newest.num_rounds:
            return None
        self.run_id = newest.run_id
        return newest

    def load(self, head: Head) -> Checkpoint:
        """Return the checkpoint of a head."""
        from flwr_ha.storage.checkpoint import load

        try:
            return load(head.position.digest, self._store)
        except CheckpointCorruptError as error:
            older = [entry for entry in self._heads if entry.position < head.position]
            kept = f"round {older[-1].position.server_round}, {older[-1].position.digest}" if older else "none"
            raise CheckpointError(
                f"round {head.position.server_round} has no good copy: {error}; the previous kept checkpoint is {kept} "
                f"(to go back to it, remove the newest entry of {self._file})"
            ) from error

    def commit(self, checkpoint: Checkpoint, metrics: Metrics) -> Head:
        """Write the blobs, then replace the file of heads: the round counts from then on."""
        from flwr_ha.storage.checkpoint import references, save

        saved = save(checkpoint, self._store)
        head = Head(
            run_id=self.run_id,
            app=self._app,
            num_rounds=checkpoint.num_rounds,
            position=Position(self._term, checkpoint.server_round, saved.digest),
            model_digest=saved.model_digest,
            size_bytes=saved.size_bytes,
            committed_at=utc_now(),
            metrics=metrics,
        )
        older = [entry for entry in self._heads if entry.run_id == self.run_id]
        self._write(heads := [*older, head][-_KEPT:])
        self._heads = heads
        kept = {entry.position.digest for entry in self._heads}
        kept |= {part for digest in tuple(kept) for part in _parts(references, digest, self._store)}
        self._store.collect(kept, min_age_s=0.0)
        return head

    def report(self, status: RunStatus) -> None:
        """Drop it: nobody asks."""

    def record(self, kind: str, message: str, **fields: Any) -> None:
        """Drop it: the log has it."""

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    @property
    def _file(self) -> Path:
        return self._folder / "heads.json"

    def _read(self) -> list[Head]:
        try:
            document = json.loads(self._file.read_bytes())
            if document["format"] > _FORMAT:
                raise CheckpointError(f"{self._file} was made by a newer flwr_ha (format {document['format']})")
            return [Head.from_json(entry) for entry in document["heads"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointCorruptError(f"{self._file} cannot be read ({error!r}): remove it to start anew") from error

    def _write(self, heads: Sequence[Head]) -> None:
        document = {"format": _FORMAT, "heads": [head.to_json() for head in heads]}
        try:
            with temporary_file(self._folder) as (descriptor, path):
                write_all(descriptor, json.dumps(document, indent=1).encode())
                os.fsync(descriptor)
                path.replace(self._file)
            fsync_folder(self._folder)
        except OSError as error:
            raise CheckpointError(f"{self._file} cannot be written: {error.strerror}") from error


def _parts(references: Any, digest: str, store: BlobStore) -> tuple[str, ...]:
    try:
        return tuple(references(digest, store))
    except CheckpointError:
        return ()  # an older checkpoint has become bad: nothing to keep for it


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip(".") or "app"
