"""What the documents say can be typed and followed."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from flwr_ha import cli

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
