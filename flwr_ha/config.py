"""Settings: the only reader of TOML files and of the environment."""

from __future__ import annotations

import difflib
import os
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr_ha.errors import ConfigError
from flwr_ha.failpoints import Failpoint
from flwr_ha.settings import Endpoint, ReplicaSettings, SessionSettings, Settings, TlsSettings, ZooKeeperSettings

DEFAULT_FILE = "pyproject.toml"


_KEYS = {
    "cluster": ("cluster", str),
    "coordinator": ("coordinator", str),
    "session-timeout": ("session_timeout_s", float),
    "data-dir": ("data_dir", Path),
    "storage": ("storage", str),
    "keep-checkpoints": ("keep_checkpoints", int),
    "secret-file": ("secret_file", Path),
    "serverapp-restarts": ("serverapp_restarts", int),
    "max-blob-bytes": ("max_blob_bytes", int),
    "enable-supernode-auth": ("enable_supernode_auth", bool),
    "tls": ("tls", dict),
    "zookeeper": ("zookeeper", dict),
    "replicas": ("replicas", list),
}


_SECURITY_KEYS = ("tls", "zookeeper", "enable-supernode-auth")


def load_settings(
    file: Path | None = None, *, environ: Mapping[str, str] = os.environ, has_certificates: bool = True
) -> Settings:
    """Read the settings of a cluster.

    Parameters
    ----------
    file : Path, optional
        TOML file; else the one that ``FLWR_HA_CONFIG`` names, else ``pyproject.toml`` here.
    environ : mapping
        The environment.
    has_certificates : bool
        False where the files that the settings name are yet to be made: TLS and what needs it is left out.

    Returns
    -------
    Settings
        Checked; relative paths are taken from the folder of the file.

    Raises
    ------
    ConfigError
        One sentence that names the setting or the file: the user must change it.
    """
    path = file or Path(environ.get("FLWR_HA_CONFIG") or DEFAULT_FILE)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {str(path)!r} is not valid TOML: {error}") from error
    table = _own_table(document, path)
    if not has_certificates:
        table = {key: value for key, value in table.items() if key not in _SECURITY_KEYS}
    try:
        return parse_settings(table, folder=path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _own_table(document: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return ``[tool.flwr-ha]``, or all of a file that has no ``[tool]`` and is no ``pyproject.toml``."""
    name, table = "tool", document.get("tool", {})
    if isinstance(table, Mapping):
        name, table = "tool.flwr-ha", table.get("flwr-ha")
    if table is None:
        if path.name == DEFAULT_FILE or "tool" in document:
            raise ConfigError(f"settings file {str(path)!r} has no table [tool.flwr-ha]")
        return document
    if not isinstance(table, Mapping):
        raise ConfigError(f"settings file {str(path)!r}: {name} = {table!r} is not a table")
    return table


def parse_settings(table: Mapping[str, Any], *, folder: Path) -> Settings:
    """Return the settings that a table of TOML holds; relative paths are taken from `folder`."""
    _refuse_unknown(table, _KEYS, where="")
    values: dict[str, Any] = {}
    for key, (name, kind) in _KEYS.items():
        if key not in table:
            if key in ("cluster", "coordinator", "replicas"):
                raise ConfigError(f"{key} is missing")
            continue
        values[name] = _converted(key, table[key], kind, folder)
    values.setdefault("data_dir", folder / ".flwr-ha")
    coordinator = values["coordinator"]
    if coordinator.startswith("embedded:") and coordinator != "embedded:":
        place = _path(coordinator.removeprefix("embedded:"), folder, setting=f"coordinator = {coordinator!r}")
        values["coordinator"] = f"embedded:{place}"
    values["tls"] = _tls(values.get("tls", {}), folder)
    values["zookeeper"] = _zookeeper(values.get("zookeeper", {}), folder)
    values["replicas"] = tuple(_replica(entry) for entry in values["replicas"])
    return Settings(**values)


def _converted(key: str, value: Any, kind: type, folder: Path) -> Any:
    wrong = ConfigError(f"{key} = {value!r} is not {_KIND_NAMES[kind]}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{key} = {value!r} holds a NUL, which no file's name and no address can hold")
    if kind is Path:
        if not isinstance(value, str):
            raise wrong
        if key == "secret-file" and not value:
            return None
        return _path(value, folder, setting=f"{key} = {value!r}")
    if kind in (int, float) and isinstance(value, bool):
        raise wrong
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind):
        raise wrong
    return value


def _path(text: str, folder: Path, *, setting: str) -> Path:
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}: the home directory that ~ stands for is not known here") from error


_KIND_NAMES: dict[type, str] = {
    str: "a text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    Path: "a path",
    dict: "a table",
    list: "a list of tables",
}


def _tls(table: Mapping[str, Any], folder: Path) -> TlsSettings:
    _refuse_unknown(table, ("ca", "cert", "key"), where="tls.")
    paths = {key: _converted(f"tls.{key}", value, Path, folder) for key, value in table.items() if value != ""}
    return TlsSettings(**paths)


def _zookeeper(table: Mapping[str, Any], folder: Path) -> ZooKeeperSettings:
    paths = ("ca", "cert", "key", "password-file")
    _refuse_unknown(table, (*paths, "auth", "user"), where="zookeeper.")
    values = {
        key.replace("-", "_"): _converted(f"zookeeper.{key}", value, Path if key in paths else str, folder)
        for key, value in table.items()
        if value != ""
    }
    return ZooKeeperSettings(**values)


def _replica(entry: Any) -> ReplicaSettings:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"replicas: {entry!r} is not a table with id, address and api")
    _refuse_unknown(entry, ("id", "address", "api"), where="replicas: ")
    missing = next((key for key in ("id", "address", "api") if key not in entry), None)
    if missing:
        raise ConfigError(f"replicas: {missing} is missing in {dict(entry)!r}")
    endpoints = {key: Endpoint.parse(entry[key], setting=f"replicas: {key}") for key in ("address", "api")}
    return ReplicaSettings(id=entry["id"], **endpoints)


def _refuse_unknown(table: Iterable[str], known: Iterable[str], *, where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}{key} is not a setting; the nearest is {where}{nearest}")


def load_secret(settings: Settings) -> str:
    """Return the shared secret; make it on first start where no file is named.

    Raises
    ------
    ConfigError
        The file that ``secret-file`` names is missing, empty or readable by others.
    """
    path = settings.secret_file or settings.data_dir / "secret"
    try:
        is_missing = settings.secret_file is None and not path.exists()
    except OSError as error:  # an operator who is not the user of the replicas may not look into their folder
        raise ConfigError(f"data-dir {str(path.parent)!r} cannot be read: {error.strerror}") from error
    if is_missing:
        _make_secret(path)
    return _read_private(path, setting="secret-file", min_chars=16)


def load_zookeeper_password(settings: Settings) -> str:
    """Return the password towards ZooKeeper; empty where there is none.

    Raises
    ------
    ConfigError
        The file that ``zookeeper.password-file`` names is missing, empty or readable by others.
    """
    path = settings.zookeeper.password_file
    return "" if path is None else _read_private(path, setting="zookeeper.password-file", min_chars=1)


def _read_private(path: Path, *, setting: str, min_chars: int) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(text) < min_chars:
        raise ConfigError(f"{setting} {str(path)!r} holds fewer than {min_chars} characters")
    if mode & 0o077:
        raise ConfigError(f"{setting} {str(path)!r} can be read by others: chmod 600 it")
    return text


def _make_secret(path: Path) -> None:
    """Write a new secret; when several replicas start at once the first one wins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".secret-{os.getpid()}")
        own.touch(mode=0o600)
        own.write_text(secrets.token_urlsafe(32) + "\n", encoding="utf-8")
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        finally:
            own.unlink()
    except OSError as error:
        raise ConfigError(f"data-dir {str(path.parent)!r} cannot be written: {error.strerror}") from error


def session_from_environment(environ: Mapping[str, str] = os.environ) -> SessionSettings | None:
    """Return how to reach the replica, or None where the ServerApp runs without one."""
    url, token = environ.get("FLWR_HA_SESSION"), environ.get("FLWR_HA_TOKEN")
    return SessionSettings(url, token) if url and token else None


def failpoint_from_environment(environ: Mapping[str, str] = os.environ) -> Failpoint | None:
    """Return the failpoint that ``FLWR_HA_FAILPOINT`` names, for tests; ConfigError where there is no such one."""
    text = environ.get("FLWR_HA_FAILPOINT")
    return Failpoint.parse(text) if text else None


def replay_dir_from_environment(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which a SuperNode keeps replies: ``FLWR_HA_REPLAY_DIR``, or the user's cache."""
    if folder := environ.get("FLWR_HA_REPLAY_DIR"):
        return Path(folder)
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flwr-ha" / "replay"


def zookeeper_home_from_environment(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of an unpacked ZooKeeper release that ``ZOOKEEPER_HOME`` names."""
    home = environ.get("ZOOKEEPER_HOME")
    return Path(home) if home else None
