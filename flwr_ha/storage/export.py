"""A checkpoint's model as one plain safetensors file, for other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flwr_ha.errors import CheckpointError
from flwr_ha.storage.arrays import SAFETENSORS, Array, describe, raw_bytes
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import CheckpointReader, opened
from flwr_ha.storage.files import disk_errors, fsync_folder, temporary_file, write_all
from flwr_ha.storage.tensorfile import format_header, layout

_PREFIX = "arrays/"


def export(digest: str, store: BlobStore, out: Path) -> None:
    """Write the model's arrays under their own names; the strategy's arrays are left out.

    Parameters
    ----------
    digest : str
        The checkpoint.
    store : BlobStore
        Where it and its parts lie.
    out : Path
        The file, replaced as a whole. Big-endian arrays become little-endian ones; an array with a
        dtype that safetensors lacks becomes its bytes, its dtype and shape stand in the metadata.

    Raises
    ------
    CheckpointCorruptError
        A blob is missing or bad: fetch it from a peer.
    CheckpointError
        The file cannot be written, or an array has the one name that safetensors reserves.
    """
    with opened(digest, store) as reader:
        names = [key.removeprefix(_PREFIX) for key in reader.manifest.order if key.startswith(_PREFIX)]
        if "__metadata__" in names:
            raise CheckpointError("an array is named __metadata__, which safetensors reserves")
        tensors, raw = [], {}
        for name in names:
            array = _little_endian(reader.array(_PREFIX + name))
            described = describe(name, array.dtype)
            if isinstance(described, str) and described in SAFETENSORS:
                tensors.append((name, SAFETENSORS[described], array.shape))
            else:
                tensors.append((name, "U8", (array.nbytes,)))
                raw[name] = {"dtype": described, "shape": list(array.shape)}
        metadata = {"run_id": reader.manifest.run_id, "server_round": str(reader.manifest.server_round)}
        if raw:
            metadata["flwr_ha.raw"] = json.dumps(raw)
        _write(reader, names, format_header(layout(tensors), metadata), out)


def _write(reader: CheckpointReader, names: list[str], header: bytes, out: Path) -> None:
    with disk_errors(out.parent), temporary_file(out.parent) as (descriptor, temporary):
        write_all(descriptor, header)
        for name in names:
            write_all(descriptor, raw_bytes(_little_endian(reader.array(_PREFIX + name))))
        os.fsync(descriptor)
        temporary.replace(out)
        fsync_folder(out.parent)


def _little_endian(array: Array) -> Array:
    """Return the array itself, or a little-endian copy where that makes it one that safetensors knows."""
    dtype = array.dtype.newbyteorder("<")
    return array.astype(dtype) if array.dtype != dtype and dtype.str in SAFETENSORS else array
