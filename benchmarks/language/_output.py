"""What a run writes, and the check that it may be written there."""

import importlib.util
import json
import math
import os
import platform
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import training

from ._config import TITLES, Config, output_paths
from ._data import Corpus
from ._errors import UsageError


def check_output(output: Path, config: Config, resume: bool) -> bool:
    """Refuse a directory that the run cannot use; return whether to resume one.

    Raises:
        UsageError: naming `--output` or `--resume`.
    """
    paths = output_paths(output)
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError(
            "--tensorboard: needs the library tensorboardX; install it with `pip "
            "install tensorboardX`, or leave the option out"
        )
    above = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output: {output} cannot be written ({above} is no writable directory); "
            "choose another"
        )
    if not paths["config"].exists():
        if output.exists() and any(output.iterdir()):
            raise UsageError(
                f"--output: {output} holds other things than a run, which are never "
                "overwritten; choose another directory"
            )
        return False
    if not resume:
        raise UsageError(
            f"--output: {output} holds an earlier run; add --resume to continue it, or "
            "choose another directory"
        )
    found, wanted = read_config(paths["config"])[0].to_json(), config.to_json()
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        name = changed[0]
        raise UsageError(
            f"--resume: {output} was trained with {name} = {found.get(name)!r}, but "
            f"this run has {wanted[name]!r}; give the options of the first run, or "
            "choose another --output"
        )
    return True


def read_config(path: Path) -> tuple[Config, dict[str, int]]:
    """The configuration of a run and the sizes of its text.

    Raises:
        UsageError: if the file is missing or of another version of this program.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Config(**found["config"]), found["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: cannot read {path}: {error}") from error


def prepare_output(output: Path, config: Config, corpus: Corpus, resume: bool) -> None:
    """Make the directory and record the configuration and the vocabulary.

    Raises:
        UsageError: if a run is resumed whose text has changed.
    """
    paths = output_paths(output)
    if resume:
        earlier = read_config(paths["config"])[1]
        if earlier != _sizes(corpus):
            raise UsageError(
                f"--resume: the text has changed since the run began ({_sizes(corpus)} "
                f"now, {earlier} then); restore it, or start anew in another --output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in corpus.files.items():
        training.write_atomically(output / name, text)
    _write_json(paths["config"], {"config": config.to_json(), "tokens": _sizes(corpus)})


def _sizes(corpus: Corpus) -> dict[str, int]:
    return {
        "train": len(corpus.train),
        "valid": len(corpus.valid.ids),
        "vocabulary": corpus.vocab_size,
        "checksum": zlib.crc32(corpus.train.tobytes()),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    training.write_atomically(path, text + "\n")


def write_report(
    config: Config,
    corpus: Corpus,
    parameters: int,
    result: training.FitResult,
    paths: dict[str, Path],
) -> dict[str, Any]:
    """Write results and figure of a run that is complete, and return the results."""
    seconds = max(result.seconds, 1e-9)
    # The first step compiles; it is not in the seconds.
    rate = max(result.steps - 1, 0) * config.batch_size * config.length / seconds
    report = {
        **result.metrics,
        "parameters": parameters,
        "steps": int(result.state.step),
        "seconds": result.seconds,
        "tokens_per_second": rate,
        "tokens": _sizes(corpus),
        "cpu_seconds": result.cpu_seconds,
        "compile_seconds": result.compile_seconds,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count() if config.mesh else 1,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "config": config.to_json(),
    }
    if result.stopped_by is not None or not training.is_main():
        return report
    rows = training.read_metrics(paths["metrics"])
    steps = [r for r in rows if r["kind"] == "train"]
    tests = [r for r in rows if r["kind"] == "valid"]
    if not result.metrics and tests:  # resumed after its end
        report |= {k: v for k, v in tests[-1].items() if k not in ("kind", "step")}
    nan = lambda x: math.nan if x is None else x
    per_byte = float(np.mean(corpus.valid.sizes)) * math.log(2)
    curves = [
        training.Curve(
            "training (smoothed)",
            [r["step"] for r in steps],
            [nan(r["loss"]) / per_byte for r in steps],
            faint=True,
        ),
        training.Curve(
            "validation",
            [r["step"] for r in tests],
            [nan(r["bits_per_byte"]) for r in tests],
        ),
    ]
    norms = training.Curve(
        "norm, smoothed",
        [r["step"] for r in steps],
        [nan(r["grad_norm"]) for r in steps],
        faint=True,
    )
    title = (
        f"{TITLES[config.model]} on {corpus.name}: {report['bits_per_byte']:.3f} bits "
        f"per byte ({parameters:,} parameters)"
    )
    panels = {"Bits per byte": curves, "Gradient": [norms]}
    training.draw_curves(panels, title, paths["figure"])
    _write_json(paths["results"], report)
    return report
