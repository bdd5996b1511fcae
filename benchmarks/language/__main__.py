"""Train a language model: `python -m benchmarks.language --output DIR`."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.common import training

from ._config import MODELS, POSITIONS, PRESETS, TITLES, Config, preset_fields
from ._errors import UsageError
from ._train import train

_DESCRIPTION = """\
Train a language model on text: a reversible deep equilibrium model (RevDEQ), a
DEQ-Transformer, or an explicit transformer of as many parameters. Without further
options the text is the sources of Python's own standard library, read as bytes, of
which one file in twenty is held out; nothing is downloaded. The last lines printed give
bits per byte on the held-out text."""

_EXAMPLES = """\
examples:
  python -m benchmarks.language --preset tiny --output runs/tiny
  python -m benchmarks.language --preset tiny --model explicit --output runs/explicit
  python -m benchmarks.language --preset tiny --data my-texts/ --output runs/mine
  python -m benchmarks.language --preset tiny --output runs/tiny --resume
  python -m benchmarks.language --preset paper --data wikitext-103 --data-dir DIR \\
      --mesh data=4,fsdp=2 --output runs/paper
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it, which would hide it."""
        message = message.replace("argument --", "--")
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
_natural = _number(int, "a whole number of at least 0", lambda n: 0 <= n < 2**31)
_positive = _number(float, "a number above 0", lambda x: x > 0)
_not_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
_rate = _number(float, "a number of at least 0 and below 1", lambda x: 0 <= x < 1)
_share = _number(float, "a number above 0 and below 1", lambda x: 0 < x < 1)


def make_parser() -> argparse.ArgumentParser:
    """The parser; an option that is not given leaves no attribute behind."""
    parser = _Parser(
        "python -m benchmarks.language",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="tiny",
        help="tiny: a CPU, in minutes; small: one GPU, in minutes; paper: the sizes of "
        "the RevDEQ paper. Every other option changes one choice of it. Default: tiny",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="where all goes")
    add("--resume", action="store_true", default=False, help="continue the run in DIR")
    add("--model", choices=MODELS, help="default: revdeq")
    add(
        "--data",
        metavar="TEXT",
        help="stdlib, a text file, a directory of text files, or wikitext-103 (its "
        "words, from --data-dir). Default: stdlib",
    )
    add("--data-dir", metavar="DIR", help="holds wiki.train.tokens, wiki.valid.tokens")
    add(
        "--tokens",
        metavar="KIND",
        help="bytes, words, or the path of a tokenizer.json (which takes the library "
        "tokenizers). Default: bytes; words of wikitext-103",
    )
    add(
        "--min-count",
        type=_count,
        metavar="N",
        help="words that occur less often become <unk>. Default: 1",
    )
    model = parser.add_argument_group("model").add_argument
    model("--dim", type=_count, metavar="N", help="width of the model")
    model("--heads", type=_count, metavar="N", help="attention heads; divide --dim")
    model("--hidden", type=_count, metavar="N", help="width of the RevDEQ's MLP")
    model("--length", type=_count, metavar="N", help="tokens of a sequence")
    model("--layers", type=_count, metavar="N", help="of the explicit transformer")
    model("--solver-steps", type=_count, metavar="N", help="steps of the RevDEQ")
    model("--beta", type=_share, metavar="β", help="weight on the cell in each step")
    model(
        "--positions",
        choices=POSITIONS,
        help="of the RevDEQ and the explicit transformer; learned: embeddings that are "
        "added to those of the tokens; rotary: queries and keys rotated by their "
        "positions, without parameters. Default: learned",
    )
    model(
        "--tied",
        action="store_true",
        help="the embedding of tokens is the output matrix, too, in the RevDEQ and the "
        "explicit transformer; the DEQ-Transformer always ties them",
    )
    fit = parser.add_argument_group("training").add_argument
    fit(
        "--dropout",
        type=_rate,
        metavar="R",
        help="rate in training, of embeddings, attention and MLP: in the RevDEQ and "
        "the DEQ-Transformer one mask per solve, the same for all tokens; in the "
        "explicit transformer one mask per layer and entry. Evaluations have none. "
        "Default: 0",
    )
    fit("--steps", type=_count, metavar="N", help="length of the run")
    fit("--batch-size", type=_count, metavar="N", help="sequences in a batch")
    fit("--accumulate", type=_count, metavar="N", help="parts of a batch, in turn")
    fit("--lr", type=_positive, metavar="R", help="highest learning rate of AdamW")
    fit("--cell-rate", type=_positive, metavar="R", help="its factor for the cell")
    fit(
        "--schedule",
        choices=training.SHAPES,
        help="of the learning rate; plateau: halved when the training loss, averaged "
        "over 100 steps, has not improved --patience times",
    )
    fit("--patience", type=_count, metavar="N", help="see --schedule. Default: 10")
    fit("--warmup", type=_share, metavar="R", help="share of steps of the warm-up")
    fit("--weight-decay", type=_not_negative, metavar="R", help="AdamW's weight decay")
    fit("--ema", type=_share, metavar="R", help="decay of a parameter average")
    fit(
        "--precision",
        choices=("float32", "bf16"),
        help="bf16: products of linear layers in bfloat16, all else in float32",
    )
    fit("--mesh", metavar="AXES", help="devices, for example data=4,fsdp=2")
    fit(
        "--processes",
        metavar="WHERE",
        help="join the other processes of this run: auto (Slurm, TPU pods), or "
        "HOST:PORT,INDEX/COUNT",
    )
    fit("--seed", type=_natural, metavar="N", help="of parameters and batches")
    out = parser.add_argument_group("output").add_argument
    out("--eval-every", type=_count, metavar="N", help="steps between evaluations")
    out("--eval-windows", type=_count, metavar="N", help="sequences of an evaluation")
    out("--save-every", type=_natural, metavar="N", help="steps between checkpoints")
    out("--keep", type=_count, metavar="N", help="latest checkpoints that are kept")
    out(
        "--tensorboard",
        action="store_true",
        help="event files for TensorBoard, too (takes the library tensorboardX)",
    )
    out(
        "--progress",
        choices=("auto", "bar", "lines", "off"),
        default="auto",
        help="auto: a bar on a terminal, otherwise one line per evaluation",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = vars(make_parser().parse_args(argv))
    output, resume = given.pop("output"), given.pop("resume")
    progress = given.pop("progress")
    processes = given.pop("processes", None)
    config = Config(**{**preset_fields(given["preset"]), **given})
    try:
        if processes is not None:
            training.join_processes(processes)
        result, report = train(config, output, resume=resume, progress=progress)
    except training.ProcessError as error:
        print(f"error: --processes: {error}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (training.TrainingError, training.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    if result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} after step {report['steps']}, which "
            "was saved; continue with --resume",
            file=sys.stderr,
        )
        return 128 + result.stopped_by
    if not training.is_main():
        return 0
    print(f"model: {TITLES[config.model]}, {report['parameters']:,} parameters")
    print(f"tokens per second: {report['tokens_per_second']:.0f} ({report['device']})")
    print(f"results: {output}")
    print(f"perplexity per token: {report['perplexity']:.3f}")
    print(f"perplexity per word: {report['word_perplexity']:.4g}")
    print(f"bits per byte: {report['bits_per_byte']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
