"""When a replica says that it leads or could lead, to load balancers and to Prometheus."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from flwr_ha.config import parse_settings
from flwr_ha.replica.api import create_api
from flwr_ha.replica.machine import MachineState
from flwr_ha.replica.metrics import PrometheusMeter
from flwr_ha.replica.pulse import Sight
from flwr_ha.replica.replica import Replica
from flwr_ha.replica.runs import RunBoard

COLD = MachineState(replica_id=0)
WARM = replace(COLD, is_warm=True)
SILENT_S = 60.0


def made_replica(folder: Path, state: MachineState, *, read_ago_s: float) -> Replica:
    """Return a standby in `state`, which has read the coordinator so many seconds ago."""
    entry = {"id": 0, "address": "127.0.0.1:8000", "api": "127.0.0.1:8010"}
    table = {"cluster": "c", "coordinator": "embedded:x", "replicas": [entry]}
    settings = parse_settings(table, folder=folder)
    settings.replica_dir(0).mkdir(parents=True)
    tools = SimpleNamespace(holdings=SimpleNamespace(lag_rounds=0), meter=PrometheusMeter())
    now_s = time.monotonic()
    replica = object.__new__(Replica)  # its threads have no say in this
    replica._settings, replica._tools, replica._board = settings, tools, RunBoard()
    replica.pulse = SimpleNamespace(sight=Sight(read_s=now_s - read_ago_s), renewed_s=now_s)
    replica._agent = SimpleNamespace(state=state, is_leader=False, settings=settings.replica(0), tools=tools)
    return replica


@pytest.mark.parametrize(
    ("state", "read_ago_s", "reason"),
    [
        (WARM, 0.0, ""),
        (COLD, 0.0, "the SuperLink is not ready"),
        (replace(WARM, unfit="the disk is full"), 0.0, "the disk is full"),
        (WARM, SILENT_S, "the coordinator does not answer"),
    ],
    ids=["warm", "cold", "full disk", "silent coordinator"],
)
def test_metric_says_what_readiness_says(state: MachineState, read_ago_s: float, reason: str, tmp_path: Path) -> None:
    """An alert on `flwr_ha_ready` and a load balancer's check do not contradict each other."""
    replica = made_replica(tmp_path, state, read_ago_s=read_ago_s)

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_api(replica, secret="s"))
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return [await client.get(path) for path in ("/readiness", "/metrics")]

    readiness, metrics = asyncio.run(answers())

    assert readiness.json()["reason"] == reason
    assert f"\nflwr_ha_ready {0.0 if reason else 1.0}\n" in metrics.text
