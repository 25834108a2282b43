"""What the documents say can be typed and followed."""

import dataclasses
import inspect
import operator
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from flwr_ha import HighlyAvailable, cli, config, settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        re.sub(r"\s+#.*", "", line).strip()
        for document in DOCUMENTS
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if line.startswith(("flwr-ha ", "python -m flwr_ha "))
    }
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    """No link of a document to another file is dead."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """Each command line of a document has a command and options that exist."""
    words = shlex.split(line.removeprefix("python -m flwr_ha").removeprefix("flwr-ha"))
    values = {"RUN": "12", "N": "0"}
    command, name = typer.main.get_command(cli.app), "flwr-ha"
    rest = [values.get(word, word) for word in words]
    while rest and hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, line
        command = command.commands[name]
    command.make_context(name, rest)


def test_documents_hold_commands():
    """The search above finds something."""
    assert "flwr-ha switchover" in COMMANDS


def documented(section):
    """Return the names in the table of a section of docs/settings.md, each with its default as it is written."""
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", body, re.MULTILINE)]
    return {name: row[2].strip("`") for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def settings_of(kind, prefix=""):
    """Return the settings that a dataclass holds, as a file names them."""
    return {prefix + field.name.removesuffix("_s").replace("_", "-") for field in dataclasses.fields(kind)}


def test_every_setting_is_documented():
    """docs/settings.md has all settings of a cluster, and no other ones."""
    parts = {
        "tls.": settings.TlsSettings,
        "zookeeper.": settings.ZooKeeperSettings,
        "replicas.": settings.ReplicaSettings,
    }
    known = settings_of(settings.Settings) - {"tls", "zookeeper"}
    known |= {name for prefix, kind in parts.items() for name in settings_of(kind, prefix)}
    assert set(documented("Of a cluster")) == known


def test_documented_defaults_of_settings_hold():
    """A table with all documented defaults says the same as one with nothing but what is needed."""
    replica = {"id": 0, "address": "127.0.0.1:8000", "api": "127.0.0.1:8010"}
    needed = {"cluster": "mnist", "coordinator": "embedded:folder", "replicas": [replica]}
    table = documented("Of a cluster")
    names = {name for name, default in table.items() if default == "needed"}
    assert names == {*needed, *(f"replicas.{name}" for name in replica)}
    lines = [f"{name} = {default}" for name, default in table.items() if default not in ("needed", "none")]
    written = config.parse_settings(tomllib.loads("\n".join(lines)) | needed, folder=ROOT)
    assert written == config.parse_settings(needed, folder=ROOT)
    without = [name.replace("-", "_") for name, default in table.items() if default == "none"]
    assert [name for name in without if operator.attrgetter(name)(written) is not None] == []


def test_every_parameter_of_highly_available_is_documented():
    """docs/settings.md has all parameters with their defaults, and no other ones."""
    parameters = inspect.signature(HighlyAvailable).parameters.values()
    defaults = {each.name: "needed" if each.default is each.empty else repr(each.default) for each in parameters}
    assert documented("Of HighlyAvailable") == defaults


def test_every_environment_variable_is_documented():
    """What config.py, the only reader of the environment, asks for stands in docs/settings.md."""
    read = set(re.findall(r'"([A-Z_]+)"', inspect.getsource(config)))
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert {"FLWR_HA_CONFIG", "ZOOKEEPER_HOME"} <= read
    assert {name for name in read if f"`{name}`" not in text} == set()
