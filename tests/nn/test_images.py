"""Layers that image models share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deqjax.nn._images import batch_norm, normalise
from tests.helpers import error


class Norm(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self, momentum):
        self.norm = batch_norm(2, momentum=momentum)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_batch_norms_are_right_from_the_first_evaluation(momentum):
    """Running statistics are the weighted means of those of the batches, in NumPy."""
    model, state = eqx.nn.make_with_state(Norm)(momentum)
    quiet = eqx.nn.inference_mode(model)
    train = jax.jit(lambda x, s: normalise(model.norm, x, s))
    test = jax.jit(lambda x, s: normalise(quiet.norm, x, s))
    x = jr.normal(jr.key(9), (3, 2, 4, 4))
    # Before the first update there is nothing to go by: mean 0 and variance 1.
    out, same = test(x, state)
    assert error(out, x / np.sqrt(1 + 1e-5)) <= 1e-6
    assert eqx.tree_equal(same, state)
    means, variances = [], []
    for step in range(3):
        batch = 3 + 0.1 * jr.normal(jr.key(step), (8, 2, 4, 4))
        _, state = train(batch, state)
        a = np.asarray(batch, np.float64)
        means.append(a.mean((0, 2, 3)))
        variances.append(a.var((0, 2, 3)))
        weights = momentum ** np.arange(step, -1, -1)
        mean = np.average(means, axis=0, weights=weights)[:, None, None]
        variance = np.average(variances, axis=0, weights=weights)[:, None, None]
        want = (np.asarray(batch, np.float64) - mean) / np.sqrt(variance + 1e-5)
        out, same = test(batch, state)
        assert error(out, want) <= 1e-4
        assert eqx.tree_equal(same, state)
        # As wide as what a training step normalises to.
        assert abs(float(jnp.std(out)) - 1) <= 0.05
