"""The state of a training run: everything that a checkpoint has to hold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

import deqjax


class TrainState(eqx.Module):
    """What a step of training changes.

    Attributes:
        params: trainable arrays of the model, None elsewhere.
        opt_state: state of the optimiser.
        ema: exponential moving average of `params`; None if it is not kept.
        step: number of steps taken.
        key: fixed; the key of a step is `jr.fold_in(key, step)`.
    """

    params: PyTree
    opt_state: PyTree
    ema: PyTree
    step: Int[Array, ""]
    key: PRNGKeyArray


def init_state(
    model: eqx.Module,
    optimiser: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    ema: bool = False,
) -> tuple[TrainState, PyTree]:
    """The state before the first step, and the part of the model that stays fixed.

    Args:
        model: untrained.
        optimiser: from `make_optimiser`.
        key: decides dropout and whatever else is random in the loss.
        ema: whether an average of the parameters is kept.

    Returns:
        The state, and what `equinox.combine` needs beside `params` to make the model.
    """
    params, static = eqx.partition(model, deqjax.nn.trainable(model))
    opt_state = jax.jit(optimiser.init)(params)
    average = jtu.tree_map(jnp.copy, params) if ema else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, opt_state, average, step, key), static


def best_params(state: TrainState) -> PyTree:
    """The parameters to evaluate: the moving average if there is one."""
    return state.params if state.ema is None else state.ema
