"""The documentation's tables: `python -m benchmarks.reasoning.tables [DIR ...]`."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import training

from ._report import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reasoning-table.md"
_DESCRIPTION = """\
Copy the results of runs to benchmarks/results/reasoning-*.json, and write
docs/reasoning-table.md from all that are there. DIR is the --output of a run, or of
`python -m benchmarks.reasoning.memory`."""


def file_name(results: dict[str, Any]) -> str:
    """Where the results of a run are kept."""
    if "task" not in results:
        return "reasoning-memory.json"
    config = results["config"]
    usual = "last" if results["task"] == "chains" else "all"
    asked = "" if config["ask"] == usual else f"-{config['ask']}"
    return f"reasoning-{results['task']}{asked}.json"


def page(results: dict[str, dict[str, Any]]) -> str:
    """All tables, between the marks that the documentation includes them by."""
    parts = []
    for name in sorted(results):
        found = results[name]
        lines = memory_table(found) if name == "memory" else _task_table(found)
        parts.append(
            f"<!-- --8<-- [start:{name}] -->\n{lines}\n<!-- --8<-- [end:{name}] -->\n"
        )
    return "\n".join(parts)


def _task_table(results: dict[str, Any]) -> str:
    seeds = {t["seed"] for t in results["trainings"]}
    command = f"python -m benchmarks.reasoning {results['task']}"
    config = results["config"]
    note = (
        f"`{command}`: {len(seeds)} seeds, mean (smallest to largest); "
        f"{config['steps']} steps, β = {config['beta']}, k = {config['last']}, batches "
        f"of {config['batch_size']}, width {config['width']}; tested on "
        f"{config['test_size']} examples. {results['machine']}, "
        f"JAX {results['versions']['jax']}."
    )
    return f"{table(results)}\n\n{note}"


def memory_table(results: dict[str, Any]) -> str:
    """Gradients down, depths across, in MiB."""
    head = ["steps", *map(str, results["depths"])]
    lines = [head, ["---"] * len(head)]
    for name, row in results["temporary_mib"].items():
        lines.append([name, *("–" if x is None else f"{x:,.0f}" for x in row)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = (
        f"MiB; one state is {results['state_mib']:.0f} MiB. `python -m "
        f"benchmarks.reasoning.memory`, JAX {results['versions']['jax']}, compiled for "
        "a CPU."
    )
    return f"{text}\n\n{note}"


def load() -> dict[str, dict[str, Any]]:
    """All results that are kept, by the name of their file."""
    paths = sorted(RESULTS.glob("reasoning-*.json"))
    return {
        path.stem.removeprefix("reasoning-"): json.loads(path.read_text())
        for path in paths
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reasoning.tables",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIR")
    for directory in parser.parse_args(argv).directories:
        paths = (directory / "results.json", directory / "memory.json")
        path = next((p for p in paths if p.exists()), None)
        if path is None:
            parser.error(f"DIR: {directory} holds no results of a run that has ended")
        shutil.copy(path, RESULTS / file_name(json.loads(path.read_text())))
    training.write_atomically(PAGE, page(load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
