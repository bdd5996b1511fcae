"""Keep the results of finished runs: `python -m benchmarks.language.record RUN ...`."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import training

from ._config import TITLES, output_paths

_ROOT = Path(__file__).resolve().parents[2]
_KEPT = (
    "bits_per_byte",
    "perplexity",
    "evaluations",
    "parameters",
    "steps",
    "seconds",
    "cpu_seconds",
    "compile_seconds",
    "device",
    "versions",
    "config",
)


def collect(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Configuration, results and validation curve of each run."""
    return [_read(run) for run in runs]


def _read(run: Path) -> dict[str, Any]:
    paths = output_paths(run)
    found = json.loads(paths["results"].read_text(encoding="utf-8"))
    rows = training.read_metrics(paths["metrics"])
    curve = [[r["step"], r["bits_per_byte"]] for r in rows if r["kind"] == "valid"]
    kept = {name: found[name] for name in _KEPT}
    return {**kept, "skipped": rows[-2]["skipped"], "curve": curve}


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each model, with the bits per byte of all its seeds."""
    lines = [
        "| model | parameters | evaluations per token | bits per byte, by seed | mean "
        "| CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["config"]["model"] for row in rows):
        own = [row for row in rows if row["config"]["model"] == model]
        own.sort(key=lambda row: row["config"]["seed"])
        bits = [row["bits_per_byte"] for row in own]
        effort = statistics.mean(row["cpu_seconds"] for row in own)
        lines.append(
            f"| {TITLES[model]} | {own[0]['parameters']:,} "
            f"| {own[0]['evaluations']:.3g} | {', '.join(f'{b:.3f}' for b in bits)} "
            f"| {statistics.mean(bits):.3f} | {effort:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.language.record")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    given = parser.parse_args(argv)
    try:
        rows = collect(given.runs)
    except (OSError, KeyError, ValueError) as error:
        print(f"error: not the directory of a finished run: {error}", file=sys.stderr)
        return 2
    names = {f"language-{row['config']['preset']}-{row['device']}.json" for row in rows}
    if len(names) > 1:
        print("error: the runs differ in preset or device", file=sys.stderr)
        return 2
    path = _ROOT / "benchmarks" / "results" / names.pop()
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    training.write_atomically(path, text + "\n")
    table = make_table(rows)
    training.write_atomically(_ROOT / "docs" / "language-table.md", table)
    print(table, end="")
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
