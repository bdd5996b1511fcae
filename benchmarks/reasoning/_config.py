"""The choices of a run: their defaults by task and preset, and their checks."""

import dataclasses
import math
from typing import Any

TASKS = ("chains", "prefix", "groups", "sudoku")
WAYS = ("one-step", "last-k", "exact", "stack")
TITLES = {
    "one-step": "one-step gradient",
    "last-k": "last k steps",
    "exact": "exact, all steps",
    "stack": "stack without loop",
}


class UsageError(Exception):
    """A choice that cannot be carried out; the message names the option."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the numbers; `--help` says what each choice means."""

    task: str
    preset: str
    equal: str
    updates: int
    batch_size: int
    lr: float
    cell_rate: float
    clip: float
    weight_decay: float
    width: int
    steps: int
    beta: float
    last: int
    record_bits: int
    length: int
    test_lengths: tuple[int, ...]
    test_size: int
    test_depth: float
    group: str
    ask: str

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON knows them."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def cost_of_update(config: Config, way: str) -> int:
    """Evaluations of the cell for one update; a pull-back counts as two.

    N steps of the reversible iteration are 2N evaluations. Undoing them evaluates and
    pulls back each once more, as does a stack of 2N layers whose states are recomputed.
    The last k steps are come to by a second solve of N − k.
    """
    forward = 2 * config.steps
    if way == "one-step":
        return forward + 3
    if way == "last-k":
        return 2 * forward + 4 * config.last
    return 4 * forward


def updates_of(config: Config, way: str) -> int:
    """Updates of a way: equal in number, or as many as cost as many evaluations."""
    if config.equal == "updates":
        return config.updates
    exact, own = cost_of_update(config, "exact"), cost_of_update(config, way)
    return math.ceil(config.updates * exact / own)


_COMMON: dict[str, Any] = {
    "equal": "updates",
    "cell_rate": 1.0,
    "clip": 1.0,
    "weight_decay": 0.0,
    "last": 4,
    "record_bits": 8,
    "test_size": 256,
    "test_depth": 1.5,
    "group": "S3",
    "ask": "all",
}

# By task, then by preset: "small" is for two CPU cores, "published" for one GPU.
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "chains": {
        "small": {
            "length": 800,
            "test_lengths": (),
            "test_size": 128,
            "test_depth": 1.0,
            "updates": 32,
            "batch_size": 8,
            "lr": 0.1,
            "cell_rate": 1e-3,
            "clip": 1e6,
            "width": 4,
            "steps": 520,
            "beta": 0.9,
            "record_bits": 16,
            "ask": "last",
        },
    },
    "prefix": {
        "small": {
            "length": 32,
            "test_lengths": (128, 512),
            "test_size": 100,
            "updates": 400,
            "batch_size": 32,
            "lr": 3e-3,
            "width": 32,
            "steps": 24,
            "beta": 0.8,
        },
        "published": {
            "length": 32,
            "test_lengths": (128, 512),
            "updates": 15000,
            "batch_size": 100,
            "lr": 1e-3,
            "width": 400,
            "steps": 30,
            "beta": 0.8,
        },
    },
    "groups": {
        "small": {
            "length": 16,
            "test_lengths": (32, 64),
            "updates": 1000,
            "batch_size": 32,
            "lr": 3e-3,
            "width": 32,
            "steps": 14,
            "beta": 0.8,
        },
        "published": {
            "group": "A5",
            "length": 32,
            "test_lengths": (64, 128),
            "updates": 30000,
            "batch_size": 256,
            "lr": 1e-3,
            "width": 256,
            "steps": 24,
            "beta": 0.8,
        },
    },
    "sudoku": {
        "small": {
            "length": 16,
            "test_lengths": (),
            "updates": 400,
            "batch_size": 64,
            "lr": 3e-3,
            "width": 48,
            "steps": 8,
            "beta": 0.8,
            "test_size": 512,
        },
    },
}


def presets_of(task: str) -> tuple[str, ...]:
    """The presets that a task has."""
    return tuple(_DEFAULTS[task])


def make_config(task: str, preset: str, given: dict[str, Any]) -> Config:
    """The choices of a preset, with those that were given in their place.

    Raises:
        UsageError: where choices do not go together.
    """
    if preset not in _DEFAULTS[task]:
        known = ", ".join(presets_of(task))
        raise UsageError(f"--preset: {task} has no preset {preset}; it has {known}")
    config = Config(
        **{
            "task": task,
            "preset": preset,
            **_COMMON,
            **_DEFAULTS[task][preset],
            **given,
        }
    )
    own = {"group": "groups", "ask": ("chains", "prefix", "groups")}
    for name, tasks in own.items():
        if name in given and task not in tasks:
            raise UsageError(f"--{name}: {task} has no such choice; leave it out")
    if task == "sudoku" and ("length" in given or "test_lengths" in given):
        raise UsageError("--length: a sudoku has 16 cells; leave the lengths out")
    if config.last > config.steps:
        raise UsageError(
            f"--last: {config.last} is more than the {config.steps} steps that there "
            "are; give fewer, or more --steps"
        )
    return config
