"""Runs of the language program, as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import training
from benchmarks.language import __main__ as program

ROOT = Path(program.__file__).resolve().parents[2]
SMALL = "--dim 8 --heads 2 --hidden 8 --length 8 --batch-size 4 --eval-windows 8"


@pytest.fixture
def text(tmp_path):
    """A text that is easy to learn."""
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 30)
    return path


def options(tmp_path, text, *more):
    """Options of a run of a very small model."""
    given = f"{SMALL} --data {text} --output {tmp_path / 'out'} --progress off"
    return [*given.split(), *more]


def start(given, **env):
    """Start the program."""
    command = [sys.executable, "-m", "benchmarks.language", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish_all(processes):
    """What runs printed, which all have to succeed."""
    outputs = [process.communicate()[0].decode() for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def finish(process):
    """What a run printed, which has to succeed."""
    return finish_all([process])[0]


def saved_steps(out):
    """The steps of a run's checkpoints."""
    names = (path.name for path in (out / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def losses(out):
    """Kind, step and loss of each line of a run's log."""
    rows = training.read_metrics(out / "metrics.jsonl")
    return [(r["kind"], r["step"], r.get("loss", r.get("valid_loss"))) for r in rows]
