"""Run benchmarks: ``python -m bench [--quick] [--long] [name …]``; prints a table, writes ``bench/results.json``."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.result import Figure, Scale

NAMES = (
    "imports",
    "aggregation",
    "memory",
    "controlplane",
    "operations",
    "commit",
    "rounds",
    "cost",
    "idle",
    "serving",
    "takeover",
    "heartbeats",
)
RESULTS = Path(__file__).parent / "results.json"


def main() -> int:
    """Return 1 where a goal was missed or a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--long", action="store_true", help="with ten minutes of load for the heartbeats")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    scale = Scale(is_quick=arguments.quick, is_long=arguments.long)
    console = Console()
    figures: list[Figure] = []
    failed: list[str] = []
    for name in arguments.names or NAMES:
        start_s = time.monotonic()
        console.print(f"[bold]{name}[/] …", end=" ")
        try:
            with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as folder:
                figures += importlib.import_module(f"bench.{name}").measure(Path(folder), scale)
        except Exception as error:  # the others are to be measured all the same
            failed.append(name)
            console.print(f"[red]failed: {error}[/]")
            continue
        console.print(f"{time.monotonic() - start_s:.0f} s")
    if not arguments.quick:
        _write(figures)
    console.print(_table(figures))
    return int(bool(failed) or any(figure.is_ok is False for figure in figures))


def _write(figures: list[Figure]) -> None:
    """Write the results; those of benchmarks that were not run this time stay."""
    fresh = {figure.name: figure.to_json() for figure in figures}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = {entry["name"]: entry for entry in old}
    RESULTS.write_text(json.dumps(list({**kept, **fresh}.values()), indent=1) + "\n")


def _table(figures: list[Figure]) -> Table:
    table = Table("what", "value", "against", "ratio", "goal", "", title="flwr_ha, measured side by side")
    for figure in figures:
        entry = figure.to_json()
        against = "" if figure.against is None else f"{figure.against:.3g} {figure.unit}"
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        mark = {True: "[green]ok[/]", False: "[red]missed[/]", None: ""}[figure.is_ok]
        table.add_row(figure.name, f"{figure.value:.3g} {figure.unit}", against, ratio, entry["goal"] or "", mark)
    return table


if __name__ == "__main__":
    sys.exit(main())
