"""Linear algebra on pytrees of independent problems."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deqjax import _tree


def _leaves(seed=0):
    k1, k2 = jr.split(jr.key(seed))
    return {"a": jr.normal(k1, (2, 3)), "b": (jr.normal(k2, (2, 2, 2)),)}


def _rows(tree):
    """A tree of `_leaves` as one matrix with a row per problem."""
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(2, -1) for x in jax.tree.leaves(tree)], 1
    )


def test_dot_and_norm_are_taken_per_problem():
    x, y = _leaves(0), _leaves(1)
    want = np.sum(_rows(x) * _rows(y), 1)
    np.testing.assert_allclose(_tree.dot(x, y, 1), want, rtol=1e-5)
    np.testing.assert_allclose(_tree.dot(x, y), want.sum(), rtol=1e-5)
    sizes = np.linalg.norm(_rows(x), axis=1)
    np.testing.assert_allclose(_tree.norm(x, 1), sizes, rtol=1e-6)
    np.testing.assert_allclose(_tree.norm(x), np.linalg.norm(sizes), rtol=1e-6)


def test_reductions_of_half_precision_accumulate_in_float32():
    # In bfloat16 a sum of ones stops at 256; in float16 the squares overflow.
    ones = jnp.ones(4096, jnp.bfloat16)
    large = jnp.full(4, 1e3, jnp.float16)
    assert _tree.dot(ones, ones).dtype == jnp.float32
    assert float(_tree.norm(ones)) == 64.0
    assert float(_tree.norm(large)) == 2000.0
    assert _tree.subtract(ones, ones).dtype == jnp.float32


def test_leaves_of_different_dtypes_combine_in_the_widest(x64):
    x = {
        "h": jnp.ones(3, jnp.bfloat16),
        "s": 2 * jnp.ones(1, jnp.float32),
        "d": 3 * jnp.ones(1, jnp.float64),
    }
    assert _tree.dot(x, x).dtype == jnp.float64
    assert float(_tree.dot(x, x)) == 3 + 4 + 9
    assert _tree.max_abs(x).dtype == jnp.float64
    assert float(_tree.max_abs(x)) == 3.0


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_wide_is_at_least_float32(given, want):
    assert _tree.wide(given) == jnp.dtype(want)


def test_max_abs_shows_nan_and_takes_empty_leaves_for_zero():
    x = {"a": jnp.array([[1.0, -3.0], [2.0, jnp.nan]]), "e": jnp.zeros((2, 0))}
    np.testing.assert_array_equal(_tree.max_abs(x, 1), [3.0, np.nan])
    assert float(_tree.max_abs(jnp.zeros((0,)))) == 0.0


def test_all_finite_is_per_problem():
    x = {"a": jnp.array([[1.0], [jnp.inf], [1.0]]), "b": jnp.array([1.0, 1.0, jnp.nan])}
    np.testing.assert_array_equal(_tree.all_finite(x, 1), [True, False, False])
    assert not bool(_tree.all_finite(x))


def test_where_and_scale_act_per_problem_and_keep_dtypes():
    x = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2)}
    y = _tree.zeros_like(x)
    picked = _tree.where(jnp.array([True, False]), x, y)
    np.testing.assert_array_equal(picked["a"].astype(jnp.float32), [[1] * 3, [0] * 3])
    np.testing.assert_array_equal(picked["b"], [1, 0])
    scaled = _tree.scale(jnp.array([2.0, 3.0]), x)
    assert scaled["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled["a"].astype(jnp.float32), [[2] * 3, [3] * 3])
    np.testing.assert_array_equal(scaled["b"], [2, 3])


def test_where_does_not_let_nan_through():
    x, y = jnp.array([[1.0], [2.0]]), jnp.array([[jnp.nan], [5.0]])
    picked = _tree.where(jnp.array([True, False]), x, y)
    np.testing.assert_array_equal(picked, [[1.0], [5.0]])


def test_zeros_like_takes_structs():
    struct = jax.eval_shape(lambda: {"a": jnp.ones((2, 1), jnp.bfloat16), "b": None})
    zeros = _tree.zeros_like(struct)
    assert zeros["a"].shape == (2, 1)
    assert zeros["a"].dtype == jnp.bfloat16
    assert not zeros["a"].astype(bool).any()


def test_batch_shape_is_what_all_leaves_share():
    x = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3))}
    assert _tree.batch_shape(x, 0) == ()
    assert _tree.batch_shape(x, 2) == (2, 3)
    assert _tree.batch_shape({}, 1) == ()


@pytest.mark.parametrize("other", [(3, 2), ()], ids=["other axes", "too few axes"])
def test_batch_shape_names_the_leaf_that_disagrees(other):
    x = {"first": jnp.ones((2, 3)), "second": jnp.ones(other)}
    with pytest.raises(ValueError, match=r"batch_ndim=1.*'second'"):
        _tree.batch_shape(x, 1)


def test_magnitudes_are_powers_of_two_by_which_to_scale():
    entries = [3.4e38, 1.0, -3.0, 2e-38, 1.2e-38, 1e-40, 0.0, np.inf, np.nan]
    x = jnp.array(entries, jnp.float32)[:, None]
    unit = jax.jit(lambda x: _tree.magnitude(x, 1))(x)
    assert (np.frexp(unit)[0] == 0.5).all()
    assert unit[5:].tolist() == [1, 1, 1, 1]
    # By the reciprocal, which must not be flushed to 0, and exactly.
    scaled = jax.jit(lambda x, unit: _tree.scale(1 / unit, x))(x, unit)[:5]
    assert ((np.abs(scaled) >= 1) & (np.abs(scaled) < 4)).all()
    assert (scaled * unit[:5, None] == x[:5]).all()
