"""The dashboard in a real browser over a real cluster, whose leader is killed."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from tests.integration.browser import TAB_KEY, Browser, chromium

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
ROUNDS = 6
TRAIN_TIMEOUT_S = 300.0  # for a round or a few of them on a machine that does much else
pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(chromium() is None, reason="Chromium is not here; `make setup` gets it as root"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "cluster", Plan(is_embedded=True, supernodes=2)) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path) as browser:
        yield browser


def _committed(browser: Browser) -> int:
    return int(browser.run("return document.querySelector('[role=progressbar]')?.getAttribute('aria-valuenow') ?? 0"))


def test_the_page_shows_a_takeover_and_the_resumed_training(cluster: LocalCluster, browser: Browser) -> None:
    """The leader that served the page dies: the page goes on by itself and shows who leads and that rounds go on."""
    old = cluster.leader()
    assert old is not None
    api = {replica.id: str(replica.api) for replica in cluster.settings.replicas}
    browser.look(width=1280, height=1500, scheme="light")
    browser.open(f"http://{api[old]}/")
    browser.wait_text("#leader", f"Replica {old}", timeout_s=30)
    assert not browser.run("return document.getElementById('no-runs').hidden")

    run_id = cluster.submit(APP, num_server_rounds=ROUNDS, min_nodes=2, step_s=1.0)
    browser.wait_text(f"[data-run='{run_id}']", f"of {ROUNDS} rounds committed", timeout_s=TRAIN_TIMEOUT_S)
    wait_until(lambda: _committed(browser) >= 2, timeout_s=TRAIN_TIMEOUT_S, what="round 2 in the page")
    before = _committed(browser)
    cluster.replicas[old].kill_tree()

    browser.wait_text("#source-text", "live from", timeout_s=30)
    wait_until(lambda: api[old] not in browser.text("#source-text"), timeout_s=30, what="another source of the page")
    new = cluster.wait_leader(timeout_s=60, other_than=old)
    browser.wait_text("#leader", f"Replica {new}", timeout_s=30)
    browser.wait_text("#term", "2", timeout_s=30)
    browser.wait_text("#history", f"replica {new}", timeout_s=30)
    browser.wait_text("#running", "2 / 3", timeout_s=30)
    wait_until(
        lambda: _committed(browser) > before, timeout_s=TRAIN_TIMEOUT_S, what="a round after the takeover in the page"
    )
    browser.wait_text("#timeline .label", f"replica {new}", timeout_s=30)
    assert browser.run("return document.querySelectorAll('#timeline .takeover').length") == 1
    assert browser.run("return document.querySelectorAll('.charts canvas').length") == 2
    _save_screenshots(browser)
    cluster.wait_run(
        run_id, lambda run: run["state"] == "finished", timeout_s=TRAIN_TIMEOUT_S, what="the end of the run"
    )
    browser.wait_text(f"[data-run='{run_id}'] .chip", "finished", timeout_s=30)
    assert browser.run("return document.querySelectorAll('#timeline .commit').length") >= ROUNDS

    assert {urlsplit(url).netloc for url in browser.requested() if url.startswith("http")} <= set(api.values())
    assert browser.complaints() == []  # the policy had nothing to forbid, no script failed


def test_the_page_says_why_a_run_waits_and_can_be_used_by_keyboard(cluster: LocalCluster, browser: Browser) -> None:
    """Three nodes are wanted and two are there; on a phone nothing is wider than the screen."""
    leader = cluster.leader()
    api = cluster.settings.replica(leader or 0).api
    run_id = cluster.submit(APP, num_server_rounds=2, min_nodes=3, step_s=0.1)
    browser.look(width=390, height=844, scheme="dark", is_phone=True)
    browser.open(f"http://{api}/")

    browser.wait_text(f"[data-run='{run_id}'] .reason", "2 of 3 nodes online", timeout_s=TRAIN_TIMEOUT_S)
    browser.wait_text("#needed", "3 needed", timeout_s=10)
    browser.wait_text("#events", "run-waits", timeout_s=10)
    wait_until(
        lambda: browser.run("return document.querySelectorAll('#timeline .wait').length") == 1,
        timeout_s=10,
        what="the wait in the time line",
    )
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(14, 19, 26)"
    browser.press(TAB_KEY)
    assert browser.run("return document.activeElement.className") == "skip"
    reached = set()
    for _ in range(20):
        browser.press(TAB_KEY)
        reached.add(browser.run("return document.activeElement.id || document.activeElement.tagName"))
    assert {"filter", "events", "A"} <= reached
    unnamed = "[role=img]:not([aria-label]), [role=progressbar]:not([aria-label]), img:not([alt])"
    assert browser.run("return document.querySelectorAll(arguments[0]).length", unnamed) == 0
    assert browser.complaints() == []

    cluster.start_supernode(2)
    browser.wait_text(f"[data-run='{run_id}'] .chip", "finished", timeout_s=TRAIN_TIMEOUT_S)


def test_the_page_about_the_api_lists_every_call(cluster: LocalCluster, browser: Browser) -> None:
    """It is made from the same document that programs read."""
    api = cluster.settings.replicas[0].api
    browser.open(f"http://{api}/docs")

    browser.wait_text("#operations", "/switchover", timeout_s=30)
    paths = cluster.get("/openapi.json", replica_id=0)["paths"]
    listed = browser.run("return [...document.querySelectorAll('.op code')].map((code) => code.textContent)")
    assert set(paths) <= set(listed)
    assert browser.complaints() == []


def test_every_replica_says_the_same_of_the_cluster(cluster: LocalCluster) -> None:
    """What a standby answers is what the leader answers, once it is quiet."""

    def same() -> bool:
        answers = [cluster.get("/cluster", replica_id=replica_id) for replica_id in range(3)]
        return answers[0] is not None and answers[0]["leader"] is not None and answers[1:] == answers[:1] * 2

    wait_until(same, timeout_s=60, what="the same answer of all replicas", poll_s=0.2)


def _save_screenshots(browser: Browser) -> None:
    """Keep pictures for the documents, where somebody wants new ones."""
    if not (wanted := os.environ.get("FLWR_HA_SCREENSHOTS")):
        return
    folder = Path(wanted)
    for name, width, height, scheme in (("light", 1280, 1240, "light"), ("dark", 1280, 1240, "dark")):
        browser.look(width=width, height=height, scheme=scheme)
        wait_until(lambda: browser.run("return scrollTo(0, 0) ?? true"), timeout_s=1, what="the top")
        _settle(browser)
        browser.screenshot(folder / f"dashboard-{name}.png")
    browser.look(width=390, height=1100, scheme="light", is_phone=True)
    _settle(browser)
    browser.screenshot(folder / "dashboard-phone.png")


def _settle(browser: Browser) -> None:
    """Let the page draw itself anew twice."""
    browser.run("window.seen = document.querySelector('#timeline svg')")
    for _ in range(2):
        wait_until(
            lambda: browser.run("return window.seen !== document.querySelector('#timeline svg')"),
            timeout_s=10,
            what="a new drawing",
        )
        browser.run("window.seen = document.querySelector('#timeline svg')")
