"""Train a convolutional RevDEQ on images, beside an explicit network of equal size.

`python benchmarks/train_images.py` needs nothing else; `--help` says what there is to
choose.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
from rich.console import Console

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._images_config import Config, UsageError, parse_config
from benchmarks._images_models import ImageClassifier
from benchmarks._images_progress import describe
from benchmarks._images_report import (
    RESULTS,
    check_output,
    make_table,
    write_results,
)
from benchmarks._images_training import (
    Run,
    check_batch_size,
    check_model,
    train,
)
from benchmarks.common.training import ProgressDisplay, TrainingError
from benchmarks.data.images import DataError, ImageData, load_cifar10, load_digits


def load_data(config: Config) -> ImageData:
    """The data set that `config` names.

    Raises:
        DataError: if it is missing or not what it should be.
    """
    if config.data == "cifar10":
        assert config.data_dir is not None
        return load_cifar10(config.data_dir)
    return load_digits()


def make_model(config: Config, data: ImageData, name: str) -> ImageClassifier:
    """The untrained model `name`; equal seeds give all of them equal parameters."""
    key = jr.key(config.seed)
    return ImageClassifier(config, data, name == "explicit", key=key)


def load_run(directory: Path | str, name: str) -> tuple[ImageClassifier, Config]:
    """A trained model that an earlier run has left in `directory`, by its name."""
    directory = Path(directory)
    results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    config = Config.from_json(results["config"])
    model = make_model(config, load_data(config), name)
    return eqx.tree_deserialise_leaves(directory / f"{name}.eqx", model), config


@contextlib.contextmanager
def _wide(wanted: bool) -> Iterator[None]:
    """Let JAX compute in float64 where that is wanted.

    A program, unlike a library, may set JAX's configuration: hence the two `noqa`s.
    """
    before = jax.dtypes.canonicalize_dtype("float64") == "float64"
    jax.config.update("jax_enable_x64", before or wanted)  # noqa: TID251
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)  # noqa: TID251


def _as_option(message: str, config: Config) -> str:
    """A refusal of deqjax in one line, after the option that it is about."""
    message = " ".join(message.split())
    argument = re.match(r"`(\w+)`", message)
    if argument and hasattr(config, argument[1]):
        return f"--{argument[1]}: {message}"
    return message


def run(config: Config) -> tuple[list[Run], Path]:
    """Train as `config` says and write the results; nothing is written if that fails.

    Raises:
        UsageError: or DataError, TrainingError, with one line to show to the user.
    """
    check_output(config)
    data = load_data(config)
    check_batch_size(config, data)
    names = [config.model] + ["explicit"] * config.baseline
    try:
        models = {name: make_model(config, data, name) for name in names}
        for model in models.values():
            check_model(model, config, data)
    except (ValueError, TypeError) as error:
        if "`" not in str(error):  # where deqjax refuses, it names the argument so
            raise
        raise UsageError(_as_option(str(error), config)) from error
    display = ProgressDisplay(config.progress, describe, unit="epoch")
    runs = [train(models[name], config, data, name, display) for name in names]
    Console().print(make_table(runs))
    return runs, write_results(runs, config, data)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        config = parse_config(argv)
        with _wide(config.precision == "float64"):
            _, path = run(config)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"Results: {path}")
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # terminals that lack β or ≤
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(main())
