"""Finding ZooKeeper on this machine, and what the user is told where it is missing."""

import socket

import pytest

from flwr_ha.errors import ConfigError
from flwr_ha.local import zookeeper
from flwr_ha.local.zookeeper import LocalEnsemble, find_zookeeper, free_ports


def test_an_unpacked_release_wins(tmp_path):
    """ZOOKEEPER_HOME is what the user chose; its own logging configuration is taken with it."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "zookeeper-3.9.4.jar").write_text("")

    assert find_zookeeper(tmp_path) == f"{tmp_path}/conf:{tmp_path}/lib/*"


@pytest.mark.parametrize("missing", ["ZooKeeper", "Java"])
def test_what_is_missing_is_said_with_both_ways_to_get_it(tmp_path, monkeypatch, missing):
    """Debian's package, or a release and ZOOKEEPER_HOME."""
    jar = tmp_path / "zookeeper.jar"
    if missing == "Java":
        jar.write_text("")
    monkeypatch.setattr(zookeeper, "DEBIAN_JAR", jar)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ConfigError, match=rf"{missing} was not found.*apt-get install zookeeper.*ZOOKEEPER_HOME"):
        LocalEnsemble(tmp_path)


def test_the_number_of_ports_must_be_that_of_the_nodes(tmp_path):
    """Three nodes, two ports."""
    with pytest.raises(ConfigError, match="3 ZooKeeper nodes need 3 client ports, 2 are given"):
        LocalEnsemble(tmp_path, client_ports=[2181, 2182])


def test_free_ports_are_different_and_can_be_bound():
    """All of them at once, outside of the range that outgoing connections take their ports from."""
    ports = free_ports(20)

    assert len(set(ports)) == 20
    assert all(15000 <= port < 32000 for port in ports)
    sockets = [socket.create_server(("127.0.0.1", port)) for port in ports]
    for each in sockets:
        each.close()
