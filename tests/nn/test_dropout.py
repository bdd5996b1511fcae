"""Dropout whose mask is drawn once per solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax._fold import fold
from deqjax.nn import DEQ, VariationalDropout
from tests.helpers import error

KINDS = {
    "dense": (VariationalDropout.dense, (64, 50), (64, 50)),
    "channels": (VariationalDropout.channels, (8, 200, 3, 2), (8, 200, 1, 1)),
    "tokens": (VariationalDropout.tokens, (8, 5, 200), (8, 1, 200)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_have_the_shape_of_their_kind_and_the_right_rate(kind):
    make, shape, own = KINDS[kind]
    x = 1 + jr.uniform(jr.key(1), shape)
    ratio = np.asarray(make(0.3)(x, key=jr.key(0)) / x)
    kept = ratio > 0
    np.testing.assert_allclose(ratio[kept], 1 / 0.7, rtol=1e-6)
    first = kept[tuple(slice(0, n) for n in own)]
    assert (kept == first).all()
    n = np.prod(own)
    assert abs(first.mean() - 0.7) < 4 * (0.21 / n) ** 0.5
    other = np.asarray(make(0.3)(x, key=jr.key(5))) > 0
    assert (other != kept).any()


def test_dense_dropout_is_that_of_equinox():
    x = jr.normal(jr.key(1), (5, 4))
    want = eqx.nn.Dropout(0.4)(x, key=jr.key(0))
    assert error(VariationalDropout.dense(0.4)(x, key=jr.key(0)), want) == 0


def test_inference_mode_is_that_of_equinox():
    x = jnp.ones(5)
    drop = VariationalDropout(0.5)
    off = eqx.nn.inference_mode(drop)
    np.testing.assert_array_equal(off(x), x)
    np.testing.assert_array_equal(drop(x, inference=True), x)
    np.testing.assert_array_equal(VariationalDropout(0.0)(x), x)
    assert float(jnp.min(off(x, key=jr.key(0), inference=False))) == 0
    with pytest.raises(RuntimeError, match="needs a `key` in training"):
        drop(x)


class Cell(eqx.Module):
    w: jax.Array
    drop: VariationalDropout

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(self.drop(z @ self.w, key=key) + x)


@pytest.mark.parametrize("kind", ["dense", "tokens"])
def test_one_mask_serves_a_solve_and_is_drawn_outside_of_its_loop(kind):
    make, _, _ = KINDS[kind]
    cell = Cell(0.3 * jr.normal(jr.key(0), (6, 6)), make(0.5))
    x, key = jr.normal(jr.key(1), (2, 4, 6)), jr.key(2)
    z = DEQ(cell, solver=deqjax.Picard(1e-6, 1e-6))(x, key=key)
    assert error(cell(z, x, key=key), z) <= 1e-5
    assert error(cell(z, x, key=jr.key(3)), z) >= 1e-2
    call = lambda z, args: args[0](z, args[1], key=args[2])
    rest, kept, _ = fold(call, z, (cell, x, key))
    names = {e.primitive.name for e in jax.make_jaxpr(rest)(z, kept).eqns}
    assert not {n for n in names if "random" in n or "threefry" in n}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VariationalDropout(1.0), "`p`.*1.0"),
        (lambda: VariationalDropout(0.1, share=(1,)), "from the end.*1"),
        (
            lambda: VariationalDropout.tokens(0.1)(jnp.ones(3), key=jr.key(0)),
            r"`share`.*\(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
