"""Train one model of a task in one way, with checkpoints."""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import deqjax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ._config import Config, UsageError
from ._progress import Monitor
from ._tasks import Examples, Task
from ._ways import Looped, Stack, build


class TrainingState(NamedTuple):
    """All that an update changes."""

    model: Looped | Stack
    moments: PyTree
    done: Array


class Trained(NamedTuple):
    """A trained model, and what the training cost.

    Attributes:
        model: after the last update.
        losses: of every update.
        seconds: the median time of an update.
        compile_seconds: to trace and compile.
        memory: bytes of temporary memory of an update, by the compiler's own account;
            NaN where it gives none.
    """

    model: Looped | Stack
    losses: np.ndarray
    seconds: float
    compile_seconds: float
    memory: float


def loss_of(
    model: Looped | Stack, examples: Examples, budget: Array | None
) -> Array:
    """The mean cross-entropy of the positions that count."""
    logits = model.model.logits(model.state(examples.inputs, budget))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets)
    asked = examples.asked.astype(loss.dtype)
    return jnp.sum(loss * asked) / jnp.sum(asked)


def optimiser_of(config: Config) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a warm-up and one cosine."""
    warm = max(1, config.updates // 20)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warm, max(config.updates, warm + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def train(
    task: Task, config: Config, way: str, seed: int, directory: Path, monitor: Monitor
) -> Trained:
    """Train from the start, or from the last checkpoint with `config.resume`.

    Every update draws its examples from the number of the update, so that a run that
    is resumed sees those that it would have seen.
    """
    key = jr.key(seed)
    optimiser = optimiser_of(config)
    model = build(task.model, config, way, jr.fold_in(key, 0))
    moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    state = TrainingState(model, moments, jnp.array(0, jnp.int32))
    losses: list[Any] = []
    checkpoint = directory / f"{way}-{seed}.eqx"
    if config.resume and checkpoint.exists():
        state, losses = _restore(checkpoint, config, state)

    arrays, static = eqx.partition(state, eqx.is_array)

    def update(arrays: PyTree) -> tuple[PyTree, Array]:
        state = eqx.combine(arrays, static)
        data, depth = jr.split(jr.fold_in(jr.fold_in(key, 1), state.done))
        examples = task.sample(data, config.batch_size)
        budget = None
        if config.depth == "random":
            least = (config.steps + 1) // 2
            budget = jr.randint(depth, (), least, config.steps + 1)
        loss, gradient = eqx.filter_value_and_grad(loss_of)(
            state.model, examples, budget
        )
        parameters = eqx.filter(state.model, eqx.is_inexact_array)
        change, moments = optimiser.update(gradient, state.moments, parameters)
        model = eqx.apply_updates(state.model, change)
        new = TrainingState(model, moments, state.done + 1)
        return eqx.filter(new, eqx.is_array), loss

    began = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(arrays).compile()
    compile_seconds = time.perf_counter() - began
    times, last_saved = [], time.perf_counter()
    with monitor.training(config.updates, len(losses)):
        for number in range(len(losses), config.updates):
            began = time.perf_counter()
            arrays, loss = compiled(arrays)
            losses.append(float(loss))
            times.append(time.perf_counter() - began)
            monitor.update(number + 1, losses[-1])
            if time.perf_counter() - last_saved > config.checkpoint_seconds:
                _save(checkpoint, config, eqx.combine(arrays, static), losses)
                last_saved = time.perf_counter()
    state = eqx.combine(arrays, static)
    _save(checkpoint, config, state, losses)
    return Trained(
        state.model,
        np.array(losses),
        float(np.median(times)) if times else float("nan"),
        compile_seconds,
        temporary_memory(compiled),
    )


def temporary_memory(compiled: Any) -> float:
    """Bytes of temporary memory of a compiled program; NaN where it is not told."""
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else float(analysis.temp_size_in_bytes)


def _save(path: Path, config: Config, state: TrainingState, losses: list) -> None:
    """Write a checkpoint that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        head = {"config": json.loads(config.identity()), "losses": losses}
        file.write((json.dumps(head) + "\n").encode())
        eqx.tree_serialise_leaves(file, eqx.filter(state, eqx.is_array))
    os.replace(new, path)


def _restore(
    path: Path, config: Config, like: TrainingState
) -> tuple[TrainingState, list[float]]:
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            same = head["config"] == json.loads(config.identity())
            arrays, static = eqx.partition(like, eqx.is_array)
            if same:
                found = eqx.tree_deserialise_leaves(file, arrays)
                return eqx.combine(found, static), head["losses"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--resume: {path} cannot be read ({reason})") from error
    changed = sorted(
        name
        for name, value in json.loads(config.identity()).items()
        if head["config"].get(name) != value
    )
    raise UsageError(
        f"--resume: the checkpoint {path} comes from a run with other choices of "
        f"{', '.join(changed)}; repeat those of that run, or choose another --output"
    )
