"""Published sizes: one training step, within the memory that docs/api/nn.md states."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deqjax import nn
from tests.nn.training import QUICK

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "api" / "nn.md"
ROW = r"\| `{}` \| (\d+) \| [\d.]+ \| (\d+) \|"


def documented(name):
    """The batch and the megabytes of temporary memory that the table states."""
    batch, megabytes = re.search(ROW.format(name), PAGE.read_text("utf-8")).groups()
    return int(batch), int(megabytes)


def training_step(make, shape, stateful, keyed):
    """A compiled step and what to call it with."""
    init = eqx.nn.make_with_state(make) if stateful else make
    made = eqx.filter_jit(lambda key: init(key=key))(QUICK)
    model, state = made if stateful else (made, None)
    arrays, static = eqx.partition((model, state), eqx.is_array)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def loss(model, state, x):
        if not stateful:
            return jnp.mean(model(x) ** 2)
        key = {"key": jr.key(1)} if keyed else {}
        return jnp.mean(model(x, state, **key)[0] ** 2)

    def step(arrays, x):
        model, state = eqx.combine(arrays, static)
        value, gradient = eqx.filter_value_and_grad(loss)(model, state, x)
        return value, eqx.filter(gradient, eqx.is_array)

    return jax.jit(step).lower(arrays, x).compile(), (arrays, x)


@pytest.mark.parametrize(
    ("name", "shape", "keyed"),
    [
        ("MDEQClassifier.cifar10_tiny", (3, 32, 32), True),
        ("ImplicitResNet.cifar10", (3, 32, 32), True),
        ("RevDEQClassifier.cifar10_single", (3, 32, 32), False),
        ("MonotoneClassifier.mnist_dense", (784,), False),
        ("MonotoneClassifier.cifar10_tiers", (3, 32, 32), False),
    ],
)
def test_a_step_stays_within_its_memory(name, shape, keyed):
    kind, constructor = name.split(".")
    batch, megabytes = documented(name)
    make = getattr(getattr(nn, kind), constructor)
    stateful = kind != "MonotoneClassifier"
    compiled, inputs = training_step(make, (batch, *shape), stateful, keyed)
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * megabytes * 2**20
    if constructor in ("cifar10_single", "mnist_dense"):
        value, gradient = compiled(*inputs)
        assert np.isfinite(value)
        leaves = jax.tree.leaves(gradient)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
