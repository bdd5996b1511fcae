"""Measure deqjax on the accelerator of this machine, in one run of a few minutes.

    python -m benchmarks.accelerators.run --output DIR

In the order of their worth, each in its share of the time:

- checks: reversible gradients of about sixty maps (dense, attention, convolutions,
  gates, norms, sorting, Fourier transforms, products in 16 bits, a scan inside f), with
  states of 32, 16 and 64 bits, β of 0.5, 0.8 and 0.95 and 8 to 32 steps, each beside
  float64 backpropagation through the same steps on the same device. A solve fails
  unless its drift is 0, its largest repair below half of the capacity, and its error at
  most twice that of backpropagation in its own dtypes, or 2e-6 (1e-13 in float64).
- training: the rate of a large matrix product; the training step of the RevDEQ language
  model of the paper (95.9 million parameters, 32 × 448 tokens) in bfloat16 and float32,
  against its parts, and as a share of that rate; beside it backpropagation, and 16
  steps instead of 4.
- gradients: every adjoint on a perceptron and on a transformer block, against the sum
  of its parts: evaluations of f and pull-backs that are timed alone. Then the temporary
  memory of 4, 16 and 64 steps.
- solvers: every solver against the bare loop of as many evaluations of f.

Times are medians with quartiles, warm, in turns with what they are compared with.
Without an accelerator everything is small and runs on the CPU.
"""

import argparse
import datetime as dt
import functools as ft
import os
import pathlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from .._solver_entrants import versions
from ..reversal import commit
from . import _checks, _gradients, _solvers, _training
from ._report import report
from ._session import Record, Session, shares

# What a section may take of the time that all of them have.
SECTIONS = {"checks": 40.0, "training": 25.0, "gradients": 20.0, "solvers": 15.0}
MEASURES = {
    "checks": _checks.run,
    "training": _training.run,
    "gradients": _gradients.run,
    "solvers": _solvers.run,
}
GRACE = 40.0  # Seconds of the whole that are kept for what cannot be interrupted.

_EXAMPLES = """\
examples:
  python -m benchmarks.accelerators.run --output runs/h100
  python -m benchmarks.accelerators.run --output runs/h100 --minutes 3 --only checks
  python -m benchmarks.accelerators.run --output runs/x --only checks --cases bfloat16
  python -m benchmarks.accelerators.run --output runs/cpu --quick

exit status: 0 if every check that was made has passed, 1 if one failed or none was made
where they were asked for, 2 for a wrong option, 3 if the time was over before the end.
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=88)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 24 * 60:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, but it must be a number of minutes from 0.5 to 1440"
        )
    return value


def command_line() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        "python -m benchmarks.accelerators.run",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add = cli.add_argument
    add(
        "--output",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="where results.json and report.md are written; results.json grows with "
        "every measurement, so that a run that is stopped has lost nothing",
    )
    add(
        "--minutes",
        type=_minutes,
        default=8.0,
        metavar="M",
        help="the run ends before so many minutes are over, compiling included; what "
        "does not fit is skipped, and the results say so. Default: 8",
    )
    add(
        "--quick",
        action="store_true",
        help="a few checks, small sizes, one cell: some 3 minutes on two CPU cores",
    )
    add(
        "--only",
        nargs="+",
        choices=tuple(SECTIONS),
        metavar="NAME",
        default=tuple(SECTIONS),
        help=f"sections to measure, of {', '.join(SECTIONS)}. Default: all",
    )
    add(
        "--cases",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="measure only the cases whose names contain one of these texts, such as "
        "bfloat16 or convolution. Default: all",
    )
    add(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="programs that are compiled at the same time. Default: 8, or the number "
        "of CPU cores if there are fewer",
    )
    return cli


def head(options: argparse.Namespace) -> dict[str, Any]:
    """What is known before anything is measured."""
    device = jax.devices()[0]
    limit = None
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # Not every platform tells.
        limit = None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "memory, bytes": limit,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions(),
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "xla flags": os.environ.get("XLA_FLAGS", ""),
        # Without the folder, which is the machine's own.
        "options": {k: str(v) for k, v in vars(options).items() if k != "output"},
    }


def finish(record: Record, path: pathlib.Path) -> str:
    """Write the report, and return it."""
    record.write()
    text = report(record.results, record.failures)
    path.write_text(text, encoding="utf-8")
    return text


def _stop(record: Record, path: pathlib.Path) -> None:
    """End the process: what runs too long cannot be interrupted otherwise."""
    code = 3
    try:
        record.results["stopped"] = "the time was over before the end"
        code = 1 if record.failures else 3
        print(finish(record, path), flush=True)
        print("The time was over before the end.", flush=True)
    finally:
        os._exit(code)


def status(record: Record, only: Sequence[str]) -> int:
    """0 if every check that was made has passed, else 1."""
    rows = record.results["sections"].get("checks", {}).get("rows", [])
    made = any("failure" in row for row in rows)
    return int(bool(record.failures) or ("checks" in only and not made))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    began = time.monotonic()
    options = command_line().parse_args(argv)
    workers = options.workers or min(8, os.cpu_count() or 1)
    record = Record(options.output / "results.json", head(options))
    path = options.output / "report.md"
    total = 60 * options.minutes
    grace = min(GRACE, 0.1 * total)
    session = Session(
        record,
        jax.devices()[0].platform.replace("cuda", "gpu").replace("rocm", "gpu"),
        options.quick,
        began + total - grace,
        workers,
        tuple(options.cases),
    )
    timer = threading.Timer(total - grace / 2, ft.partial(_stop, record, path))
    timer.daemon = True
    timer.start()
    kind = record.results["device"]
    print(f"deqjax on {kind}: {options.minutes:g} minutes, {workers} compilers")
    for name, share in shares(options.only, SECTIONS).items():
        session.run(name, share, MEASURES[name])
    timer.cancel()
    record.results["seconds"] = round(time.monotonic() - began, 1)
    print(finish(record, path))
    print(f"Results: {record.path}\nReport: {path}")
    return status(record, options.only)


if __name__ == "__main__":
    sys.exit(main())
