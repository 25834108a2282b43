"""The main of ``server_app.py``: a replica that submits the app beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flwr_ha.cli import start_replica
from flwr_ha.config import load_settings
from flwr_ha.console import ConfigOption, JsonLogOption, run_guarded, set_up_logging

if TYPE_CHECKING:
    from flwr_ha.replica.agent import Life


def run_example(folder: Path) -> int:
    """Run a replica that submits the app of `folder` once it leads.

    Parameters
    ----------
    folder : Path
        Of the Flower app; its ``pyproject.toml`` holds the settings unless ``--config`` names others.

    Returns
    -------
    int
        Exit status.
    """
    example = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @example.command()
    def run(
        replica_id: Annotated[int, typer.Option("--id", help="Which replica of the settings this process is.")],
        config: ConfigOption = None,
        rerun: Annotated[
            bool, typer.Option("--rerun", help="Submit the app though the cluster has a run of it.")
        ] = False,
        run_config: Annotated[
            str, typer.Option("--run-config", help="Values for the run, as `flwr run --run-config` takes them.")
        ] = "",
        as_json: JsonLogOption = False,
    ) -> None:
        """Run one replica; the leader submits this app unless the cluster has a run of it already."""
        from flwr_ha.superlink.submit import submit

        is_submitted = False

        def when_leading(life: Life) -> bool:
            nonlocal is_submitted
            is_again = rerun and not is_submitted
            is_there = submit(
                folder, life.database, life.superlink.private_port, is_rerun=is_again, run_config=run_config
            )
            is_submitted = is_submitted or is_there
            return is_there

        set_up_logging(as_json=as_json)
        named = config or (None if "FLWR_HA_CONFIG" in os.environ else folder / "pyproject.toml")
        start_replica(load_settings(named), replica_id, when_leading=when_leading)

    return run_guarded(example)
