"""The recorded results as tables that the documentation includes.

python -m benchmarks.accelerators.table benchmarks/results/accelerators-h200.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ._report import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "accelerators-table.md"


def table(results: dict) -> str:
    """A part for each section, to be included by its name."""
    lines = []
    for name, section in results["sections"].items():
        lines += [f"<!-- --8<-- [start:{name}] -->", ""]
        lines += TABLES[name](section["rows"])
        lines += ["", f"<!-- --8<-- [end:{name}] -->"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args(argv)
    options.output.write_text(table(json.loads(options.results.read_text())))


if __name__ == "__main__":
    main()
