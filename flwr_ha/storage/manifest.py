"""The part of a checkpoint that is no array, and the names of the blobs that it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.digests import is_digest
from flwr_ha.storage.tensorfile import Header, is_shape, parse_header, strict_json

FORMAT = 1
GROUPS = ("arrays", "strategy_arrays")
_KEY = "flwr_ha"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayInfo:
    """Describe an array that safetensors does not describe itself.

    Attributes
    ----------
    dtype : Any
        numpy's description as JSON: ``<f4``, or a list of fields.
    shape : tuple of int
        Its shape.
    digest : str
        The part blob with its bytes; empty when they lie in the main blob as ``U8``.
    """

    dtype: Any
    shape: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Hold the part of a checkpoint that is no array.

    Attributes
    ----------
    run_id : str
        Flower's run id, unsigned decimal.
    server_round, num_rounds : int
        Round that it ends, rounds that the run is to have.
    order : tuple of str
        Keys of all arrays, ``arrays/<name>`` or ``strategy_arrays/<name>``, in the order to be restored.
    described : Mapping of str to ArrayInfo
        Arrays in part blobs, and arrays with a dtype that safetensors lacks.
    state, history : Mapping of str to Any
        As in the checkpoint.
    """

    run_id: str
    server_round: int
    num_rounds: int
    order: tuple[str, ...]
    described: Mapping[str, ArrayInfo] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Digests of the part blobs, each once, in order."""
        return tuple(dict.fromkeys(info.digest for info in self.described.values() if info.digest))

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of the main blob; raise `CheckpointError` for what is not JSON."""
        value = {
            "format": FORMAT,
            "run_id": self.run_id,
            "server_round": self.server_round,
            "num_rounds": self.num_rounds,
            "order": list(self.order),
            "parts": [
                {"digest": info.digest, "name": name, "dtype": info.dtype, "shape": list(info.shape)}
                for name, info in self.described.items()
                if info.digest
            ],
            "raw": [
                {"name": name, "dtype": info.dtype, "shape": list(info.shape)}
                for name, info in self.described.items()
                if not info.digest
            ],
            "state": self.state,
            "history": self.history,
        }
        try:
            text = json.dumps(value, separators=(",", ":"))
            strict_json(text)  # {1: …, "1": …} would be stored as an object that cannot be read
        except (TypeError, ValueError, RecursionError, CheckpointCorruptError) as error:
            raise CheckpointError(f"the state or history of the run cannot be put in a checkpoint: {error}") from error
        return {_KEY: text}


def read_manifest(file: BinaryIO, file_bytes: int) -> tuple[Header, Manifest]:
    """Read header and manifest of a main blob.

    Raises
    ------
    CheckpointCorruptError
        It is no checkpoint, or its parts contradict each other: take another copy.
    CheckpointError
        A newer flwr_ha has made it: install that one.
    """
    header = parse_header(file, file_bytes)
    value = strict_json(header.metadata.get(_KEY, ""))
    match value:
        case {"format": int(number)} if number > FORMAT:
            raise CheckpointError(
                f"the checkpoint was made by a newer flwr_ha (format {number}, this one reads up to {FORMAT})"
            )
        case {
            "format": 1,
            "run_id": str(run_id),
            "server_round": int(server_round),
            "num_rounds": int(num_rounds),
            "order": list(order),
            "parts": list(parts),
            "raw": list(raw),
            "state": dict(state),
            "history": dict(history),
        }:
            manifest = Manifest(
                run_id=run_id,
                server_round=server_round,
                num_rounds=num_rounds,
                order=tuple(order),
                described=_described(parts, raw),
                state=state,
                history=history,
            )
        case _:
            raise CheckpointCorruptError("the blob is no checkpoint")
    _check_order(header, manifest)
    return header, manifest


def _described(parts: list[Any], raw: list[Any]) -> dict[str, ArrayInfo]:
    described = {}
    for value in [*parts, *raw]:
        match value:
            case {"name": str(name), "dtype": dtype, "shape": list(shape), **rest} if is_shape(shape):
                digest = rest.get("digest", "")
                if name not in described and (digest == "" or (isinstance(digest, str) and is_digest(digest))):
                    described[name] = ArrayInfo(dtype=dtype, shape=tuple(shape), digest=digest)
                    continue
        raise CheckpointCorruptError("a checkpoint describes an array wrongly or twice")
    return described


def _check_order(header: Header, manifest: Manifest) -> None:
    inline = {entry.name for entry in header.entries}
    parts = {name for name, info in manifest.described.items() if info.digest}
    raw = manifest.described.keys() - parts
    order = manifest.order
    is_sound = all(isinstance(key, str) and key.partition("/")[0] in GROUPS and "/" in key for key in order)
    if not is_sound or inline & parts or not raw <= inline or len(order) != len(set(order)):
        raise CheckpointCorruptError("the arrays of a checkpoint contradict each other")
    if set(order) != inline | parts:
        raise CheckpointCorruptError("a checkpoint has other arrays than it says")
