"""The settings of a cluster as checked, frozen values."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from flwr_ha.errors import ConfigError

MAX_REPLICAS = 15
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Name a host and a port.

    Attributes
    ----------
    host : str
        Name or address, without brackets.
    port : int
        1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def parse(cls, text: object, *, setting: str) -> Endpoint:
        """Return the endpoint that ``host:port`` or ``[v6]:port`` names; ConfigError names the setting."""
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]\s/]+)):(\d{1,5})", str(text))
        if not isinstance(text, str) or match is None or not 0 < int(match[3]) < 65536:
            raise ConfigError(f'{setting} = {text!r} is not host:port, for example "127.0.0.1:8000"')
        endpoint = cls(match[1] or match[2], int(match[3]))
        if not endpoint._is_usable():
            raise ConfigError(f"{setting} = {text!r}: {endpoint.host!r} is neither a host's name nor an address")
        return endpoint

    def _is_usable(self) -> bool:
        """Whether a URL can be made of it and its name be looked up: both raise for some texts, each for others."""
        import httpx

        try:
            self.host.encode("idna")
            return httpx.URL(f"http://{self}").host.lower() == self.host.lower()
        except (UnicodeError, httpx.InvalidURL):
            return False


def _check_is_file(path: Path, *, setting: str) -> None:
    try:
        is_file = path.is_file()
    except OSError as error:  # in a folder of another user, say
        raise ConfigError(f"{setting} = {str(path)!r} cannot be read: {error.strerror}") from error
    if not is_file:
        raise ConfigError(f"{setting} = {str(path)!r} is not a file")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Name the PEM files for TLS; all three or none.

    Attributes
    ----------
    ca, cert, key : Path or None
        Certificate of the authority, certificate and private key of the servers.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("ca", "cert", "key") if getattr(self, name)]
        if given and len(given) < 3:
            missing = next(name for name in ("ca", "cert", "key") if name not in given)
            raise ConfigError(f"tls.{missing} is missing: tls.ca, tls.cert and tls.key go together")
        for name in given:
            _check_is_file(getattr(self, name), setting=f"tls.{name}")

    @property
    def is_on(self) -> bool:
        """Whether the public address and the replicas' API speak TLS."""
        return self.cert is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooKeeperSettings:
    """Say how ZooKeeper is reached where it is protected.

    Attributes
    ----------
    ca : Path or None
        PEM file of the authority that signed ZooKeeper's certificates; None: no TLS.
    cert, key : Path or None
        Own certificate and private key, where ZooKeeper asks for one.
    auth : str
        ``none``, ``digest`` or ``sasl`` (DIGEST-MD5); with the others all entries can be read and
        changed by this user only.
    user : str
        Name of the user.
    password_file : Path or None
        File with the password, mode 600.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    auth: str = "none"
    user: str = ""
    password_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("zookeeper.cert and zookeeper.key go together")
        if self.cert is not None and self.ca is None:
            raise ConfigError("zookeeper.ca is missing: zookeeper.cert is of use with TLS only")
        for name in ("ca", "cert", "key"):
            path: Path | None = getattr(self, name)
            if path is not None:
                _check_is_file(path, setting=f"zookeeper.{name}")
        if self.auth not in ("none", "digest", "sasl"):
            raise ConfigError(f'zookeeper.auth = {self.auth!r} is none of "none", "digest", "sasl"')
        if self.auth != "none" and (not self.user or self.password_file is None):
            raise ConfigError(f'zookeeper.auth = "{self.auth}" needs zookeeper.user and zookeeper.password-file')
        if self.auth == "none" and (self.user or self.password_file is not None):
            raise ConfigError('zookeeper.auth is missing: "digest" or "sasl" says what zookeeper.user is for')
        if ":" in self.user:
            raise ConfigError(f"zookeeper.user = {self.user!r} may not contain a colon")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """Describe one replica.

    Attributes
    ----------
    id : int
        Counts from 0.
    address : Endpoint
        Public SuperLink address; listens only while this replica leads.
    api : Endpoint
        REST of this replica.
    """

    id: int
    address: Endpoint
    api: Endpoint

    def __post_init__(self) -> None:
        if isinstance(self.id, bool) or not isinstance(self.id, int) or self.id < 0:
            raise ConfigError(f"replicas: id = {self.id!r} is not a whole number from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hold the settings of a cluster.

    Attributes
    ----------
    cluster : str
        Name; several clusters can share one ZooKeeper.
    coordinator : str
        ``zookeeper://host:port,…`` or ``embedded:FOLDER``.
    session_timeout_s : float
        Seconds after which a silent leader is replaced; 0.4 to 60.
    data_dir : Path
        Each replica uses its own folder below it.
    storage : str
        ``replicas``, or an fsspec URL.
    keep_checkpoints : int
        Per run, from 1.
    secret_file : Path or None
        Shared secret of replicas and operators; None: made on first start below ``data_dir``.
    serverapp_restarts : int
        How often a ServerApp that was killed is started again in one term, from 0.
    max_blob_bytes : int
        Largest blob that a replica accepts, from 1.
    enable_supernode_auth : bool
        Passed to the SuperLink.
    tls : TlsSettings
        Given to the SuperLink and the replicas' API.
    zookeeper : ZooKeeperSettings
        TLS and user towards ZooKeeper.
    replicas : tuple of ReplicaSettings
        All of them, in the order of the file.
    """

    cluster: str
    coordinator: str
    data_dir: Path
    replicas: tuple[ReplicaSettings, ...]
    session_timeout_s: float = 4.0
    storage: str = "replicas"
    keep_checkpoints: int = 3
    secret_file: Path | None = None
    serverapp_restarts: int = 3
    max_blob_bytes: int = 64 * 1024**3
    enable_supernode_auth: bool = False
    tls: TlsSettings = field(default_factory=TlsSettings)
    zookeeper: ZooKeeperSettings = field(default_factory=ZooKeeperSettings)

    def __post_init__(self) -> None:
        if not _NAME.match(self.cluster):
            raise ConfigError(f"cluster = {self.cluster!r}: letters, digits, '_', '.', '-' only, 64 at most")
        if not 0.4 <= self.session_timeout_s <= 60:
            raise ConfigError(f"session-timeout = {self.session_timeout_s}: 0.4 to 60 seconds are possible")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"keep-checkpoints = {self.keep_checkpoints}: at least 1 is needed")
        if self.serverapp_restarts < 0:
            raise ConfigError(f"serverapp-restarts = {self.serverapp_restarts}: 0 or more is possible")
        if self.max_blob_bytes < 1:
            raise ConfigError(f"max-blob-bytes = {self.max_blob_bytes}: at least 1 is needed, or nothing can be copied")
        if self.storage != "replicas" and "://" not in self.storage:
            raise ConfigError(f'storage = {self.storage!r} is neither "replicas" nor a URL like "s3://bucket/prefix"')
        if self.enable_supernode_auth and not self.tls.is_on:
            raise ConfigError("enable-supernode-auth needs TLS: set tls.ca, tls.cert and tls.key")
        self._check_coordinator()
        self._check_replicas()

    def _check_coordinator(self) -> None:
        kind, _, rest = self.coordinator.partition(":")
        if kind not in ("zookeeper", "embedded") or not rest.strip("/"):
            raise ConfigError(
                f'coordinator = {self.coordinator!r} is neither "zookeeper://host:port,…" nor "embedded:FOLDER"'
            )
        if kind == "zookeeper":
            for host in rest.removeprefix("//").split(","):
                Endpoint.parse(host, setting="coordinator")

    def _check_replicas(self) -> None:
        if not 0 < len(self.replicas) <= MAX_REPLICAS:
            raise ConfigError(f"replicas: {len(self.replicas)} are given, 1 to {MAX_REPLICAS} are possible")
        for name in ("id", "api"):
            values = [getattr(replica, name) for replica in self.replicas]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ConfigError(f"replicas: {name} = {twice} is given to two replicas")
        addresses = {replica.address for replica in self.replicas}
        clash = next((replica for replica in self.replicas if replica.api in addresses), None)
        if clash is not None:
            raise ConfigError(f"replicas: api = {clash.api} of replica {clash.id} is also a public address")
        if self.is_embedded and not self.is_on_loopback:
            raise ConfigError('coordinator = "embedded:…" serves one machine, but a replica has an address beyond it')
        if not self.is_on_loopback and self.secret_file is None:
            raise ConfigError("secret-file is needed: a replica has an address beyond this machine")

    @property
    def is_embedded(self) -> bool:
        """Whether the coordinator is a folder on this machine."""
        return self.coordinator.startswith("embedded:")

    @property
    def is_on_loopback(self) -> bool:
        """Whether nothing listens beyond this machine."""
        return all(replica.address.is_loopback and replica.api.is_loopback for replica in self.replicas)

    @property
    def majority(self) -> int:
        """How many replicas must hold a checkpoint before it counts."""
        return len(self.replicas) // 2 + 1

    @property
    def coordinator_folder(self) -> Path:
        """Where the embedded coordinator keeps its files."""
        return Path(self.coordinator.removeprefix("embedded:"))

    @property
    def zookeeper_hosts(self) -> str:
        """The connect string, ``host:port,host:port``."""
        return self.coordinator.removeprefix("zookeeper:").removeprefix("//")

    @property
    def shared_prefix(self) -> str:
        """URL below which the clusters of this name have their folders in the object store."""
        return f"{self.storage.rstrip('/')}/{self.cluster}"

    def shared_url(self, identity: str) -> str:
        """Return where one cluster's blobs lie in the object store.

        Not even clusters of one name share a blob: each removes what it does not need itself.
        """
        return f"{self.shared_prefix}/{identity}"

    def replica(self, replica_id: int) -> ReplicaSettings:
        """Return one replica's settings; ConfigError names the ids that exist."""
        for replica in self.replicas:
            if replica.id == replica_id:
                return replica
        known = ", ".join(str(replica.id) for replica in self.replicas)
        raise ConfigError(f"--id {replica_id} is not among the replicas of cluster {self.cluster!r}: {known}")

    def replica_dir(self, replica_id: int) -> Path:
        """Return the folder of one replica."""
        return self.data_dir / f"replica-{replica_id}"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Say how a ServerApp reaches the replica that runs it.

    Attributes
    ----------
    url : str
        Base URL on loopback.
    token : str
        Good for one life of the SuperLink.
    """

    url: str
    token: str

    def to_environment(self) -> dict[str, str]:
        """Return the variables that carry it to the ServerApp."""
        return {"FLWR_HA_SESSION": self.url, "FLWR_HA_TOKEN": self.token}
