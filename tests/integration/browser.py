"""A real Chromium without a window, driven through chromedriver's W3C protocol."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any, Self

import httpx

from flwr_ha.local.processes import Program, wait_until
from flwr_ha.local.zookeeper import free_ports

BROWSERS = ("chromium", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
ENTER_KEY, TAB_KEY = "\ue007", "\ue004"
CALL_TIMEOUT_S = 60.0


def chromium() -> str | None:
    """Return the browser's path where it and its driver are installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    return browser if shutil.which("chromedriver") else None


class Browser:
    """One browser with one page; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_ports(1)[0]
        self._driver: Program | None = None
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=CALL_TIMEOUT_S, trust_env=False)
        self._session = ""

    def __enter__(self) -> Self:
        self._driver = Program(
            "chromedriver",
            ["chromedriver", f"--port={self._port}"],
            log_file=self._folder / "chromedriver.log",
            environment={},
        )
        try:
            wait_until(self._is_ready, timeout_s=30.0, what="chromedriver")
            options = {
                "binary": chromium(),
                "args": [*FLAGS, f"--user-data-dir={self._folder / 'profile'}"],
                "perfLoggingPrefs": {"enableNetwork": True},
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
            answer = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            self._session = f"/session/{answer['sessionId']}"
        except BaseException:
            self._driver.kill_tree()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._driver is not None:
            self._driver.kill_tree()
        self._http.close()

    def _is_ready(self) -> bool:
        try:
            return bool(self._http.get("/status").json()["value"]["ready"])
        except httpx.TransportError:
            return False

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._http.post(self._session + path, json=body)
        value = answer.json()["value"]
        assert answer.is_success, value
        return value

    def open(self, url: str) -> None:
        """Load a page."""
        self._post("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script in the page returns."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def text(self, css: str) -> str:
        """Return the text of the first element; empty where there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css))

    def wait_text(self, css: str, words: str, *, timeout_s: float) -> None:
        """Return once the element's text holds the words."""

        def found() -> bool:
            seen = self.text(css)
            return words in seen

        wait_until(found, timeout_s=timeout_s, what=f"{words!r} in {css} of the page", poll_s=0.1)

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": steps}])

    def look(self, *, width: int, height: int, scheme: str, is_phone: bool = False) -> None:
        """Set the size of the page, and whether the user likes it light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self._cdp("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._cdp("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, file: Path) -> None:
        """Save what the page shows, as PNG."""
        file.write_bytes(base64.b64decode(self._http.get(f"{self._session}/screenshot").json()["value"]))

    def requested(self) -> set[str]:
        """Return the addresses that were asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return {
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        }

    def complaints(self) -> list[str]:
        """Return what the browser complained of since the last call, but for replicas that do not answer."""
        return [entry["message"] for entry in self._log("browser") if "net::ERR_" not in entry["message"]]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._post("/se/log", type=kind)
        return entries

    def _cdp(self, command: str, params: dict[str, Any]) -> None:
        self._post("/goog/cdp/execute", cmd=command, params=params)
