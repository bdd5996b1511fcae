"""Layers whose batch is sharded on explicit axes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import AxisType

import deqjax
from deqjax.nn import (
    DEQ,
    DEQTransformerBlock,
    ForwardBackward,
    LearnedStart,
    MDEQCell,
    MonotoneConv,
    MonotoneDense,
    MonotoneDEQ,
)
from deqjax.nn._deq_transformer import Context
from tests.adjoints.test_mesh import spread
from tests.helpers import error

pytestmark = pytest.mark.optimised

KEY, PICARD = jr.key(0), deqjax.Picard(batch_ndim=1)


def learned():
    cell = lambda z, x, key=None: jnp.tanh(0.5 * z + x)
    return DEQ(cell, start=LearnedStart((3,), batch_ndim=1), solver=PICARD)


CASES = {
    "dense": (lambda: MonotoneDEQ(MonotoneDense(3, 4, key=KEY)), (3,)),
    "forward-backward": (
        lambda: MonotoneDEQ(MonotoneDense(3, 4, key=KEY), splitting=ForwardBackward()),
        (3,),
    ),
    "convolutional": (
        lambda: MonotoneDEQ(MonotoneConv(1, (2,), key=KEY)),
        (1, 4, 4),
    ),
    "learned start": (learned, (3,)),
}


@pytest.mark.parametrize(
    "name",
    ["dense", "learned start"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("forward-backward", "convolutional")
    ],
)
def test_a_batch_on_explicit_axes_is_solved_where_it_is(name):
    make, shape = CASES[name]
    layer, x = make(), jr.normal(KEY, (2, *shape))
    run = jax.jit(lambda x: layer(x))
    want = run(x)
    mesh, rows, _ = spread(AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = run(jax.device_put(x, rows))
    assert error(got, want) <= 1e-6
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)


def test_starts_of_cells_are_sharded_as_their_inputs():
    mesh, rows, _ = spread(AxisType.Explicit)
    scales = eqx.filter_eval_shape(MDEQCell, (2, 2), groups=1, key=KEY)
    words = eqx.filter_eval_shape(DEQTransformerBlock, 4, 2, 4, key=KEY)
    with jax.set_mesh(mesh):
        image = jax.device_put(jnp.ones((2, 2, 4, 4)), rows)
        u = jax.device_put(jnp.ones((2, 3, 12)), rows)
        memory = jax.device_put(jnp.zeros((2, 1, 4)), rows)
        x = Context(u, memory, jnp.array(0, jnp.int32), jnp.ones((3, 4)))
        starts = (scales.initial_state(image), words.initial_state(x))
    shapes = [leaf.shape for leaf in jax.tree.leaves(starts)]
    assert shapes == [(2, 2, 4, 4), (2, 2, 2, 2), (2, 2, 4)]
    for leaf in jax.tree.leaves(starts):
        assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
        assert not leaf.any()
