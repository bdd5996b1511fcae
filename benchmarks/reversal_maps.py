"""Is every gradient of a reversible solve right? Random maps, scales and noise.

    python benchmarks/reversal_maps.py

Three parts, each compared with backpropagation in float64 through the same steps:

- maps: solves of random maps. The maps combine elementwise chains, gates, products of
  matrices, convolutions, sorting, norms, softmax, attention, cumulative sums, indexing,
  Fourier transforms, products in 16 bits, control flow and spectral norms, of 1 to 300
  entries, some with tiny entries at the fixed point. The states are of every dtype, in
  1 to 4 leaves; β is a number, traced, per channel or per entry; 1 to 100 steps, static
  or tested; called plainly, jitted, vmapped, in a scan, under `jax.checkpoint` and on a
  mesh of 4 simulated devices. A solve fails unless its drift is 0, its largest repair
  below half of the capacity and its gradient's error at most twice the error of
  backpropagation in the same dtypes, or 2e-6 (1e-13 in float64).
- mixed: states whose entries, leaves or rows differ in scale by 1e2 to 1e8; the errors
  are those of each scale by itself, at most 2e-6 in float32.
- noise: evaluations disturbed by up to k units in the last place, of each entry or of
  the root mean square of its row.

Writes `benchmarks/results/reversal_maps-DEVICE.json`, and from it the tables of the
documentation. What fails is printed, with the options that run it alone, and makes the
exit status 1. About 20 minutes on two CPU cores; `--count` and `--only`
make it shorter.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import (
    _reversal_cases as cases,
    _reversal_maps_report as report,
    _reversal_measures as measures,
    _reversal_scales as scales,
    _solver_entrants as entrants,
)
from benchmarks.reversal import commit

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("maps", "mixed", "noise")
FORGET = 30  # Programs after which compiled ones are dropped: each holds memory maps.


def command_line() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--count", type=int, default=400, help="solves of random maps (default 400)")
    add("--draws", type=int, default=2, help="solves per compiled map (default 2)")
    add("--seed", type=int, default=0, help="of maps and numbers (default 0)")
    add("--only", nargs="+", choices=cases.MAPS, metavar="KIND", default=cases.MAPS,
        help=f"kinds of maps: {', '.join(cases.MAPS)}")  # fmt: skip
    add("--pick", type=int, nargs="+", default=None, help="of each kind, these maps")
    add("--mixed", action="store_true", help="the part on mixed scales alone")
    add("--noise", action="store_true", help="the part on disturbed evaluations alone")
    add("--maps", action="store_true", help="the part on random maps alone")
    add("--out", type=pathlib.Path, default=None, help="where to write the results")
    add("--redraw", action="store_true", help="only write the tables once more")
    return cli


def chosen(options: argparse.Namespace) -> list[cases.Case]:
    """The maps asked for, the kinds taking turns."""
    kinds = options.only
    if options.pick is not None:
        pairs = [(kind, i) for kind in kinds for i in options.pick]
    else:
        programs = range(-(-options.count // options.draws))
        pairs = [(kinds[i % len(kinds)], i // len(kinds)) for i in programs]
    return [cases.case(options.seed, kind, i) for kind, i in pairs]


def name(part: str, row: dict[str, Any]) -> str:
    """What a row is of, and for a map how to run it alone."""
    if part == "maps":
        alone = f"--only {row['kind']} --pick {row['pick']}, draw {row['draw']}"
        return f"{alone}: {row['map']}"
    keys = ("where", "map", "dtype", "β", "beta", "s", "relative", "ulps")
    return f"{part}: " + ", ".join(f"{k} {row[k]}" for k in keys if k in row)


def measure(part: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one program after the other."""
    if part == "maps":
        for case in chosen(options):
            yield measures.measure(case, options.draws)
    else:
        for case in scales.mixed() if part == "mixed" else scales.noisy():
            yield list(case.rows(options.seed))


def follow(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, with progress and failures shown on the way."""
    total = len({"maps": lambda: chosen(options), "mixed": scales.mixed,
                 "noise": scales.noisy}[part]())  # fmt: skip
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24),
               MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    rows: list[dict[str, Any]] = []
    failed = 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(part, total=total, status="")
        for i, new in enumerate(measure(part, options)):
            rows += map(measures.plain, new)
            for row in new:
                if row["failure"] is not None:
                    failed += 1
                    text = f"{name(part, row)}\n    {row['failure']}"
                    console.print(text, markup=False, soft_wrap=True)
            bar.update(task, completed=i + 1, status=f"{failed} of {len(rows)} failed")
            if i % FORGET == FORGET - 1:
                jax.clear_caches()
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or read, write, and give the results."""
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    default = ROOT / "benchmarks" / "results" / f"reversal_maps-{device}.json"
    path = options.out or default
    results = json.loads(path.read_text()) if path.exists() else {}
    if not options.redraw:
        some = [part for part in PARTS if getattr(options, part)] or list(PARTS)
        results |= {"device": device, "versions": entrants.versions()}
        results |= {"commit": commit(), "seed": options.seed}
        with jax.enable_x64(True):  # For the reference.
            for part in some:
                results[part] = follow(part, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if path.resolve() == default:
        text = report.table(results)
        (ROOT / "docs" / "reversal-maps-table.md").write_text(text)
    print(path)
    return results


def main() -> int:
    """Measure, write the results and the tables, and tell what failed."""
    options = command_line().parse_args()
    flag = f"--xla_force_host_platform_device_count={cases.DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    results = run(options)
    print(report.table(results))
    failures = 0
    for part in PARTS:
        rows = results.get(part, [])
        bad = sum(row["failure"] is not None for row in rows)
        failures += bad
        print(f"{part}: {bad} of {len(rows)} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
