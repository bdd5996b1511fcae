"""The reversible iteration: its algebra, and what it returns."""

import functools as ft

import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import OK, error, problem

pytestmark = pytest.mark.optimised

Float = ft.partial(deqjax.Reversible)
betas = pytest.mark.parametrize("beta", [0.5, 0.8])


def solve(p, solver, **kwargs):
    return deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, **kwargs)


@betas
@pytest.mark.parametrize("steps", [1, 8, 11], ids=["one", "unrolled", "loop"])
def test_static_solve_returns_the_last_iterate(beta, steps, x64):
    p = problem("tree")
    sol = solve(p, Float(None, None, beta=beta), max_steps=steps)
    y = z = p.z0
    for _ in range(steps):
        y = helpers.mix(beta, y, p.fn(z, p.args))
        z = helpers.mix(beta, z, p.fn(y, p.args))
    assert error(sol.value, z) <= 1e-14
    # y_N is the iterate that was evaluated last.
    f = helpers.flat(p.fn(y, p.args))
    r = np.linalg.norm(f - helpers.flat(y))
    np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-9)
    np.testing.assert_allclose(
        sol.stats["relative_residual"], r / np.linalg.norm(f), rtol=1e-9
    )


@betas
def test_tested_solve_stops_at_the_first_iterate_that_passes(beta, x64):
    p = problem("tree")
    sol = solve(p, Float(1e-5, 1e-7, beta=beta), max_steps=100)
    y = z = p.z0
    n = 0
    while True:
        f = p.fn(z, p.args)
        r = np.linalg.norm(helpers.flat(f) - helpers.flat(z))
        if r <= 1e-7 + 1e-5 * np.linalg.norm(helpers.flat(f)):
            break
        y = helpers.mix(beta, y, f)
        z = helpers.mix(beta, z, p.fn(y, p.args))
        n += 1
    assert int(sol.stats["num_steps"]) == n + 1
    assert int(sol.stats["num_evals"]) == 2 * n + 1
    assert error(sol.value, z) <= 1e-13


def test_converges_for_a_map_that_plain_iteration_cycles_on(x64):
    # f(z) = c − z has Lipschitz constant 1; for the coupled scheme with β = 1/2 the
    # eigenvalues of a step are those of [[1/2, −1/2], [−1/4, 3/4]], below 1 but for
    # the invariant y − z of the linear map itself.
    matrix = np.array([[0.5, -0.5], [-0.25, 0.75]])
    rate = max(abs(np.linalg.eigvals(matrix)))
    fn = lambda z, c: c - z
    c = jnp.array([1.0, 3.0])
    sol = deqjax.fixed_point(
        fn, jnp.zeros(2), c, solver=Float(None, None, beta=0.5), max_steps=20
    )
    assert error(sol.value, c / 2) <= 2 * rate**20


@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_beta_must_be_below_one(beta):
    with pytest.raises(ValueError, match=rf"`beta`.*in \(0, 1\).*{beta}"):
        deqjax.Reversible(beta=beta)


def test_aux_of_a_static_solve_is_that_of_the_last_evaluation(x64):
    p = problem("aux")
    plain = lambda z, a: p.fn(z, a)[0]
    sol = solve(p, Float(None, None), max_steps=3, has_aux=True)
    y = z = p.z0
    for _ in range(3):
        y = helpers.mix(0.5, y, plain(z, p.args))
        z = helpers.mix(0.5, z, plain(y, p.args))
    assert error(sol.aux, p.fn(y, p.args)[1]) <= 1e-14
    assert sol.result == OK
