"""What is counted, how it is called, and that documents, alerts and the Grafana dashboard use the same names."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flwr_ha.model import RunState, RunStatus
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.metrics import Gauges, PhaseClock, PrometheusMeter, make_meter

ROOT = Path(__file__).parents[2]
RUN = {"run_id": "7", "state": "waiting", "server_round": 3, "num_rounds": 8, "min_nodes": 5}
PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here; `make setup` gets it as root")
FORM = {"alert", "expr", "for", "labels", "annotations"}
GAUGES = Gauges(
    cluster="c", is_leader=True, lease_age_s=0.5, copies_missing=1, nodes_online=4, runs=(RUN,), replicas={"running": 3}
)


def _text(meter: PrometheusMeter, gauges: Gauges = GAUGES) -> str:
    return (meter.text(gauges) or b"").decode()


def _value(meter: PrometheusMeter, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", _text(meter), re.MULTILINE)
    assert found, f"{series} is not in {_text(meter)}"
    return float(found[1])


def _names(text: str) -> set[str]:
    """Return the names of the families, as ``# TYPE`` has them."""
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))


def _used(text: str) -> set[str]:
    return set(re.findall(r"\bflwr_ha_[a-z_]*[a-z]\b", text))


def _family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_events_are_counted_where_they_are_logged(tmp_path: Path) -> None:
    """The event log feeds the counters: no other code has to think of them."""
    meter = PrometheusMeter()
    events = EventLog(tmp_path / "events.jsonl", replica_id=0, on_event=meter.on_event)

    events.add("leading", "serves")
    events.add("reply-rejected", "NaN", run_id="7")
    events.add("reply-replayed", "from the cache", run_id="7")
    events.add("serverapp-died", "killed", run_id="7")
    events.add("not-committed", "too few copies")
    events.add("commit", "the initial model", run_id="7", server_round=0, seconds=0.02)
    events.add("commit", "round 1", run_id="7", server_round=1, seconds=0.03)
    events.add("commit", "round 2", run_id="7", server_round=2, seconds=0.2)
    events.add("something-else", "counts nowhere")

    for name in ("takeovers", "replies_rejected", "replies_replayed", "serverapp_restarts", "commits_refused"):
        assert _value(meter, f"flwr_ha_{name}_total") == 1
    assert _value(meter, "flwr_ha_rounds_committed_total") == 2
    assert _value(meter, 'flwr_ha_round_phase_seconds_count{phase="commit"}') == 2
    assert _value(meter, 'flwr_ha_commit_seconds_bucket{le="0.05"}') == 2
    assert _value(meter, "flwr_ha_commit_seconds_sum") == pytest.approx(0.25)


def test_pushes_and_coordinator_errors_are_counted() -> None:
    """Bytes and seconds by peer."""
    meter = PrometheusMeter()

    meter.on_push(1, 1000, 0.02)
    meter.on_push(1, 500, 0.3)
    meter.on_coordinator_error()

    assert _value(meter, 'flwr_ha_replication_bytes_total{peer="1"}') == 1500
    assert _value(meter, 'flwr_ha_replication_seconds_count{peer="1"}') == 2
    assert _value(meter, "flwr_ha_coordinator_errors_total") == 1


def test_a_rounds_time_is_split_by_phase() -> None:
    """Training 2 s, evaluating 3 s of which the last 0.5 s are the commit; the next round starts at 0."""
    clock = PhaseClock()
    clock.enter("7", "waiting", 0.0)
    clock.enter("7", "training", 1.0)
    clock.enter("7", "training", 2.5)
    clock.enter("7", "evaluating", 3.0)

    first = clock.commit("7", 0.5, 6.0)
    clock.enter("7", "training", 6.25)
    second = clock.commit("7", 0.25, 8.0)

    assert first == {"waiting": 1.0, "training": 2.0, "evaluating": 2.5, "commit": 0.5}
    assert second == {"evaluating": 0.25, "training": 1.5, "commit": 0.25}


def test_a_commit_without_a_report_is_no_error() -> None:
    """A ServerApp that reports nothing, or whose reports got lost, still commits."""
    assert PhaseClock().commit("7", 0.5, 6.0) == {"commit": 0.5}


def test_an_ended_run_leaves_no_series() -> None:
    """Only what the gauges hold now has a series by run."""
    meter = PrometheusMeter()
    meter.on_status(RunStatus(run_id="7", app="a/b", state=RunState.TRAINING))
    meter.on_status(RunStatus(run_id="7", app="a/b", state=RunState.FINISHED))

    assert _value(meter, 'flwr_ha_run_nodes_needed{run_id="7"}') == 5
    assert 'run_id="7"' not in _text(meter, Gauges(cluster="c"))


def test_only_the_leader_shows_what_only_it_knows() -> None:
    """Sums and maxima over all replicas stay right."""
    text = _text(PrometheusMeter(), Gauges(cluster="c"))

    assert re.search(r"^flwr_ha_leader 0.0$", text, re.MULTILINE)
    for name in ("lease_age_seconds", "copies_missing", "nodes_online"):
        assert f"flwr_ha_{name} " not in text


def test_every_name_is_documented_and_every_documented_name_exists() -> None:
    """docs/metrics.md is complete and true, for all but the process's own metrics."""
    real = {name for name in _names(_text(PrometheusMeter())) if "_process_" not in name}
    documented = {name for name in _used((ROOT / "docs" / "metrics.md").read_text()) if "_process_" not in name}

    assert documented == real


@pytest.mark.parametrize("file", ["alerts.yaml", "grafana.json"])
def test_deployed_files_use_names_that_exist(file: str) -> None:
    """A typing error in a query would be silence instead of an alarm."""
    text = (ROOT / "deploy" / file).read_text()
    (yaml.safe_load if file.endswith("yaml") else json.loads)(text)
    queries = re.findall(r'expr(?:":|:) *(.*)', text)

    used = set().union(*map(_used, queries))

    assert len(used) > 5
    assert {_family(name) for name in used} <= _names(_text(PrometheusMeter())) | {"flwr_ha"}


def test_each_alert_is_explained() -> None:
    """docs/metrics.md says for each what to do."""
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"][0]["rules"]
    documented = set(re.findall(r"`(FlwrHa\w+)`", (ROOT / "docs" / "metrics.md").read_text()))

    assert {rule["alert"] for rule in rules} == documented


def test_alerts_have_the_form_that_prometheus_wants() -> None:
    """A check of the form alone, for machines without promtool."""
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"][0]["rules"]

    for rule in rules:
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys() <= FORM
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1s"))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")


@needs_promtool
def test_prometheus_accepts_the_alerts_and_they_fire_when_they_should() -> None:
    """The rules' own tests run a failover, an outage, a wait and a missing copy through Prometheus's engine."""
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            [str(PROMTOOL), *command], cwd=ROOT / "deploy", check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_can_read_the_metrics() -> None:
    """Format and naming, as promtool's linter wants them."""
    meter = PrometheusMeter()
    meter.on_push(1, 10, 0.1)
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=_text(meter), check=False, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_replica_runs_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is an extra: nothing is counted, and no text is made."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    meter = make_meter()
    meter.on_event({"kind": "commit"})
    meter.on_push(1, 1, 1.0)

    assert meter.text(GAUGES) is None
