"""Loops on reasoning tasks: `python -m benchmarks.reasoning TASK --output DIR`."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.common import training

from ._config import TASKS, WAYS, UsageError, make_config
from ._groups import GROUPS
from ._report import table
from ._run import Plan, run

_DESCRIPTION = """\
Train one model on a reasoning task in four ways, with as many updates each: with the
gradient of one evaluation at the end (one-step), of the last k steps (last-k), of all
steps by exact reversal (exact), and a stack of layers with weights of their own in
place of the loop (stack). All data are generated on the spot.

tasks:
  chains   the last of 800 nodes is asked what only the first was told; under a minute
  prefix   parities of all prefixes of 32 bits, tested on 512; ten minutes
  groups   running products in S3 (A5, S5), length 16, tested on 64; ten minutes
  sudoku   4 x 4, one solution, no clue to spare, unseen grids; five minutes
(times on two CPU cores, with one seed)"""

_EPILOG = """\
DIR receives figure.png, results.json and, for each way and seed, checkpoints and a log.
"solved" counts examples of which every asked position is right; "residual" is
||f(z) - z|| / ||f(z)|| at the last step, median over the test set; "settled" the share
of examples whose iteration settles, as deqjax.diagnostics.depth_report judges it.

examples:
  python -m benchmarks.reasoning chains --output runs/chains
  python -m benchmarks.reasoning prefix --output runs/prefix --seeds 0 1 2
  python -m benchmarks.reasoning prefix --output runs/hard --ask last --updates 2000
  python -m benchmarks.reasoning sudoku --output runs/sudoku --ways exact one-step
  python -m benchmarks.reasoning sudoku --output runs/sudoku --resume
  python -m benchmarks.reasoning groups --output runs/a5 --preset published
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it, which would hide it."""
        message = message.replace("argument --", "--").replace("argument TASK", "TASK")
        self.exit(2, f"error: {message} (see --help)\n")


def _number(kind: type, what: str, accept: Callable[[Any], bool]) -> Callable[..., Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, but it must be {what}")
        return value

    return parse


_count = _number(int, "a whole number of at least 1", lambda n: n >= 1)
_seed = _number(int, "a whole number of at least 0", lambda n: 0 <= n < 2**31 - 1)
_positive = _number(float, "a number above 0", lambda x: x > 0)
_not_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
_share = _number(float, "a number above 0 and below 1", lambda x: 0 < x < 1)
_steps = _number(int, "a whole number of at least 4", lambda n: n >= 4)
_length = _number(int, "a whole number of at least 2", lambda n: n >= 2)


def make_parser() -> argparse.ArgumentParser:
    """The parser; an option that is not given leaves no attribute behind."""
    parser = _Parser(
        "python -m benchmarks.reasoning",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("task", choices=TASKS, metavar="TASK", help="chains, prefix, groups or sudoku")
    add("--output", type=Path, required=True, metavar="DIR", help="where all goes")
    add(
        "--resume",
        action="store_true",
        default=False,
        help="continue the run in DIR; what is done is not done again",
    )
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        metavar="WAY",
        help="some of one-step, last-k, exact, stack. Default: all",
    )
    add(
        "--seeds",
        nargs="+",
        type=_seed,
        default=(0,),
        metavar="N",
        help="of parameters and data; each is a training. Default: 0",
    )
    add(
        "--preset",
        choices=("small", "published"),
        default="small",
        help="small: two CPU cores; published: sizes of the literature, for a GPU "
        "(prefix, groups). Every option below changes one choice of it",
    )
    add(
        "--equal",
        choices=("updates", "evaluations"),
        help="what all ways have as many of as the exact one. Default: updates",
    )
    model = parser.add_argument_group("model").add_argument
    model("--width", type=_count, metavar="N", help="numbers per position")
    model("--steps", type=_steps, metavar="N", help="of training, two evaluations each")
    model("--beta", type=_share, metavar="β", help="weight on the cell in each step")
    model("--last", type=_count, metavar="K", help="steps that last-k differentiates")
    model(
        "--record-bits",
        type=int,
        choices=(4, 8, 16),
        help="recorded per number and evaluation for the exact reversal",
    )
    data = parser.add_argument_group("data").add_argument
    data("--length", type=_length, metavar="N", help="of sequences in training")
    data(
        "--test-lengths",
        nargs="*",
        type=_length,
        metavar="N",
        help="further lengths to test; steps at test time grow in proportion",
    )
    data("--test-size", type=_count, metavar="N", help="examples of a test set")
    data(
        "--test-depth",
        type=_positive,
        metavar="R",
        help="steps per position at test time over those of training",
    )
    data("--group", choices=GROUPS, help="of the words of groups. Default: S3")
    data(
        "--ask",
        choices=("all", "last"),
        help="positions that training and tests ask for. Default: last for chains, "
        "all otherwise",
    )
    fit = parser.add_argument_group("training").add_argument
    fit("--updates", type=_count, metavar="N", help="of the exact way; see --equal")
    fit("--batch-size", type=_count, metavar="N", help="examples of an update")
    fit("--lr", type=_positive, metavar="R", help="highest learning rate of AdamW")
    fit("--cell-rate", type=_positive, metavar="R", help="its factor for the cell")
    fit("--clip", type=_positive, metavar="R", help="largest norm of a gradient")
    fit("--weight-decay", type=_not_negative, metavar="R", help="AdamW's weight decay")
    out = parser.add_argument_group("output").add_argument
    out(
        "--save-every",
        type=_count,
        default=100,
        metavar="N",
        help="updates between checkpoints. Default: 100",
    )
    out(
        "--progress",
        choices=("auto", "bar", "lines", "off"),
        default="auto",
        help="auto: a bar on a terminal, otherwise a line per training",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = vars(make_parser().parse_args(argv))
    task, preset = given.pop("task"), given.pop("preset")
    once = lambda values: tuple(dict.fromkeys(values))
    plan = Plan(
        ways=once(given.pop("ways")),
        seeds=once(given.pop("seeds")),
        **{k: given.pop(k) for k in ("output", "resume", "save_every", "progress")},
    )
    if "test_lengths" in given:
        given["test_lengths"] = once(given["test_lengths"])
    try:
        results, stopped_by = run(make_config(task, preset, given), plan)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (training.TrainingError, training.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    if stopped_by is not None:
        print(
            f"stopped by {stopped_by.name}; the training under way was saved; continue "
            "with --resume",
            file=sys.stderr,
        )
        return 128 + stopped_by
    print(f"{results['name']} ({results['machine']}, {results['device']})\n")
    print(table(results))
    print(f"\nresults: {plan.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
