"""States so small that their squares are lost."""

import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import deqjax
from tests import helpers

SOLVERS = {
    "picard": deqjax.Picard,
    "anderson": deqjax.Anderson,
    "broyden": deqjax.Broyden,
    "newton": deqjax.NewtonKrylov,
    "reversible": deqjax.Reversible,
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [1e-11, 1e-22, 1e-30])
def test_a_start_far_below_the_resolution_of_norms_is_no_answer(name, scale):
    """z* = scale (1, 2, …): converged where that is found, never elsewhere."""
    want = scale * jnp.arange(1.0, 5.0)
    solver = SOLVERS[name](rtol=1e-4, atol=0.0)
    fn = lambda z, b: 0.5 * z + 0.5 * b
    run = jax.jit(
        lambda b: deqjax.fixed_point(fn, jnp.zeros(4), b, solver=solver, max_steps=80)
    )
    sol = run(want)
    if scale >= 1e-11:
        assert bool(sol.stats["converged"])
    if bool(sol.stats["converged"]):
        # In units that float64 can square.
        assert helpers.error(sol.value / scale, want / scale) <= 1e-3
    else:
        assert sol.result != optx.RESULTS.successful


def test_zero_is_an_answer_within_an_absolute_tolerance():
    solver = deqjax.Picard(rtol=1e-4, atol=1e-6)
    sol = deqjax.fixed_point(lambda z, _: 0.5 * z, jnp.zeros(4), solver=solver)
    assert bool(sol.stats["converged"])
