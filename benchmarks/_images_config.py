"""The choices of `train_images.py`: defaults, and what does not go together."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._images_options import make_parser


class UsageError(Exception):
    """A choice that cannot be carried out; the message names the option."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; `--help` says what each choice means."""

    data: str
    data_dir: Path | None
    model: str
    baseline: bool
    channels: tuple[int, ...]
    widths: tuple[int, ...]
    pool: int
    solver: str | None
    adjoint: str | None
    steps: int | None
    beta: float | None
    rtol: float | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    augment: bool
    precision: str
    seed: int
    output: Path
    overwrite: bool
    progress: str

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON knows them."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Config":
        """What `to_json` was made from; choices that are no more are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {k: v for k, v in fields.items() if k in known}
        paths = {k: fields[k] and Path(fields[k]) for k in ("data_dir", "output")}
        tuples = {k: tuple(fields[k]) for k in ("channels", "widths")}
        return cls(**{**fields, **paths, **tuples})


# What is taken where an option is left out, by data set and by model. The values for
# CIFAR-10 are those of the RevDEQ paper (arXiv 2509.12917), learning rate included.
BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": (32,),
        "widths": (1,),
        "pool": 2,
        "beta": 0.5,
        "epochs": 40,
        "lr": 3e-3,
    },
    "cifar10": {
        "channels": (128, 256, 256, 128),
        "widths": (1, 3, 3, 1),
        "pool": 1,
        "beta": 0.8,
        "epochs": 100,
        "lr": 3e-4,
    },
}
BY_MODEL: dict[str, dict[str, Any]] = {
    "revdeq": {
        "solver": "reversible",
        "adjoint": "reversible",
        "steps": 4,
        "rtol": None,
    },
    "deq": {"solver": "picard", "adjoint": "implicit", "steps": 30, "rtol": 1e-2},
    "explicit": {"solver": None, "adjoint": None, "steps": None, "rtol": None},
}
_SOLVE_OPTIONS = ("solver", "adjoint", "steps", "beta", "rtol")


# --- from options to a configuration --------------------------------------------------


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """The configuration that the command line asks for, defaults filled in.

    Raises:
        UsageError: for choices that do not go together.
        SystemExit: for options that cannot be read at all, and after `--help`.
    """
    given = vars(make_parser().parse_args(argv))
    data, model = given.get("data", "digits"), given.get("model", "revdeq")
    _check_together(given, data, model)
    by_data, by_model = dict(BY_DATA[data]), dict(BY_MODEL[model])
    if "channels" in given:
        by_data["widths"] = (1,) * len(given["channels"])
    if model == "explicit":
        by_data["beta"] = None
    elif given.get("solver", by_model["solver"]) == "picard":
        by_data["beta"] = 1.0
    if model == "deq" and given.get("solver") == "reversible":
        by_model["adjoint"] = "reversible"
    defaults = {
        "data": data,
        "data_dir": None,
        "model": model,
        "baseline": model != "explicit",
        "batch_size": 64,
        "weight_decay": 0.01,
        "augment": True,
        "precision": "float32",
        "seed": 0,
        "output": Path(
            "runs", f"images-{data}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
        ),
        "overwrite": False,
        "progress": "auto",
    }
    fields = {**defaults, **by_data, **by_model, **given}
    fields["channels"] = tuple(fields["channels"])
    fields["widths"] = tuple(fields["widths"])
    if len(fields["channels"]) != len(fields["widths"]):
        raise UsageError(
            f"--widths: got {len(fields['widths'])} values for "
            f"{len(fields['channels'])} scales of --channels; give one for each"
        )
    _check_solve(fields["solver"], fields["adjoint"], fields["beta"])
    if fields["progress"] == "auto":
        fields["progress"] = "bar" if sys.stderr.isatty() else "lines"
    return Config(**fields)


def _check_together(given: dict[str, Any], data: str, model: str) -> None:
    """Refuse what is clear from the options alone; the rest is the library's to say."""
    if data == "cifar10" and "data_dir" not in given:
        raise UsageError(
            "--data-dir: missing; --data cifar10 is read from disk, so give the "
            "directory where its archive lies"
        )
    if data != "cifar10" and "data_dir" in given:
        raise UsageError(
            f"--data-dir: of no use with --data {data}, which comes with scikit-learn; "
            "leave it out, or add --data cifar10"
        )
    if model == "explicit":
        for name in _SOLVE_OPTIONS:
            if name in given:
                raise UsageError(
                    f"--{name}: of no use with --model explicit, which solves nothing; "
                    "leave it out, or choose --model revdeq or deq"
                )
    if model == "revdeq" and given.get("solver", "reversible") != "reversible":
        raise UsageError(
            f"--solver: got {given['solver']}, but --model revdeq is the one solved by "
            "the reversible solver; choose --model deq for another"
        )


def _check_solve(solver: str | None, adjoint: str | None, beta: float | None) -> None:
    """Refuse, in the words of the command line, what deqjax would refuse in its own."""
    if adjoint == "reversible" and solver != "reversible":
        raise UsageError(
            "--adjoint: got reversible, which undoes the steps of --solver reversible, "
            f"but the solver is {solver}; choose --adjoint implicit, unrolled or jfb, "
            "or --solver reversible"
        )
    if solver == "reversible" and beta is not None and not beta < 1:
        raise UsageError(
            f"--beta: got {beta:g}, but the reversible solver divides by 1 − β; choose "
            "a number between 0 and 1, 0.5 for instance"
        )
