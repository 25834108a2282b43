"""Say how a SuperLink child is run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr_ha.errors import ConfigError
from flwr_ha.superlink.procfs import CHILD_MODULE

_DEFAULT_ENV = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
_FIXED_ENV = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Name the PEM files for the public socket.

    Attributes
    ----------
    cert, key : Path
        Certificate chain and private key of this replica.
    """

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkSettings:
    """Say how a SuperLink child is run.

    Attributes
    ----------
    database : Path
        Database file; made anew at each start, what is there is deleted.
    log_file : Path
        Output of the SuperLink, SuperExec and their warnings is appended to it.
    private_port : int
        Port on 127.0.0.1 for SuperExec and the ServerApps; 0 takes a free one.
    app_env : mapping of str
        Added to the environment of the child, which hands it to the ServerApps.
    tls : TlsFiles, optional
        Certificates of the public socket; the private one is plain.
    has_supernode_auth : bool
        Whether SuperNodes must be registered with their public keys (Flower's ``--enable-supernode-auth``).
    ping_interval_s : float
        Seconds between two pings.
    frozen_after_s : float
        Seconds of silence after which the child counts as frozen.
    replicate_timeout_s : float
        Seconds that an answer waits for its replication; below the 30 s of Flower's clients.
    """

    database: Path
    log_file: Path
    private_port: int = 0
    app_env: Mapping[str, str] = field(default_factory=dict)
    tls: TlsFiles | None = None
    has_supernode_auth: bool = False
    ping_interval_s: float = 0.5
    frozen_after_s: float = 5.0
    replicate_timeout_s: float = 15.0

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        if not 0 < self.ping_interval_s < self.frozen_after_s:
            raise ConfigError("ping_interval_s must be above 0 and below frozen_after_s.")
        if self.has_supernode_auth and self.tls is None:
            raise ConfigError("SuperNode authentication needs TLS: set cert and key in [tool.flwr-ha.tls].")

    def prepare(self) -> None:
        """Make the folders, and delete the database of an earlier start.

        Raises
        ------
        ConfigError
            The folder cannot be written: change ``data-dir``.
        """
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self.database.parent.mkdir(parents=True, exist_ok=True)
            for suffix in ("", "-wal", "-shm"):
                self.database.with_name(self.database.name + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder of the SuperLink cannot be written: {error} (see data-dir).") from error

    def command(self, *, channel_fd: int, lease_fd: int) -> list[str]:
        """Return the command line of the child; both descriptors are inherited by it."""
        arguments = {
            "agent_pid": os.getpid(),
            "channel_fd": channel_fd,
            "lease_fd": lease_fd,
            "database": str(self.database.absolute()),
            "private_port": self.private_port,
            "has_supernode_auth": self.has_supernode_auth,
            "replicate_timeout_s": self.replicate_timeout_s,
            "tls": None if self.tls is None else {"cert": str(self.tls.cert), "key": str(self.tls.key)},
        }
        return [sys.executable, "-m", CHILD_MODULE, json.dumps(arguments)]

    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the child: the agent's own, where `flwr-serverapp` is found, and what we add."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', os.defpath)}"
        return {**_DEFAULT_ENV, **own, **_FIXED_ENV, "PATH": programs, **self.app_env}
