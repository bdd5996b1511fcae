"""One training of one model, and what it has learnt."""

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import deqjax
from benchmarks.common import training
from deqjax.diagnostics import DepthReport, depth_report

from ._config import TITLES, updates_of
from ._tasks import Batches, Examples, Task
from ._ways import Looped, Stack, apply_cell, build, solver_of


def loss_fn(
    model: Looped | Stack, examples: Examples, key: PRNGKeyArray
) -> tuple[Array, dict[str, Array]]:
    """The mean cross-entropy of the positions that are asked."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(examples.inputs), examples.targets
    )
    asked = examples.asked.astype(losses.dtype)
    return jnp.sum(losses * asked) / jnp.sum(asked), {}


def train(
    task: Task,
    way: str,
    seed: int,
    directory: Path,
    display: training.ProgressDisplay,
    *,
    resume: bool,
    save_every: int = 0,
) -> tuple[training.FitResult, dict[str, Any]]:
    """Train, from the last checkpoint in `directory` if there is one, and test.

    Returns:
        How the training ended, and its results; these are empty if it was stopped.
    """
    config = task.config
    updates = updates_of(config, way)
    schedule = training.Schedule(
        learning_rate=config.lr,
        steps=updates,
        weight_decay=config.weight_decay,
        cell_rate=config.cell_rate,
        clip=config.clip,
    )
    optimiser = training.make_optimiser(schedule)
    key = jr.fold_in(jr.key(seed), 0)
    # Compiled as a whole, which is faster than one operation after the other.
    model = eqx.filter_jit(build)(task.model, config, way, key)
    state, static = training.init_state(model, optimiser, key=key)
    with training.Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        saved = checkpoints.restore(state) if resume else None
        state = state if saved is None else saved
        batches = Batches(task, seed)
        step = training.make_step(loss_fn, static, optimiser)
        began = time.perf_counter()
        compiled: Any = step.lower(state, batches[0]).compile()  # type: ignore[attr-defined]
        compile_seconds = time.perf_counter() - began
        at = int(state.step) if resume else None
        with training.MetricsLog(directory / "metrics.jsonl", resume_at=at) as log:
            result = training.fit(
                state,
                _timed(compiled),
                batches,
                steps=updates,
                log=log,
                checkpoints=checkpoints,
                save_every=save_every,
                display=display,
                title=f"{TITLES[way]}, seed {seed}",
            )
    if result.stopped_by is not None:
        return result, {}
    model = eqx.combine(result.state.params, static)
    rows = training.read_metrics(directory / "metrics.jsonl")
    return result, {
        "way": way,
        "seed": seed,
        "updates": updates,
        "parameters": deqjax.nn.count_parameters(model),
        "loss": _last_loss(rows),
        "skipped_updates": rows[-1]["skipped"],
        "seconds_per_update": float(np.median([r["seconds"] for r in rows])),
        "cpu_seconds_per_update": float(np.median([r["cpu_seconds"] for r in rows])),
        "compile_seconds": compile_seconds,
        "temporary_bytes": temporary_bytes(compiled),
        "tests": [test(task, model, length) for length in task.lengths],
    }


def _timed(compiled: Any) -> Any:
    """A step whose metrics tell its time, on the clock and on all cores."""

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        clock, cpu = time.perf_counter(), time.process_time()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        metrics["seconds"] = np.float64(time.perf_counter() - clock)
        metrics["cpu_seconds"] = np.float64(time.process_time() - cpu)
        return state, metrics

    return step


def _last_loss(rows: list[dict[str, Any]]) -> float:
    """The mean over the last twentieth of the updates; NaN if one is not finite."""
    losses = [r["loss"] for r in rows[-max(1, len(rows) // 20) :]]
    return float(np.mean([np.nan if x is None else x for x in losses]))


def temporary_bytes(compiled: Any) -> int | None:
    """Temporary memory of a compiled program; None where the compiler does not tell."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


# --- tests ----------------------------------------------------------------------------


def test(task: Task, model: Looped | Stack, length: int) -> dict[str, Any]:
    """Accuracies on a test set, with the residual at every depth of a loop."""
    examples = task.test(length)
    found: dict[str, Any] = {"length": length, "examples": len(examples.targets)}
    if isinstance(model, Stack):
        scores = np.asarray(eqx.filter_jit(_stack_scores)(model, examples))
        return {**found, **_accuracies(scores)}
    report = look_deeper(task, model, examples, length)
    scores, residual = np.asarray(report.score), np.asarray(report.residual)
    kinds = np.bincount(np.asarray(report.verdict), minlength=len(report.kinds))
    return {
        **found,
        **_accuracies(scores[-1]),
        "residual": float(np.median(residual[-1])),
        "verdicts": dict(zip(report.kinds, kinds.tolist(), strict=True)),
        "depths": np.asarray(report.depths).tolist(),
        "exact_match_at": np.mean(scores == 1, axis=1).tolist(),
        "residual_at": np.median(residual, axis=1).tolist(),
    }


def look_deeper(
    task: Task, model: Looped, examples: Examples, length: int
) -> DepthReport:
    """The share of right answers and the residual of each example by depth."""
    loop = model.model
    x = eqx.filter_jit(loop.inject)(examples.inputs)
    steps, weights = task.test_steps(length), weights_of(examples)
    return depth_report(
        apply_cell,
        loop.initial_state(x),
        (loop.cell, x),
        read_out=lambda z: share_right(loop.logits(z), examples.targets, weights),
        solver=solver_of(task.config),
        max_steps=steps,
        depths=sorted({steps * i // 8 for i in range(1, 9)} - {0}),
    )


def _stack_scores(model: Stack, examples: Examples) -> Array:
    return share_right(model(examples.inputs), examples.targets, weights_of(examples))


def weights_of(examples: Examples) -> Array:
    """The weight of every position in the accuracy of its example."""
    return examples.asked / jnp.sum(examples.asked, axis=-1, keepdims=True)


def share_right(logits: Array, targets: Array, weights: Array) -> Array:
    """The share of the asked positions whose answer is right, of every example."""
    wrong = jnp.where(jnp.argmax(logits, axis=-1) == targets, 0.0, weights)
    return 1.0 - jnp.sum(wrong, axis=-1)  # exactly 1 where all are right


def _accuracies(scores: np.ndarray) -> dict[str, float]:
    """Of positions, and of examples of which every asked position is right."""
    return {
        "accuracy": float(scores.mean()),
        "exact_match": float((scores == 1).mean()),
    }
