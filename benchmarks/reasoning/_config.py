"""The choices of a run: defaults by task and preset, and what does not go together."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

WAYS = ("one-step", "last-k", "exact", "stack")


class UsageError(Exception):
    """A choice that cannot be carried out; the message names the option."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; `--help` says what each choice means."""

    task: str
    preset: str
    ways: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: int
    batch_size: int
    lr: float
    weight_decay: float
    width: int
    steps: int
    beta: float
    last: int
    record_bits: int
    depth: str
    stack: str
    length: int
    test_lengths: tuple[int, ...]
    test_size: int
    group: str
    ask: str
    side: int
    output: Path
    resume: bool
    overwrite: bool
    checkpoint_seconds: float
    progress: str

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON knows them."""
        fields = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    def identity(self) -> str:
        """What a checkpoint has to agree with: all that decides the numbers."""
        fields = self.to_json()
        free = ("output", "resume", "overwrite", "progress", "checkpoint_seconds")
        free += ("ways", "seeds", "test_lengths", "test_size", "preset")
        return json.dumps({k: v for k, v in fields.items() if k not in free})


COMMON: dict[str, Any] = {
    "ways": WAYS,
    "seeds": (0,),
    "last": 4,
    "record_bits": 8,
    "depth": "fixed",
    "stack": "evaluations",
    "test_size": 256,
    "group": "S3",
    "ask": "last",
    "side": 4,
    "checkpoint_seconds": 60.0,
    "weight_decay": 0.0,
}

# By task, then by preset: "small" is for two cores, "published" for one GPU.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "chains": {
        "small": {
            "length": 800,
            "test_lengths": (),
            "updates": 60,
            "batch_size": 16,
            "lr": 0.05,
            "width": 4,
            "steps": 530,
            "beta": 0.9,
            "record_bits": 16,
        },
    },
    "states": {
        "small": {
            "length": 16,
            "test_lengths": (32, 64),
            "updates": 2000,
            "batch_size": 64,
            "lr": 3e-3,
            "width": 32,
            "steps": 12,
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
    "prefix": {
        "small": {
            "length": 32,
            "test_lengths": (128, 512),
            "updates": 2000,
            "batch_size": 64,
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
}
