"""The package in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


def test_plain_installation_works_without_torch(tmp_path: Path) -> None:
    """`pip install .` in an empty environment: the command is there, and torch is not."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, timeout=570)

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env={}).stdout

    assert "switchover" in run(python.with_name("flwr-ha"), "--help")
    assert "zookeeper" in run(python, "-m", "flwr_ha", "--help")
    assert run(python, "-c", "from flwr_ha import HighlyAvailable; print(HighlyAvailable.__name__)").strip()
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('flwr_ha').origin)")
    assert found.startswith("None ")
    assert str(tmp_path) in found
    assert sys.prefix not in found
