"""Settings: what is read, and what is refused with which sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.config import (
    load_secret,
    load_settings,
    load_zookeeper_password,
    parse_settings,
    session_from_environment,
)
from flwr_ha.errors import ConfigError
from flwr_ha.settings import Endpoint

GOOD: dict[str, Any] = {
    "cluster": "mnist",
    "coordinator": "zookeeper://127.0.0.1:2181,127.0.0.1:2182",
    "replicas": [
        {"id": 0, "address": "127.0.0.1:8000", "api": "127.0.0.1:8010"},
        {"id": 1, "address": "127.0.0.1:8000", "api": "127.0.0.1:8011"},
        {"id": 2, "address": "127.0.0.1:8000", "api": "127.0.0.1:8012"},
    ],
}
TOO_LONG = "a" * 300
"""A file's name at which the system refuses to look, as it does in another user's folder; root may look there."""


def changed(**changes: Any) -> dict[str, Any]:
    table = copy.deepcopy(GOOD)
    for key, value in changes.items():
        table[key.replace("_", "-")] = value
    return table


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    """A minimal table gives the documented defaults, with paths below the file's folder."""
    settings = parse_settings(GOOD, folder=tmp_path)
    assert settings.session_timeout_s == 4.0
    assert settings.data_dir == tmp_path / ".flwr-ha"
    assert settings.storage == "replicas"
    assert settings.keep_checkpoints == 3
    assert settings.majority == 2
    assert settings.zookeeper_hosts == "127.0.0.1:2181,127.0.0.1:2182"
    assert settings.replica(1).api == Endpoint("127.0.0.1", 8011)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sesion_timeout": 4}, "sesion-timeout is not a setting; the nearest is session-timeout"),
        ({"session_timeout": 0.1}, "session-timeout = 0.1: 0.4 to 60"),
        ({"session_timeout": "4"}, "session-timeout = '4' is not a number"),
        ({"session_timeout": True}, "session-timeout = True is not a number"),
        ({"keep_checkpoints": 0}, "keep-checkpoints = 0: at least 1"),
        ({"max_blob_bytes": 0}, "max-blob-bytes = 0: at least 1"),
        ({"max_blob_bytes": -5}, "max-blob-bytes = -5: at least 1"),
        ({"cluster": "a/b"}, "cluster = 'a/b'"),
        ({"coordinator": "etcd://127.0.0.1:2379"}, "coordinator = 'etcd://127.0.0.1:2379' is neither"),
        ({"coordinator": "zookeeper://127.0.0.1"}, "coordinator = '127.0.0.1' is not host:port"),
        ({"coordinator": "embedded:"}, "coordinator = 'embedded:' is neither"),
        ({"storage": "bucket"}, "storage = 'bucket' is neither"),
        ({"replicas": []}, "replicas: 0 are given"),
        ({"tls": {"ca": "", "cert": "x.pem", "key": ""}}, "tls.ca is missing"),
        ({"enable_supernode_auth": True}, "enable-supernode-auth needs TLS"),
        ({"zookeeper": {"auth": "kerberos"}}, "zookeeper.auth = 'kerberos' is none of"),
        ({"zookeeper": {"auth": "digest"}}, "needs zookeeper.user and zookeeper.password-file"),
        ({"zookeeper": {"user": "me"}}, "zookeeper.auth is missing"),
        ({"zookeeper": {"ca": "nowhere.crt"}}, "is not a file"),
        ({"zookeeper": {"cert": "a.crt"}}, "zookeeper.cert and zookeeper.key go together"),
        ({"zookeeper": {"pasword-file": "x"}}, "zookeeper.pasword-file is not a setting"),
        ({"tls": {"certificate": "x"}}, "tls.certificate is not a setting; the nearest is tls.cert"),
        ({"tls": {"ca": False}}, "tls.ca = False is not a path"),
        ({"tls": {"ca": 0}}, "tls.ca = 0 is not a path"),
        ({"tls": {"key": []}}, "tls.key = [] is not a path"),
        ({"zookeeper": {"ca": False}}, "zookeeper.ca = False is not a path"),
        ({"zookeeper": {"auth": False}}, "zookeeper.auth = False is not a text"),
        ({"zookeeper": {"user": 0}}, "zookeeper.user = 0 is not a text"),
        ({"tls": {"ca": TOO_LONG, "cert": "a", "key": "a"}}, f"{TOO_LONG}' cannot be read"),
        ({"zookeeper": {"ca": TOO_LONG}}, f"{TOO_LONG}' cannot be read"),
        ({"secret_file": "~nosuchuser/x"}, "secret-file = '~nosuchuser/x': the home directory"),
        ({"data_dir": "~nosuchuser/x"}, "data-dir = '~nosuchuser/x': the home directory"),
        ({"coordinator": "embedded:~nosuchuser/x"}, "coordinator = 'embedded:~nosuchuser/x': the home directory"),
        ({"data_dir": "a\0b"}, r"data-dir = 'a\x00b' holds a NUL"),
        ({"secret_file": "a\0b"}, r"secret-file = 'a\x00b' holds a NUL"),
        ({"tls": {"ca": "a\0b"}}, r"tls.ca = 'a\x00b' holds a NUL"),
        ({"coordinator": "embedded:a\0b"}, r"coordinator = 'embedded:a\x00b' holds a NUL"),
        ({"storage": "file:///a\0b"}, r"storage = 'file:///a\x00b' holds a NUL"),
        ({"coordinator": "zookeeper://a..b:2181"}, "coordinator = 'a..b:2181': 'a..b' is neither a host's name nor"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Each bad value gives one sentence that names the setting."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(changed(**changes), folder=tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_texts_mean_no_tls(tmp_path: Path) -> None:
    """They stand in a file that is to be filled in, and are the same as nothing."""
    empty = changed(tls={"ca": "", "cert": "", "key": ""}, zookeeper={"ca": "", "auth": "", "password-file": ""})
    assert parse_settings(empty, folder=tmp_path) == parse_settings(GOOD, folder=tmp_path)


@pytest.mark.parametrize("key", ["cluster", "coordinator", "replicas"])
def test_a_missing_setting_is_named(key: str, tmp_path: Path) -> None:
    """What has no default must be there."""
    table = copy.deepcopy(GOOD)
    del table[key]
    with pytest.raises(ConfigError, match=f"^{key} is missing"):
        parse_settings(table, folder=tmp_path)


@pytest.mark.parametrize(
    ("index", "entry", "sentence"),
    [
        (1, {"id": 0, "address": "127.0.0.1:8000", "api": "127.0.0.1:8011"}, "id = 0 is given to two replicas"),
        (1, {"id": 1, "address": "127.0.0.1:8000", "api": "127.0.0.1:8010"}, "api = 127.0.0.1:8010 is given to two"),
        (1, {"id": 1, "address": "127.0.0.1:8012", "api": "127.0.0.1:8011"}, "api = 127.0.0.1:8012 of replica 2"),
        (1, {"id": 1, "address": "127.0.0.1:99999", "api": "127.0.0.1:8011"}, "replicas: address"),
        (1, {"id": 1, "api": "127.0.0.1:8011"}, "replicas: address is missing"),
        (1, {"id": -1, "address": "127.0.0.1:8000", "api": "127.0.0.1:8011"}, "id = -1"),
        (1, {"id": 1, "address": "10.0.0.1:8000", "api": "127.0.0.1:8011"}, "secret-file is needed"),
        (1, {"id": 1, "adress": "127.0.0.1:8000", "api": "127.0.0.1:8011"}, "nearest is replicas: address"),
    ],
)
def test_contradictory_replicas_are_refused(index: int, entry: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Two replicas cannot share what makes them different."""
    table = copy.deepcopy(GOOD)
    table["replicas"][index] = entry
    with pytest.raises(ConfigError, match=sentence):
        parse_settings(table, folder=tmp_path)


@pytest.mark.parametrize(
    "host", ["a..b", ".a", "a" * 64, "999.0.0.1", "[:::]", "a@b", "a?b", "a#b", "a\0b", "\u2603.example"]
)
@pytest.mark.parametrize("key", ["address", "api"])
def test_host_that_cannot_be_asked_is_refused(key: str, host: str, tmp_path: Path) -> None:
    """No URL can be made of it, or it cannot be looked up; `list` would end with a traceback, or ask another one."""
    table = copy.deepcopy(GOOD)
    table["replicas"][1][key] = f"{host}:8009"
    with pytest.raises(ConfigError, match=f"replicas: {key} = .* is neither a host's name nor an address"):
        parse_settings(table, folder=tmp_path)


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.b.", "a_b-c.example", "REPLICA-0", "10.0.0.1", "[::1]", "[FE80::1]", "m\u00fcnchen.example"],
)
def test_host_that_can_be_asked_is_taken(host: str) -> None:
    """Names and addresses of both kinds, as people write them."""
    assert str(Endpoint.parse(f"{host}:8010", setting="api")) == f"{host}:8010"


def test_home_is_meant_wherever_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's ~ works for the coordinator's folder as for all others."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = parse_settings(changed(data_dir="~/d", coordinator="embedded:~/c"), folder=tmp_path / "etc")
    assert settings.data_dir == tmp_path / "home" / "d"
    assert settings.coordinator_folder == tmp_path / "home" / "c"


def test_embedded_is_for_one_machine(tmp_path: Path) -> None:
    """A replica beyond loopback cannot use the embedded coordinator."""
    table = changed(coordinator="embedded:here", secret_file="secret")
    table["replicas"][1]["address"] = "10.0.0.1:8000"
    with pytest.raises(ConfigError, match="one machine"):
        parse_settings(table, folder=tmp_path)
    table["replicas"][1]["address"] = "127.0.0.1:8000"
    assert parse_settings(table, folder=tmp_path).coordinator_folder == tmp_path / "here"


def test_unknown_id_names_the_known_ones(tmp_path: Path) -> None:
    """The sentence helps the person who mistyped the id."""
    with pytest.raises(ConfigError, match="--id 7 is not among the replicas of cluster 'mnist': 0, 1, 2"):
        parse_settings(GOOD, folder=tmp_path).replica(7)


def test_settings_come_from_the_named_file(tmp_path: Path) -> None:
    """--config wins over FLWR_HA_CONFIG; both a bare table and [tool.flwr-ha] are understood."""
    body = 'cluster = "{}"\ncoordinator = "embedded:c"\n[[{}replicas]]\n'
    body += 'id = 0\naddress = "127.0.0.1:1"\napi = "127.0.0.1:2"\n'
    bare, nested = tmp_path / "ha.toml", tmp_path / "pyproject.toml"
    bare.write_text(body.format("bare", ""))
    nested.write_text("[tool.flwr-ha]\n" + body.format("nested", "tool.flwr-ha."))
    assert load_settings(bare, environ={"FLWR_HA_CONFIG": str(nested)}).cluster == "bare"
    assert load_settings(environ={"FLWR_HA_CONFIG": str(nested)}).cluster == "nested"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("a = ", "not valid TOML"),
        ("[x]", "has no table"),
        ("tool = 3", "tool = 3 is not a table"),
        ("[[tool]]", r"tool = \[{}\] is not a table"),
        ("[tool]\nflwr-ha = 3", r"tool\.flwr-ha = 3 is not a table"),
        ("[[tool.flwr-ha]]", r"tool\.flwr-ha = \[{}\] is not a table"),
    ],
)
def test_a_bad_file_is_named(text: str | None, sentence: str, tmp_path: Path) -> None:
    """A file that is missing, broken or without our table is named."""
    file = tmp_path / "pyproject.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(file, environ={})
    assert str(file) in str(caught.value)


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    """The first start makes it with mode 600; later ones read the same."""
    settings = parse_settings(GOOD, folder=tmp_path)
    secret = load_secret(settings)
    assert len(secret) >= 32
    assert load_secret(settings) == secret
    assert (settings.data_dir / "secret").stat().st_mode & 0o777 == 0o600


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A world-readable secret is no secret."""
    file = tmp_path / "s"
    file.write_text("x" * 32)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(parse_settings(changed(secret_file="s"), folder=tmp_path))


def test_data_dir_into_which_nobody_may_look_is_named(tmp_path: Path) -> None:
    """An operator who is not the replicas' user learns which setting it is about."""
    with pytest.raises(ConfigError, match=f"data-dir '{tmp_path}/{TOO_LONG}' cannot be"):
        load_secret(parse_settings(changed(data_dir=TOO_LONG), folder=tmp_path))


def test_without_a_replica_there_is_no_session() -> None:
    """A ServerApp on a plain SuperLink sees no session."""
    assert session_from_environment({}) is None


def test_password_towards_zookeeper_is_for_its_owner_only(tmp_path: Path) -> None:
    """A password file that others can read is refused before anything is sent."""
    file = tmp_path / "password"
    file.write_text("wonderland\n")
    file.chmod(0o644)
    table = changed(zookeeper={"auth": "digest", "user": "alice", "password-file": "password"})
    settings = parse_settings(table, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"zookeeper\.password-file .* chmod 600"):
        load_zookeeper_password(settings)
    file.chmod(0o600)
    assert load_zookeeper_password(settings) == "wonderland"
