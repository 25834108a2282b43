"""Three disks and the miniature replicas that run on them, one after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.embedded import EmbeddedStore
from flwr_ha.model import ControlHead, Head
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.settings import Endpoint, TlsSettings
from flwr_ha.storage.blobs import BlobStore
from tests.chaos.miniature import RUN, SESSION_S, Job

SECRET = "a secret of the replicas"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold the disks of three replicas; those of 1 and 2 answer over HTTP, as standbys' do."""

    folder: Path
    peers: dict[str, str]
    storage: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(
        self, replica_id: int, *, rounds: int, failpoint: str = "", has_new_node: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run one replica until the run has all rounds, or until it comes to harm."""
        peers = {other: api for other, api in self.peers.items() if other != str(replica_id)}
        job = Job(
            replica_id=replica_id,
            folder=str(self.folder),
            peers=peers,
            secret=SECRET,
            rounds=rounds,
            storage=self.storage,
            has_new_node=has_new_node,
        )
        environment = {**os.environ, **self.environment, "FLWR_HA_FAILPOINT": failpoint}
        command = [sys.executable, "-m", "tests.chaos.miniature", job.to_text()]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120.0, check=False, cwd=ROOT
        )

    def facts(self) -> tuple[Head | None, list[int], ControlHead | None, int]:
        """Return head, committed rounds, control head and number of terms."""
        store = EmbeddedStore(self.folder / "coordinator", session_timeout_s=SESSION_S)
        store.start(lambda: None, timeout_s=10.0)
        try:
            facts = Coordinator(store, replica_id=9, instance="a reader")
            log = [head.position.server_round for head in facts.commit_log(RUN)]
            return facts.head(RUN), log, facts.control_head(), len(facts.history())
        finally:
            store.close()


@contextmanager
def stage_in(folder: Path, database: Path) -> Iterator[Stage]:
    """Give each replica a disk with an empty database of Flower, and let two of them answer."""
    peers: dict[str, str] = {}
    with ExitStack() as servers:
        for replica_id in range(3):
            own = folder / f"replica-{replica_id}"
            own.mkdir()
            for file in database.parent.glob("state.db*"):
                shutil.copy(file, own / file.name)
            if replica_id:
                server = servers.enter_context(ApiServer(Endpoint("127.0.0.1", 0), tls=TlsSettings()))
                routes, upgrades = blob_api(BlobStore(own / "store"), secret=SECRET, max_bytes=10**8)
                server.start(Starlette(routes=routes), upgrades=upgrades)
                peers[str(replica_id)] = f"127.0.0.1:{server.port}"
        yield Stage(folder, peers)
