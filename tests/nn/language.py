"""A task for small language models, and what trains them on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax

VOCAB, HALF = 7, 4


def copying(key, batch=16):
    """Tokens and targets of sequences whose second half repeats the first."""
    half = jr.randint(key, (batch, HALF), 0, VOCAB)
    whole = jnp.concatenate([half, half], axis=1)
    return whole[:, :-1], whole[:, 1:]


def repeated(nll):
    """The mean over targets of the second half, which can be known."""
    return jnp.mean(nll[:, HALF - 1 :])


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def train(model, loss, steps=120, rate=1e-2):
    """Adam on fresh batches of the copying task; the loss of every step.

    loss: (model, tokens, targets, key) -> scalar
    """
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    moving, fixed = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, key):
        moving, state = carry
        data, drop = jr.split(key)

        def objective(moving):
            return loss(eqx.combine(moving, fixed), *copying(data), drop)

        value, gradient = jax.value_and_grad(objective)(moving)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimiser.update(gradient, state, moving)
        return (optax.apply_updates(moving, updates), state), value

    start = (moving, optimiser.init(moving))
    run = jax.jit(lambda start, keys: lax.scan(step, start, keys))
    (moving, _), losses = run(start, jr.split(jr.key(11), steps))
    return eqx.combine(moving, fixed), losses
