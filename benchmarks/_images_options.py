"""The command line of `train_images.py`: what can be chosen, and what it means."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

DATA = ("digits", "cifar10")
MODELS = ("revdeq", "deq", "explicit")
SOLVERS = ("reversible", "picard")
ADJOINTS = ("reversible", "implicit", "unrolled", "jfb")


# --- values ---------------------------------------------------------------------------


def _number(kind: type, what: str, accept: Callable[[Any], bool]) -> Callable[..., Any]:
    """A parser of one number that says what it wanted when it is given another."""

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
_seed = _number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
_positive = _number(float, "a number above 0", lambda x: x > 0)
_not_negative = _number(float, "a number of at least 0", lambda x: x >= 0)


def _tolerance(text: str) -> float | None:
    if text.lower() == "none":
        return None
    parse = _number(
        float, "`none`, or a number above 0 and below 1", lambda x: 0 < x < 1
    )
    return parse(text)


def _path(text: str) -> Path:
    return Path(text).expanduser()


# --- the parser -----------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines of one width everywhere, with room for the options' names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=88)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it, which would hide it."""
        message = message.replace("argument --", "--")
        self.exit(2, f"error: {message} (see --help)\n")


_DESCRIPTION = """\
Train a convolutional reversible deep equilibrium model (RevDEQ) on images, and beside
it an explicit network of exactly the same parameters, trained the same way: its cells
are applied once, as ordinary residual blocks, where the RevDEQ's are solved for their
fixed points. Without options it takes scikit-learn's handwritten digits and needs no
download. Prints a table and writes a figure, the histories and the trained parameters
into one new directory, whose path it prints last."""

_EXAMPLES = """\
examples:
  python benchmarks/train_images.py
  python benchmarks/train_images.py --steps 8 --beta 0.3 --seed 1
  python benchmarks/train_images.py --model deq --adjoint jfb --epochs 10
  python benchmarks/train_images.py --data cifar10 --data-dir data --precision bfloat16
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; an option that is not given leaves no attribute behind."""
    parser = _Parser(
        "train_images.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_data_and_model(parser)
    _add_solve(parser)
    _add_training(parser)
    _add_output(parser)
    return parser


def _add_data_and_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--data",
        choices=DATA,
        help="digits: 1797 grey images of 8 × 8 that come with scikit-learn, a fixed "
        "half held out for testing; cifar10: 60000 colour images of 32 × 32, read from "
        "--data-dir. Default: digits",
    )
    add(
        "--data-dir",
        type=_path,
        metavar="DIR",
        help="where CIFAR-10's official archive lies, python or binary version, "
        "compressed (cifar-10-python.tar.gz) or unpacked (cifar-10-batches-py)",
    )
    add(
        "--model",
        choices=MODELS,
        help="revdeq: cells solved by the reversible solver, in a fixed number of "
        "steps; deq: cells solved to a tolerance (slow on a CPU, where XLA runs "
        "convolutions' gradients badly inside loops); explicit: cells applied once. "
        "Default: revdeq",
    )
    add(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="do not train the explicit network beside the model",
    )
    add(
        "--channels",
        type=_count,
        nargs="+",
        metavar="N",
        help="channels of the cell at each scale; every further scale has half the "
        "resolution. Default: 32 for digits, 128 256 256 128 for cifar10",
    )
    add(
        "--widths",
        type=_count,
        nargs="+",
        metavar="N",
        help="how many times wider the inside of each scale's cell is. Default: 1 for "
        "digits, 1 3 3 1 for cifar10; 1 everywhere if --channels is given",
    )
    add(
        "--pool",
        type=_count,
        metavar="N",
        help="the features are averaged over a grid of N × N before the last, linear "
        "layer. Default: 2 for digits, 1 for cifar10",
    )


def _add_solve(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("solver and gradient")
    add = group.add_argument
    add(
        "--solver",
        choices=SOLVERS,
        help="reversible: the coupled pair of the RevDEQ, two evaluations per step; "
        "picard: z ← (1 − β) z + β f(z). Default: reversible for revdeq, picard for "
        "deq",
    )
    add(
        "--adjoint",
        choices=ADJOINTS,
        help="the gradient. reversible: exact for the steps taken, rebuilt backwards "
        "from a byte per number and evaluation (needs --solver reversible); implicit: "
        "exact at the fixed point; unrolled: exact for the steps taken, which are "
        "stored; jfb: biased, one pull-back. Default: reversible for --solver "
        "reversible, else implicit",
    )
    add(
        "--steps",
        type=_count,
        metavar="N",
        help="steps of each solve: exactly so many without a tolerance, at most so "
        "many with one. Default: 4 for revdeq, 30 for deq",
    )
    add(
        "--beta",
        type=_positive,
        metavar="β",
        help="the weight on f in each step (1: undamped); between 0 and 1 for the "
        "reversible solver, which divides by 1 − β. Default: 0.5 for digits, 0.8 for "
        "cifar10; 1 for picard",
    )
    add(
        "--rtol",
        type=_tolerance,
        metavar="R",
        help="a solve stops where ‖f(z) − z‖ ≤ R ‖f(z)‖ + 1e-6; none: never, all steps "
        "are taken. Default: none for revdeq, 1e-2 for deq",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add(
        "--epochs",
        type=_count,
        metavar="N",
        help="passes over the training images. Default: 40 for digits, 100 for cifar10",
    )
    add("--batch-size", type=_count, metavar="N", help="images per step. Default: 64")
    add(
        "--lr",
        type=_positive,
        metavar="R",
        help="the highest learning rate of AdamW: reached after a tenth of the steps, "
        "then lowered to 0 along a cosine. Default: 3e-3 for digits, 3e-4 for cifar10",
    )
    add(
        "--weight-decay",
        type=_not_negative,
        metavar="R",
        help="AdamW's weight decay. Default: 0.01",
    )
    add(
        "--no-augment",
        dest="augment",
        action="store_false",
        help="leave the training images as they are. Otherwise they are shifted at "
        "random, by up to 1 pixel for digits and 4 for cifar10, and for cifar10 "
        "mirrored every other time",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16", "float64"),
        help="what is computed in. bfloat16: the cells' convolutions only; parameters, "
        "iterates and norms stay float32. Default: float32",
    )
    add(
        "--seed",
        type=_seed,
        metavar="N",
        help="decides initial parameters, order of images and augmentation; the "
        "division into training and test images never changes. Default: 0",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--output",
        type=_path,
        metavar="DIR",
        help="the directory to make for the results; it appears complete at the end, "
        "or not at all. Default: runs/images-DATA-MODEL-DATE-TIME",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace the results of an earlier run in that directory",
    )
    add(
        "--progress",
        choices=("auto", "bar", "lines", "off"),
        help="auto: a bar on a terminal, otherwise one line per epoch. Default: auto",
    )
