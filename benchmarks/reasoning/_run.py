"""All trainings of one command, each in a directory of its own."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

from benchmarks.common import training

from ._config import Config, UsageError
from ._report import draw, make_results, write_results
from ._tasks import make_task
from ._train import train


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command does beside what decides its numbers.

    Attributes:
        ways: in which to train.
        seeds: with which to train each.
        output: the directory.
        resume: whether to go on with what is there.
        save_every: updates between two checkpoints.
        progress: `"auto"`, `"bar"`, `"lines"` or `"off"`.
    """

    ways: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    resume: bool
    save_every: int
    progress: str


def run(config: Config, plan: Plan) -> tuple[dict[str, Any], signal.Signals | None]:
    """Do all trainings that are not done yet, and write what they have found.

    Returns:
        The results, and the signal that stopped the run, if any.

    Raises:
        UsageError: for an output directory that cannot be used; nothing is changed.
        TrainingError, CheckpointError, OSError: if the run cannot go on.
    """
    _prepare(config, plan)
    task = make_task(config)
    display = training.ProgressDisplay(plan.progress, _describe)
    trainings: list[dict[str, Any]] = []
    logs: dict[str, list[dict[str, Any]]] = {}
    for way in plan.ways:
        for seed in plan.seeds:
            directory = plan.output / f"{way}-{seed}"
            done = directory / "result.json"
            if not done.exists():
                result, found = train(
                    task,
                    way,
                    seed,
                    directory,
                    display,
                    resume=(directory / "checkpoints").exists(),
                    save_every=plan.save_every,
                )
                if result.stopped_by is not None:
                    return {}, result.stopped_by
                write_results(done, found)
            trainings.append(json.loads(done.read_text(encoding="utf-8")))
            if way not in logs:
                logs[way] = training.read_metrics(directory / "metrics.jsonl")
            # After every training, so that a long run can be looked at.
            results = make_results(config, trainings)
            write_results(plan.output / "results.json", results)
            draw(results, logs, plan.output / "figure.png")
    return make_results(config, trainings), None


def _describe(metrics: Any) -> str:
    return f"loss {metrics['loss']:.4f}, {metrics['cpu_seconds']:.3f} CPU s per update"


def _prepare(config: Config, plan: Plan) -> None:
    output, chosen = plan.output, plan.output / "config.json"
    above = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output: {output} cannot be written ({above} is no writable directory); "
            "choose another"
        )
    if not chosen.exists():
        if output.exists() and any(output.iterdir()):
            raise UsageError(
                f"--output: {output} holds other things than a run, which are never "
                "overwritten; choose another directory"
            )
        output.mkdir(parents=True, exist_ok=True)
        write_results(chosen, config.to_json())
        return
    if not plan.resume:
        raise UsageError(
            f"--output: {output} holds an earlier run; add --resume to continue it, or "
            "choose another directory"
        )
    try:
        found = json.loads(chosen.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: cannot read {chosen}: {error}") from error
    for name, wanted in config.to_json().items():
        if found.get(name) != wanted:
            raise UsageError(
                f"--resume: {output} was run with {name} = {found.get(name)!r}, but "
                f"this run has {wanted!r}; give the options of the first run, or "
                "choose another --output"
            )
