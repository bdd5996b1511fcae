"""A task for small language models, and what trains them on it."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from tests.nn import training

VOCAB, HALF = 7, 4


def copying(key, batch=16):
    """Tokens and targets of sequences whose second half repeats the first."""
    half = jr.randint(key, (batch, HALF), 0, VOCAB)
    whole = jnp.concatenate([half, half], axis=1)
    return whole[:, :-1], whole[:, 1:]


def repeated(nll):
    """The mean over targets of the second half, which can be known."""
    return jnp.mean(nll[:, HALF - 1 :])


def train(model, loss, steps=120, rate=1e-2, jit=eqx.filter_jit):
    """Fresh batches of the copying task in every step; the model and its losses.

    loss: (model, tokens, targets, key) -> scalar
    """

    def step(model, key):
        key, data, drop = jr.split(key, 3)
        objective = lambda model: loss(model, *copying(data), drop)
        value, gradient = eqx.filter_value_and_grad(objective)(model)
        return (value, (key,)), gradient

    trained, _, losses = training.train(model, step, steps, rate, jit)((jr.key(11),))
    return trained, losses
