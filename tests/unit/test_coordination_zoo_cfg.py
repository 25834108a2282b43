"""The configuration that operators get must keep what the lease depends on."""

import re
from pathlib import Path

from flwr_ha.coordination.proof import REPORT_DELAY

FOLDER = Path(__file__).parents[2] / "zookeeper"
SETTINGS = dict(
    line.split("=", 1)
    for line in (FOLDER / "zoo.cfg").read_text().splitlines()
    if line.strip() and not line.startswith("#")
)


def test_the_shortest_session_leaves_time_for_a_report():
    """ZooKeeper's leader hears of a session at most half a tick late; `SessionProof` allows a third of it."""
    tick_ms, shortest_ms = int(SETTINGS["tickTime"]), int(SETTINGS["minSessionTimeout"])

    assert shortest_ms >= 2 * tick_ms
    assert tick_ms / 2 < shortest_ms * REPORT_DELAY
    assert int(SETTINGS["maxSessionTimeout"]) >= 60_000


def test_writes_reach_the_disk():
    """A committed round is never lost."""
    assert SETTINGS.get("forceSync", "yes") == "yes"


def test_compose_runs_the_nodes_that_the_configuration_names():
    """Names, numbers and the ports of the README."""
    compose = (FOLDER / "compose.yaml").read_text()
    servers = {int(key.removeprefix("server.")): host for key, host in SETTINGS.items() if key.startswith("server.")}

    assert servers == {number: f"zookeeper-{number}:2888:3888" for number in (1, 2, 3)}
    assert re.findall(r"hostname: (\S+)", compose) == ["zookeeper-1", "zookeeper-2", "zookeeper-3"]
    assert re.findall(r'ZOO_MY_ID: "(\d)"', compose) == ["1", "2", "3"]
    assert re.findall(r"127\.0\.0\.1:(\d+):2181", compose) == ["2181", "2182", "2183"]
