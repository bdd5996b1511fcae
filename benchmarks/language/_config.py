"""The presets and the choices of a run."""

import dataclasses
from pathlib import Path
from typing import Any

MODELS = ("revdeq", "deq", "explicit")
POSITIONS = ("learned", "rotary")
TITLES = {
    "revdeq": "RevDEQ",
    "deq": "DEQ-Transformer",
    "explicit": "explicit transformer",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; `--help` says what each choice means."""

    preset: str
    model: str
    data: str
    data_dir: str | None
    tokens: str | None
    min_count: int
    dim: int
    heads: int
    hidden: int
    length: int
    layers: int
    solver_steps: int
    beta: float
    batch_size: int
    accumulate: int
    steps: int
    lr: float
    cell_rate: float
    schedule: str
    patience: int
    warmup: float
    weight_decay: float
    ema: float | None
    precision: str
    mesh: str | None
    seed: int
    eval_every: int
    eval_windows: int
    save_every: int
    keep: int
    tensorboard: bool
    # With defaults, so that runs of before these choices can be resumed and loaded.
    dropout: float = 0.0
    positions: str = "learned"
    tied: bool = False

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON knows them."""
        return dataclasses.asdict(self)


_COMMON: dict[str, Any] = {
    "model": "revdeq",
    "data": "stdlib",
    "data_dir": None,
    "tokens": None,
    "min_count": 1,
    "layers": 3,
    "solver_steps": 4,
    "beta": 0.5,
    "accumulate": 1,
    "cell_rate": 1.0,
    "schedule": "cosine",
    "patience": 10,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "ema": None,
    "precision": "float32",
    "mesh": None,
    "seed": 0,
    "save_every": 0,
    "keep": 2,
    "tensorboard": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "dim": 96,
        "heads": 4,
        "hidden": 192,
        "length": 64,
        "batch_size": 8,
        "steps": 5000,
        "lr": 3e-3,
        "solver_steps": 2,
        "eval_every": 500,
        "eval_windows": 1024,
    },
    "small": {
        "dim": 512,
        "heads": 8,
        "hidden": 1536,
        "length": 256,
        "batch_size": 64,
        "steps": 2000,
        "lr": 1e-3,
        "precision": "bf16",
        "eval_every": 250,
        "eval_windows": 1024,
    },
    "paper": {
        "dim": 768,
        "heads": 12,
        "hidden": 3072,
        "length": 448,
        "batch_size": 32,
        "steps": 72000,
        "lr": 3e-4,
        "precision": "bf16",
        "eval_every": 1000,
        "eval_windows": 4096,
        "save_every": 500,
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """The choices of a preset."""
    return {"preset": name, **_COMMON, **PRESETS[name]}


def output_paths(output: Path) -> dict[str, Path]:
    """The files of a run by what they hold."""
    return {
        "config": output / "config.json",
        "metrics": output / "metrics.jsonl",
        "events": output / "tensorboard",
        "checkpoints": output / "checkpoints",
        "figure": output / "figure.png",
        "results": output / "results.json",
    }
