"""The ``flwr-ha checkpoint`` commands."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flwr_ha import tables
from flwr_ha.config import load_settings
from flwr_ha.console import ConfigOption, JsonOption, show
from flwr_ha.errors import ConfigError

app = typer.Typer(
    help="List and export the checkpoints of a run, with the cluster up or down.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Flower's run id, as `flwr-ha list` shows it.")]


def _checked(run: str) -> str:
    if not run.isascii() or not run.isdigit():
        raise ConfigError(f"{run!r} is not a run id: `flwr-ha list` shows them")
    return run


@app.command("list")
def list_checkpoints(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show the committed rounds of a run, and which of them are kept.

    Example: flwr-ha checkpoint list 1951071765553103618
    """
    from flwr_ha.exporting import committed_rounds

    settings, run_id = load_settings(config), _checked(run)
    show(
        lambda: committed_rounds(settings, run_id),
        lambda entries: tables.checkpoint_table(run_id, entries),
        as_json=as_json,
    )


@app.command("export")
def export_checkpoint(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Safetensors file to write.")] = None,
    state_dict: Annotated[Path | None, typer.Option(help="File for torch.load to write; needs PyTorch.")] = None,
    server_round: Annotated[int | None, typer.Option("--round", help="Round; the newest if not given.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model of a committed round into one file, with the cluster up or down.

    Example: flwr-ha checkpoint export 1951071765553103618 --out model.safetensors

    Example: flwr-ha checkpoint export 1951071765553103618 --round 7 --state-dict model.pt
    """
    from flwr_ha.exporting import export_round, write_state_dict

    target = out or state_dict
    if target is None:
        raise ConfigError("--out FILE.safetensors or --state-dict FILE.pt is needed: where shall the model go?")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{str(target)!r} cannot be written: there is no folder {str(folder)!r}")
    settings, run_id = load_settings(config), _checked(run)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".flwr-ha-export-") as scratch:
        file = out or Path(scratch) / "model.safetensors"
        entry = export_round(settings, run_id, server_round, file)
        if state_dict is not None:
            write_state_dict(file, state_dict)
    written = " and ".join(str(path) for path in (out, state_dict) if path is not None)
    print(json.dumps(entry) if as_json else f"round {entry['server_round']} of run {run_id} is in {written}")
