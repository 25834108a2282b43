"""Names of blobs, and what is wrong with a blob of a name."""

from __future__ import annotations

import re

from flwr_ha.errors import CheckpointCorruptError, CheckpointError

PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class BlobCorruptError(CheckpointCorruptError):
    """The local copy of a blob cannot be used: fetch it from a peer.

    Attributes
    ----------
    digest : str
        The blob to fetch.
    """

    def __init__(self, digest: str, message: str) -> None:
        super().__init__(message)
        self.digest = digest


class BlobMissingError(BlobCorruptError):
    """There is no local copy of a blob: fetch it from a peer."""


class BlobLostError(BlobCorruptError):
    """All replicas have answered, and none has a good copy of a blob: take an older checkpoint."""


def is_digest(text: str) -> bool:
    """Whether `text` is ``sha256:`` and 64 lower-case hexadecimal digits, and nothing else."""
    return _DIGEST.fullmatch(text) is not None


def validate_digest(text: str) -> str:
    """Return `text` if it is ``sha256:`` and 64 lower-case hexadecimal digits, and nothing else.

    Raises
    ------
    CheckpointError
        It is not; as a file name it could lead anywhere.
    """
    if not is_digest(text):
        raise CheckpointError(f"{text[:100]!r} is not a digest (sha256: and 64 lower-case hexadecimal digits)")
    return text
