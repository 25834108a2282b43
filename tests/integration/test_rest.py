"""REST of real replicas: metrics of a real training, and answers in time when everything else hangs."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flwr_ha.config import load_secret
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.local.zookeeper import LocalEnsemble

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
READS = ("/cluster", "/history", "/events", "/leader", "/replica", "/health", "/metrics", "/openapi.json", "/")
pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(own_ensemble: LocalEnsemble, tmp_path: Path) -> Iterator[LocalCluster]:
    plan = Plan(supernodes=2, zookeeper=own_ensemble.connect_string, session_timeout_s=4.0)
    with LocalCluster(tmp_path / "cluster", plan) as cluster:
        cluster.start()
        yield cluster


def _metrics(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=5.0, trust_env=False).text
    return {name: float(value) for name, value in re.findall(r"^(flwr_ha_\S+) (\S+)$", text, re.MULTILINE)}


def _timed(url: str, path: str) -> tuple[float, int]:
    start_s = time.monotonic()
    status = httpx.get(url + path, timeout=10.0, trust_env=False).status_code
    return time.monotonic() - start_s, status


def test_metrics_tell_of_the_training_and_no_call_hangs_with_zookeeper(
    cluster: LocalCluster, own_ensemble: LocalEnsemble
) -> None:
    """Two rounds are trained and counted; then ZooKeeper and one replica freeze, and the others still answer."""
    urls = {replica.id: f"http://{replica.api}" for replica in cluster.settings.replicas}
    run_id = cluster.submit(APP, num_server_rounds=2, min_nodes=2, step_s=0.1)
    cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=240, what="the end of the run")
    leader = cluster.wait_leader(timeout_s=60)
    counted = _metrics(urls[leader])

    assert counted["flwr_ha_leader"] == 1
    assert counted["flwr_ha_nodes_online"] == 2
    assert sum(_metrics(url)["flwr_ha_rounds_committed_total"] for url in urls.values()) == 2
    assert sum(_metrics(url).get("flwr_ha_takeovers_total", 0) for url in urls.values()) >= 1
    assert counted["flwr_ha_lease_age_seconds"] < 60
    assert 0 < counted["flwr_ha_disk_free_bytes"] <= counted["flwr_ha_disk_bytes"]
    assert 'flwr_ha_round_phase_seconds_count{phase="training"}' in counted
    peers = [value for name, value in counted.items() if name.startswith("flwr_ha_replication_bytes_total{")]
    assert len(peers) == 2
    assert min(peers) > counted["flwr_ha_rounds_committed_total"] * 1000

    frozen = next(replica_id for replica_id in urls if replica_id != leader)
    cluster.replicas[frozen].freeze()
    for index in range(3):
        own_ensemble.freeze(index)
    rest = [url for replica_id, url in urls.items() if replica_id != frozen]
    unready = "the coordinator does not answer"
    wait_until(
        lambda: all(unready in httpx.get(f"{url}/readiness", timeout=10.0, trust_env=False).text for url in rest),
        timeout_s=60.0,
        what="replicas that notice that ZooKeeper is away",
    )
    reads = {(url, path): _timed(url, path) for url in rest for path in READS}
    secret = load_secret(cluster.settings)
    start_s = time.monotonic()
    answer = httpx.post(
        f"{rest[0]}/pause", headers={"Authorization": f"Bearer {secret}"}, timeout=30.0, trust_env=False
    )
    took_s = time.monotonic() - start_s

    assert {status for _, status in reads.values()} <= {200, 503}
    assert {reads[url, path][1] for url in rest for path in ("/cluster", "/metrics", "/")} == {200}
    assert max(seconds for seconds, _ in reads.values()) < 2.0
    assert answer.status_code == 503
    assert took_s < 4.0  # 1.8 s, with slack for a busy machine
    assert all(_metrics(url)["flwr_ha_leader"] == 0 for url in rest)
    assert all(_metrics(url)["flwr_ha_coordinator_errors_total"] > 0 for url in rest)
    for index in range(3):
        own_ensemble.thaw(index)
