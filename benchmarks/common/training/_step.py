"""The compiled step of training."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._mesh import Placement
from ._optimiser import skipped_steps
from ._precision import cast_linear
from ._state import TrainState

Loss = Callable[[Any, PyTree, PRNGKeyArray], tuple[Array, dict[str, Array]]]


def make_step(
    loss: Loss,
    static: PyTree,
    optimiser: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    dtype: Any = "float32",
    placement: Placement | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Array]]]:
    """A compiled `step(state, batch) -> (state, metrics)`; it consumes its `state`.

    A gradient that is not finite changes neither parameters nor optimiser, and is
    counted. Metrics are those of the loss with `loss`, `grad_norm`, `skipped` (steps
    without a finite gradient so far) and `skipped_in_row`.

    Args:
        loss: `loss(model, batch, key) -> (mean over the batch, metrics)`; metrics are
            scalars, which are averaged over the parts of an accumulated batch.
        static: from `init_state`.
        optimiser: the one that `init_state` was given.
        accumulate: number of parts into which a batch is split; gradients are summed in
            float32, in the memory of one part.
        ema_decay: of the moving average, if the state has one; the average follows
            faster in the first steps.
        dtype: see `cast_linear`.
        placement: on which devices; None: wherever the arrays are.
    """

    def evaluate(
        params: PyTree, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        model = cast_linear(eqx.combine(params, static), dtype)
        value, metrics = loss(model, batch, key)
        return value, {"loss": value, **metrics}

    gradient = jax.grad(evaluate, has_aux=True)
    optimiser = optax.with_extra_args_support(optimiser)

    def summed(
        params: PyTree, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[PyTree, dict[str, Array]]:
        if accumulate == 1:
            return gradient(params, batch, key)
        parts = jtu.tree_map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        keys = jr.split(key, accumulate)
        first = jax.eval_shape(
            gradient, params, jtu.tree_map(lambda x: x[0], parts), key
        )
        zeros = jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            new = gradient(params, *part)
            return jtu.tree_map(jnp.add, total, new), None

        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jtu.tree_map(lambda x: x / accumulate, total)

    if placement is not None:
        summed = placement.mean_over_batch(summed)

    @ft.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        shards = None if placement is None else placement.of_state(state)
        params = state.params if placement is None else placement.gathered(state.params)
        grads, metrics = summed(params, batch, jr.fold_in(state.key, state.step))
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jtu.tree_leaves(grads)))
        updates, opt_state = optimiser.update(
            grads, state.opt_state, state.params, value=metrics["loss"]
        )
        new = optax.apply_updates(state.params, updates)
        average = state.ema
        if average is not None and ema_decay is not None:
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
            average = optax.incremental_update(new, average, 1 - decay)
        state = TrainState(new, opt_state, average, state.step + 1, state.key)
        if shards is not None:
            state = jax.lax.with_sharding_constraint(state, shards)
        total, in_row = skipped_steps(opt_state)
        own = {"grad_norm": norm, "skipped": total, "skipped_in_row": in_row}
        return state, {**metrics, **own}

    return step
