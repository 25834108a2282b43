"""The command line against real clusters."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import free_ports, node_mode, require_zookeeper

NUMPY_APP = Path(__file__).parents[1] / "apps" / "numpy_app"
ROUNDS = 3

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def ha(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``flwr-ha``."""
    return subprocess.run(
        [sys.executable, "-m", "flwr_ha", *arguments, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ha_json(config: Path, *arguments: str) -> object:
    """Run ``flwr-ha`` and return its JSON answer."""
    done = ha(config, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_operators_day_on_an_embedded_cluster(tmp_path):
    """Look, pause, resume, switch over, export; then everything is down, and the model is still to be had."""
    with LocalCluster(tmp_path / "cluster", Plan(is_embedded=True, supernodes=2)) as cluster:
        cluster.start()
        config = cluster.config
        run_id = cluster.submit(NUMPY_APP, num_server_rounds=ROUNDS, min_nodes=2, step_s=0.2)
        shown = ha_json(config, "list")
        assert len(shown["replicas"]) == 3
        assert "failover is paused" not in ha(config, "list").stdout

        assert ha(config, "pause").returncode == 0
        wait_until(
            lambda: all(cluster.get("/cluster", replica_id=n)["paused"] for n in cluster.replicas),
            timeout_s=20.0,
            what="pause on every replica",
        )
        assert "failover is paused" in ha(config, "list").stdout
        assert ha_json(config, "resume") == {"paused": False}

        cluster.wait_run(run_id, lambda run: run["server_round"] >= 1, timeout_s=200, what="round 1")
        old = cluster.wait_leader(timeout_s=30)
        candidate = next(n for n in cluster.replicas if n != old)
        refused = ha(config, "switchover", "--candidate", str(old))
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"replica {old} leads already" in refused.stderr
        after = ha_json(config, "switchover", "--candidate", str(candidate))
        assert after["leader"] == candidate
        assert ha_json(config, "history")[-1]["leader"] == candidate

        run = cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=240, what="the end")
        entries = ha_json(config, "checkpoint", "list", run_id)
        assert [entry["server_round"] for entry in entries] == list(range(1, ROUNDS + 1))
        up = tmp_path / "up.safetensors"
        entry = ha_json(config, "checkpoint", "export", run_id, "--out", str(up))
        assert entry["model_digest"] == run["checkpoint"]["model_digest"]
        assert ha(config, "checkpoint", "export", "1", "--out", str(up)).returncode == 1
        wait_until(
            lambda: all(
                (cluster.folder / "data" / f"replica-{n}" / "store" / "committed" / f"{run_id}.json").exists()
                for n in (0, 1)
            ),
            timeout_s=20.0,
            what="the commit logs on disk",
        )

    down = tmp_path / "down.safetensors"
    assert ha(config, "list").returncode == 1
    assert ha(config, "checkpoint", "export", run_id, "--out", str(down)).returncode == 0
    assert down.read_bytes() == up.read_bytes()
    assert set(load_file(down)) == {"weight", "bias"}


def test_bash_completes_commands_and_options(tmp_path):
    """What `--install-completion` writes, in a bash that has read it: each word is completed as Tab would do it."""
    command = Path(sys.executable).with_name("flwr-ha")
    environment = {"HOME": str(tmp_path), "PATH": f"{command.parent}:/usr/bin:/bin"}
    subprocess.run([command, "--install-completion", "bash"], env=environment, check=True, capture_output=True)
    typed = {"sw": "switchover", "checkpoint ex": "export", "list --wa": "--watch", "switchover --cand": "--candidate"}
    lines = ["source ~/.bashrc"]
    for words in typed:
        lines += [f"COMP_WORDS=(flwr-ha {words})", "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))"]
        lines += ["_flwr_ha_completion flwr-ha", 'echo "${COMPREPLY[*]}"']
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *lines, "complete -p flwr-ha"])],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [*typed.values(), "complete -o default -F _flwr_ha_completion flwr-ha"]


@pytest.mark.zookeeper
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_zookeeper_in_the_foreground_ends_with_ctrl_c(tmp_path, number):
    """Three nodes serve the ports of the settings until a signal, and none is left."""
    require_zookeeper()
    ports = free_ports(5)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
    config = tmp_path / "c.toml"
    config.write_text(
        f'cluster = "c"\ncoordinator = "zookeeper://{hosts}"\n[[replicas]]\nid = 0\n'
        f'address = "127.0.0.1:{ports[3]}"\napi = "127.0.0.1:{ports[4]}"\n'
    )
    command = [sys.executable, "-m", "flwr_ha", "zookeeper", "--config", str(config), "--folder", str(tmp_path / "zk")]
    program = Program("zookeeper", command, log_file=tmp_path / "log", environment={})
    try:
        wait_until(lambda: "Ctrl-C ends it" in program.log_text(), timeout_s=90.0, what="the ensemble")
        assert sorted(node_mode(port) for port in ports[:3]) == ["follower", "follower", "leader"]
        nodes = program.tree()[1:]
        assert len(nodes) == 3
        program.send(number)
        assert program.wait(30.0) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in nodes)
    finally:
        if program.is_alive:
            program.kill_tree()
