"""A cluster whose parts reach each other over links that can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as File
from types import MappingProxyType

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import Program
from tests.chaos.links import Link, Links
from tests.chaos.plans import Path


class LinkedCluster(LocalCluster):
    """Run a cluster on ZooKeeper in which each replica and the clients reach the others over links of their own.

    Parameters
    ----------
    folder : Path
        Of the cluster.
    plan : Plan
        With ZooKeeper.
    links : Links
        Running.
    """

    def __init__(self, folder: File, plan: Plan, links: Links) -> None:
        super().__init__(folder, plan)
        self.to_zookeeper: dict[int, list[Link]] = {}
        self.between: dict[tuple[int, int], Link] = {}
        self._links = links
        self.clients = links.add(_port(self.address))

    @property
    def supernode_address(self) -> str:
        """The link in front of the public address."""
        return f"127.0.0.1:{self.clients.port}"

    def start_coordinator(self) -> None:
        """Start ZooKeeper, and write a settings file for each replica."""
        super().start_coordinator()
        assert self.ensemble is not None
        apis = {replica.id: replica.api.port for replica in self.settings.replicas}
        for own in apis:
            ports = {port: self._links.add(port) for port in self.ensemble.client_ports}
            self.to_zookeeper[own] = list(ports.values())
            for other, port in apis.items():
                if other != own:
                    ports[port] = self.between[own, other] = self._links.add(port)
            text = self.config.read_text(encoding="utf-8")
            for port, link in ports.items():
                text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{link.port}")
            self._config_of(own).write_text(text, encoding="utf-8")

    def _config_of(self, replica_id: int) -> File:
        return self.config.with_name(f"flwr-ha-{replica_id}.toml")

    def start_replica(
        self, replica_id: int, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Program:
        """Start one replica with its own settings."""
        own = {"FLWR_HA_CONFIG": str(self._config_of(replica_id))}
        return super().start_replica(replica_id, *arguments, environment={**own, **environment})

    def links_of(self, replica_id: int, path: Path) -> list[Link]:
        """Return the links that a cut of this replica breaks."""
        to_replicas = [link for pair, link in self.between.items() if replica_id in pair]
        match path:
            case Path.TO_ZOOKEEPER:
                return self.to_zookeeper[replica_id]
            case Path.TO_REPLICAS:
                return to_replicas
            case Path.TO_ALL:
                return [*self.to_zookeeper[replica_id], *to_replicas]
            case Path.OF_CLIENTS:
                return [self.clients]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
