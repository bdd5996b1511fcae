"""Units do not matter: iterates at any scale are those at scale 1, times the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax import _tree
from tests import helpers
from tests.helpers import OK, SOLVERS

EXPONENTS = {"float32": (-100, -64, 64, 100), "float64": (-830, -520, 520, 830)}
precisions = pytest.mark.parametrize("dtype", list(EXPONENTS), indirect=True)


def runs(name, dtype, adjoint=None, **kwargs):
    """(scale) -> solution and gradient of an affine problem in units of that scale."""
    p = helpers.problem("linear")
    w, x = (a.astype(dtype) for a in p.args)
    solver = SOLVERS[name](1e-4, 0.0, **kwargs)

    @jax.jit
    def run(unit):
        def solve(x):
            sol = deqjax.fixed_point(
                p.fn, unit * jnp.ones_like(x), (w, x), solver=solver, adjoint=adjoint
            )
            return jnp.sum(sol.value / unit), sol

        gradient, sol = jax.grad(solve, has_aux=True)(unit * x)
        return sol, gradient

    return run


@precisions
@pytest.mark.parametrize("name", SOLVERS)
def test_iterates_are_those_at_scale_one(name, dtype):
    adjoint = deqjax.ShineAdjoint() if name == "broyden" else None
    run = runs(name, dtype, adjoint)
    want, slope = run(jnp.ones((), dtype))
    assert want.result == OK
    assert int(want.stats["num_steps"]) >= 3
    for exponent in EXPONENTS[dtype.name]:
        unit = jnp.ldexp(jnp.ones((), dtype), exponent)
        got, scaled = run(unit)
        assert got.result == OK
        assert got.stats["num_steps"] == want.stats["num_steps"]
        np.testing.assert_array_equal(got.value / unit, want.value)
        for entry in ("residual", "relative_residual"):
            scale = unit if entry == "residual" else 1
            np.testing.assert_allclose(
                got.stats[entry] / scale, want.stats[entry], rtol=1e-5
            )
        np.testing.assert_allclose(scaled * unit, slope, rtol=1e-4)


@precisions
def test_problems_of_a_batch_may_have_scales_of_their_own(dtype):
    p = helpers.batched()
    w, x, gain = (a.astype(dtype) for a in p.args)
    low, high = EXPONENTS[dtype.name][0], EXPONENTS[dtype.name][-1]
    unit = jnp.ldexp(jnp.ones((4, 1), dtype), jnp.array([[0], [low], [high], [0]]))
    fn = lambda z, x: gain * (z @ w) + x
    for kind in (deqjax.Anderson, deqjax.Broyden, deqjax.Picard):
        solver = kind(1e-3, 0.0, batch_ndim=1)

        def solve(x, solver=solver):
            z0 = jnp.zeros_like(x)
            return deqjax.fixed_point(fn, z0, x, solver=solver, max_steps=200)

        want, got = solve(x), solve(unit * x)
        assert got.result == OK
        np.testing.assert_array_equal(got.value / unit, want.value)


@precisions
@pytest.mark.parametrize("batch_ndim", [0, 1])
def test_norms_over_the_whole_range(dtype, batch_ndim):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), dtype)
    norm = jax.jit(lambda x: _tree.norm(x, batch_ndim))
    low, high = jnp.finfo(dtype).minexp + 8, jnp.finfo(dtype).maxexp - 5
    for exponent in (low, low // 2, 0, high // 2, high):
        unit = jnp.ldexp(jnp.ones((), dtype), exponent)
        np.testing.assert_array_equal(norm(unit * x) / unit, norm(x))
    for bad in (jnp.nan, jnp.inf):
        assert not np.all(np.isfinite(norm(x.at[0, 0].set(bad))))
    assert not np.any(norm(0 * x))


def test_a_lane_of_its_own_scale_changes_no_other():
    x = jnp.ones((3, 4)) * jnp.array([[1e-30], [1.0], [1e30]])
    got = jax.jit(jax.vmap(_tree.norm))(x)
    np.testing.assert_allclose(got, [2e-30, 2.0, 2e30], rtol=1e-6)
