"""Get committed models out of a cluster, whether it is up or down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from flwr_ha.config import load_secret
from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError, CoordinationError
from flwr_ha.operator import Operator, RequestRefusedError
from flwr_ha.settings import Settings
from flwr_ha.storage import checkpoint
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.committed import committed_runs, read_committed
from flwr_ha.storage.export import export
from flwr_ha.storage.files import CHUNK_BYTES
from flwr_ha.storage.replication import Peer, Replicator
from flwr_ha.tls import peer_context

FETCH_TIMEOUT_S = 600.0
Entry = dict[str, Any]


def committed_rounds(settings: Settings, run_id: str) -> list[Entry]:
    """Return the committed rounds of a run, oldest first.

    Any replica that answers says it; where none does, the folders of the replicas on this machine do.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    run_id : str
        Flower's run id.

    Returns
    -------
    list of dict
        What ``GET /runs/RUN/commits`` answers, and ``kept``: whether it is among the newest ones that
        the replicas keep.

    Raises
    ------
    CheckpointError
        No such run is known; the message names those that are.
    CoordinationError
        No replica answers, and no replica has its folder on this machine.
    """
    try:
        log: list[Entry] = Operator(settings).get(f"/runs/{run_id}/commits")
    except RequestRefusedError:
        runs = [run["run_id"] for run in Operator(settings).get("/cluster")["runs"]]
        raise _unknown(settings, run_id, runs) from None
    except CoordinationError as error:
        log = _from_folders(settings, run_id, error)
    kept = settings.keep_checkpoints
    return [{**entry, "kept": index >= len(log) - kept} for index, entry in enumerate(log)]


def _from_folders(settings: Settings, run_id: str, error: CoordinationError) -> list[Entry]:
    """Return the longest log that a folder holds: commits are the same everywhere, but one may have seen fewer."""
    stores = _local_stores(settings)
    if not stores:
        raise CoordinationError(f"{error}; and no replica has its folder in {settings.data_dir}, or none to be read")
    logs, unreadable = [], []
    for store in stores:
        try:
            logs.append(read_committed(store.root, run_id))
        except CheckpointError as problem:
            unreadable.append(str(problem))
    newest = max(logs, key=lambda log: (log[-1]["term"], log[-1]["server_round"]) if log else (0, 0), default=[])
    if not newest and unreadable:
        raise CheckpointError("; ".join(unreadable))
    if not newest:
        raise _unknown(settings, run_id, sorted(frozenset().union(*(committed_runs(store.root) for store in stores))))
    return newest


def _unknown(settings: Settings, run_id: str, runs: Sequence[str]) -> CheckpointError:
    known = ", ".join(runs) or "none"
    return CheckpointError(f"run {run_id} has no committed round in cluster {settings.cluster!r}; runs: {known}")


def export_round(settings: Settings, run_id: str, server_round: int | None, out: Path) -> Entry:
    """Write the model of a committed round as one safetensors file.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    run_id : str
        Flower's run id.
    server_round : int or None
        Which round; None for the newest.
    out : Path
        The file, replaced as a whole.

    Returns
    -------
    dict
        The entry of the commit log.

    Raises
    ------
    CheckpointError
        The round is not committed, or no good copy of it is to be had; the message names the rounds
        that are kept. Or the file cannot be written.
    ConfigError
        The folder of `out` does not exist.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: there is no folder {str(out.absolute().parent)!r}")
    entries = committed_rounds(settings, run_id)
    entry = _pick(entries, run_id, server_round)
    stores = _local_stores(settings)
    problems: list[str] = []
    for store in stores:
        try:
            export(entry["digest"], store, out)
            return entry
        except CheckpointCorruptError as error:
            problems.append(f"{store.root.parent.name}: {error}")
    try:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".flwr-ha-export-") as scratch:
            gathered = BlobStore(Path(scratch))
            _gather(settings, entry["digest"], stores, gathered)
            export(entry["digest"], gathered, out)
    except CheckpointCorruptError as error:
        problems.append(str(error))
        raise _not_kept(entries, run_id, entry, problems) from error
    return entry


def _pick(entries: Sequence[Entry], run_id: str, server_round: int | None) -> Entry:
    if server_round is None and entries:
        return entries[-1]
    for entry in entries:
        if entry["server_round"] == server_round:
            return entry
    if not entries:
        raise CheckpointError(f"run {run_id} has no committed round yet")
    first, newest = entries[0]["server_round"], entries[-1]["server_round"]
    raise CheckpointError(f"round {server_round} of run {run_id} is not committed: rounds {first} to {newest} are")


