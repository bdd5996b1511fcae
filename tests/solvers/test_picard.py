"""Picard iteration: its iterates, and which of them is returned."""

import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, problem

betas = pytest.mark.parametrize("beta", [1.0, 0.6, 1.3])


def solve(p, solver, **kwargs):
    return deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, **kwargs)


@betas
@pytest.mark.parametrize("steps", [1, 5, 11])
def test_static_solve_returns_the_last_iterate(beta, steps, x64):
    p = problem("tree")
    sol = solve(p, deqjax.Picard(None, None, beta=beta), max_steps=steps)
    *_, before, last = helpers.picard(p, steps, beta)
    assert error(sol.value, last) <= 1e-14
    # The residual is that of the iterate evaluated last.
    f = helpers.flat(p.fn(before, p.args))
    r = np.linalg.norm(f - helpers.flat(before))
    np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-9)
    np.testing.assert_allclose(
        sol.stats["relative_residual"], r / np.linalg.norm(f), rtol=1e-9
    )


@betas
def test_tested_solve_stops_at_the_first_iterate_that_passes(beta, x64):
    p = problem("tree")
    sol = solve(p, deqjax.Picard(1e-5, 1e-7, beta=beta), max_steps=100)
    iterates = helpers.picard(p, 60, beta)

    def passes(z):
        f = helpers.flat(p.fn(z, p.args))
        r = np.linalg.norm(f - helpers.flat(z))
        return r <= 1e-7 + 1e-5 * np.linalg.norm(f)

    first = next(i for i, z in enumerate(iterates) if passes(z))
    assert int(sol.stats["num_steps"]) == first + 1
    assert error(sol.value, iterates[first]) <= 1e-13


@pytest.mark.parametrize("steps", [6, 7])
def test_best_iterate_of_a_cycle_is_returned(steps):
    # z ↦ −z + 2 sign-flips about 1 with a push: residuals 2, 1, 4, 8, ... by hand.
    targets = jnp.array([2.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0, 255.0])
    starts = jnp.array([0.0, 2.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])

    def fn(z, _):
        return targets[jnp.argmin(jnp.abs(starts - z))]

    z0 = jnp.array(0.0)
    sol = deqjax.fixed_point(fn, z0, solver=deqjax.Picard(1e-6, 0.0), max_steps=steps)
    assert float(sol.value) == 2.0
    assert float(sol.stats["residual"]) == 1.0
    assert int(sol.stats["num_steps"]) == steps


def test_damping_converges_where_the_plain_iteration_does_not(x64):
    fn = lambda z, _: -1.5 * z + 5
    plain = deqjax.fixed_point(fn, jnp.zeros(1), solver=deqjax.Picard(1e-8, 0.0))
    assert not bool(plain.stats["converged"])
    damped = deqjax.Picard(1e-8, 0.0, beta=0.4)
    sol = deqjax.fixed_point(fn, jnp.zeros(1), solver=damped)
    # 1 − β + βμ = 0: one step leads there, one more evaluation tests it.
    assert int(sol.stats["num_steps"]) == 2
    assert abs(float(sol.value[0]) - 2) <= 1e-14


def test_beta_may_be_an_array():
    p = problem("tanh")
    want = solve(p, deqjax.Picard(None, None, beta=0.6), max_steps=5)
    sol = solve(p, deqjax.Picard(None, None, beta=jnp.array(0.6)), max_steps=5)
    assert error(sol.value, want.value) <= 1e-6


def test_beta_keeps_the_dtype_of_half_precision_states():
    z0 = jnp.ones(3, jnp.bfloat16)
    fn = lambda z, _: (0.5 * z).astype(z.dtype)
    solver = deqjax.Picard(None, None, beta=jnp.array(0.5))
    sol = deqjax.fixed_point(fn, z0, solver=solver, max_steps=2)
    assert sol.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sol.value.astype(jnp.float32), [0.5625] * 3)
