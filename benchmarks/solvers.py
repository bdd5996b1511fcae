"""Which solver? What each costs beside f, and how much of f it needs.

    python benchmarks/solvers.py

Runs deqjax's solvers, and those of optimistix, jaxopt and banax where they are
installed, on the same maps in one process:

- overhead: the time of a fixed number of steps over that of the bare compiled loop of
  as many evaluations (and Jacobian products), the two taking turns; compile time; the
  bytes that the compiler reserves. float32.
- work: evaluations and time to a relative residual of 1e-3 and 1e-6 on maps of known
  character. float64.
- choices: evaluations by history, by β, and by what `batch_ndim` says of a batch.

Writes `benchmarks/results/solvers-DEVICE.json`, and from it the tables and the figure
of the documentation.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import (
    _solver_entrants as entrants,
    _solver_maps as maps,
    _solver_measures as measures,
    _solver_report as report,
)
from benchmarks.reversal import commit

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("overhead", "work", "choices")


def command_line() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--seed", type=int, default=0, help="of the maps (default 0)")
    add("--mlp", type=int, nargs=2, default=(32, 128), help="batch and width")
    add(
        "--transformer",
        type=int,
        nargs=3,
        default=(8, 128, 256),
        help="batch, tokens and width, a multiple of 8",
    )
    both = {"type": int, "nargs": 2, "metavar": ("MLP", "TRANSFORMER")}
    add("--steps", default=(16, 8), help="of the overhead's solves (16, 8)", **both)
    add("--runs", default=(100, 6), help="of each, in turns (100, 6)", **both)
    add("--size", type=int, default=64, help="of the maps of known character")
    add("--limit", type=int, default=20000, help="most evaluations")
    add("--only", nargs="+", default=None, help="solvers to measure, by name")
    add("--maps", nargs="+", default=None, help="maps to measure on, by name")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    add("--out", type=pathlib.Path, default=None, help="where to write the results")
    add("--redraw", action="store_true", help="only draw what was measured before")
    return cli


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts asked for."""
    results: dict[str, Any] = {
        "device": _device(),
        "versions": entrants.versions(),
        "commit": commit(),
        "seed": options.seed,
        "limit": options.limit,
    }
    of = lambda every, names: {
        k: v for k, v in every.items() if names is None or k in names
    }
    if "overhead" in options.parts:
        problems = maps.layers(options.seed, options.mlp, options.transformer)
        field = of(entrants.for_overhead(), options.only)
        results["overhead"] = [
            row
            for name, steps, runs in zip(
                problems, options.steps, options.runs, strict=True
            )
            if options.maps is None or name in options.maps
            for row in measures.overhead(name, problems[name], field, steps, runs)
        ]
    with jax.enable_x64(True):
        problems = of(maps.characters(options.seed, options.size), options.maps)
        if "work" in options.parts:
            results["maps"] = [
                measures.description(name, problem)
                for name, problem in problems.items()
            ]
            field = of(entrants.for_work(), options.only)
            results["work"] = [
                row
                for name, problem in problems.items()
                for row in measures.work(name, problem, field, options.limit)
            ]
        if "choices" in options.parts:
            some = of(problems, measures.VARIED)
            results["choices"] = measures.choices(some, options.limit)
            some = of(problems, measures.BATCHED)
            results["batches"] = measures.batches(some, options.limit)
    return results


def _device() -> str:
    return jax.devices()[0].device_kind.replace(" ", "-").lower()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or read, write, and draw what belongs to the documentation."""
    default = ROOT / "benchmarks" / "results" / f"solvers-{_device()}.json"
    path = options.out or default
    if not options.redraw:
        old = {}
        if set(options.parts) != set(PARTS) and path.exists():
            old = json.loads(path.read_text())  # Parts measured before.
        results = {**old, **measure(options)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    if path.resolve() == default:
        (ROOT / "docs" / "solvers-table.md").write_text(report.table(results))
        report.figure(results, ROOT / "docs" / "images" / "solvers.png")
    print(path)
    return results


def main() -> None:
    """Measure, and write the results, the tables and the figure."""
    run(command_line().parse_args())


if __name__ == "__main__":
    main()
