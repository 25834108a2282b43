"""What can go wrong, one class per thing that the caller must do about it."""


class HaError(Exception):
    """Is the base of every error that flwr_ha raises on purpose."""


class ConfigError(HaError, ValueError):
    """The user must change the configuration; the message names the setting or the file."""


class CoordinationError(HaError):
    """The coordinator did not answer, the outcome is unknown: read again, then decide."""


class NoLeaderError(CoordinationError):
    """Nobody leads at the moment: wait, then ask again."""


class FencedError(HaError):
    """A newer term exists, or the leadership was given up: never retry, step down."""


class CheckpointError(HaError):
    """A checkpoint cannot be written, read or found."""


class CheckpointCorruptError(CheckpointError):
    """The bytes do not match their digest: take another copy."""


class NoMajorityError(CheckpointError):
    """Too few replicas hold the checkpoint: it is not committed; try again when more are back."""


class NotEnoughNodesError(HaError):
    """Fewer valid replies than ``min_nodes`` came in, and the limit for attempts or waiting is reached."""