def _not_kept(entries: Sequence[Entry], run_id: str, entry: Entry, problems: Sequence[str]) -> CheckpointError:
    kept = ", ".join(str(each["server_round"]) for each in entries if each["kept"])
    reasons = "; ".join(problems)
    return CheckpointError(
        f"round {entry['server_round']} of run {run_id} has no good copy ({reasons}); kept are the rounds {kept}"
    )


def _local_stores(settings: Settings) -> list[BlobStore]:
    """Return the stores of the replicas that have their folder on this machine."""
    roots = [settings.replica_dir(replica.id) / "store" for replica in settings.replicas]
    return [BlobStore(root) for root in roots if _is_there(root)]


def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder where this user may look: the replicas may be another user's."""
    with suppress(OSError):
        return path.exists()
    return False


def _gather(settings: Settings, digest: str, stores: Sequence[BlobStore], target: BlobStore) -> None:
    """Collect the blobs of a checkpoint one by one: no single replica may hold all of them."""
    with ExitStack() as stack:
        fetch = _fetcher(settings, target, stack)
        _get(digest, stores, target, fetch)
        for part in checkpoint.references(digest, target):
            _get(part, stores, target, fetch)


def _get(digest: str, stores: Sequence[BlobStore], target: BlobStore, fetch: Callable[[str], None]) -> None:
    for store in stores:
        if store.is_good(digest):
            with store.open(digest) as file:
                target.put_known(digest, iter(lambda: file.read(CHUNK_BYTES), b""))
            return
    try:
        fetch(digest)
    except CheckpointError as error:
        raise CheckpointCorruptError(str(error)) from error


def _fetcher(settings: Settings, target: BlobStore, stack: ExitStack) -> Callable[[str], None]:
    """Return what gets one blob from the object store, or from any replica that answers."""
    if settings.storage != "replicas":
        return _shared_fetcher(settings.shared_prefix, target, stack)
    secret_file = settings.secret_file or settings.data_dir / "secret"
    if not _is_there(secret_file):

        def refuse(digest: str) -> None:
            raise CheckpointError(f"{digest} is not on this machine, and without a secret no replica gives it")

        return refuse
    tls = peer_context(settings.tls)
    peers = [Peer(replica.id, str(replica.api)) for replica in settings.replicas]
    replicator = stack.enter_context(Replicator(target, peers, secret=load_secret(settings), tls=tls))
    return lambda digest: replicator.fetch([digest], timeout_s=FETCH_TIMEOUT_S)


def _shared_fetcher(prefix: str, target: BlobStore, stack: ExitStack) -> Callable[[str], None]:
    """Return what gets one blob from whichever cluster's folder below `prefix` has a good copy.

    Which folder is this cluster's only the coordinator knows, and it may be down; a digest says what the right bytes
    are, wherever they lie.
    """
    from flwr_ha.storage.objectstore import ObjectStorage, folders_below

    @cache
    def folders() -> tuple[str, ...]:
        return folders_below(prefix)

    @cache
    def storage(url: str) -> ObjectStorage:
        return stack.enter_context(ObjectStorage(url, target))

    def fetch(digest: str) -> None:
        problems = []
        for url in folders():
            try:
                storage(url).fetch([digest], timeout_s=FETCH_TIMEOUT_S)
                return
            except CheckpointError as error:
                problems.append(str(error))
        raise CheckpointError("; ".join(problems) or f"{prefix} holds no blobs")

    return fetch


def write_state_dict(safetensors_file: Path, out: Path) -> None:
    """Write an exported model as a PyTorch ``state_dict``.

    Parameters
    ----------
    safetensors_file : Path
        What `export_round` wrote.
    out : Path
        The file for ``torch.load``, replaced as a whole.

    Raises
    ------
    ConfigError
        PyTorch is not installed.
    CheckpointError
        An array has a dtype that neither safetensors nor PyTorch knows, or the disk refuses.
    """
    try:
        import torch
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError("--state-dict needs PyTorch: pip install 'flwr-ha[torch]'") from error
    with safe_open(safetensors_file, framework="pt") as file:
        foreign = json.loads((file.metadata() or {}).get("flwr_ha.raw", "{}"))
        if foreign:
            raise CheckpointError(
                f"PyTorch has no dtype for the arrays {', '.join(foreign)}: take the safetensors file"
            )
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        torch.save(state, temporary)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
