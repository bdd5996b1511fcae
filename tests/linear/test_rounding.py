"""What is claimed where A is singular, x large, b near the ends of the range."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from deqjax.linear import GMRES, Neumann
from tests.helpers import error
from tests.linear.systems import residual, solve, system


def batched(matrices, like):
    a = jnp.asarray(matrices)
    product = lambda v: jnp.einsum("bij,bj->bi", a, v)
    return lx.FunctionLinearOperator(product, jax.eval_shape(lambda: like))


def shifted(shift, n):
    """shift I − N with N nilpotent: an inverse of about shift⁻ⁿ."""
    return shift * np.eye(n) - np.diag(np.ones(n - 1), 1)


def test_an_exactly_singular_system_is_not_solved():
    nothing, nilpotent = np.zeros((3, 3)), np.diag(np.ones(2), 1)
    matrices = np.stack([nothing, np.diag([1.0, 0.0, 0.0]), nilpotent, np.eye(3)])
    b = jnp.array([[1.0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 2, 3]])
    sol = solve(batched(matrices.astype("float32"), b), b, GMRES(batch_ndim=1))
    assert sol.result == lx.RESULTS.breakdown
    assert sol.stats["converged"].tolist() == [False, False, False, True]
    assert sol.stats["relative_residual"].tolist()[:3] == [1, 1, 1]
    assert not np.any(sol.value[:3])
    assert error(sol.value[3], b[3]) <= 1e-6
    alone = solve(jnp.zeros((3, 3)), jnp.ones(3), GMRES())
    assert alone.result == lx.RESULTS.breakdown


@pytest.mark.parametrize("restart", [40, 20])
def test_an_ill_conditioned_system_claims_what_it_has_reached(restart):
    # Rounding errors leave residuals of 1e-7 κ, whatever the recurrence says.
    rng = np.random.default_rng(0)
    n, smallest = 40, [1e-6, 1e-5, 1e-3, 0.1]
    matrices = []
    for least in smallest:
        q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        spectrum = np.r_[least, np.linspace(0.5, 1.5, n - 1)]
        matrices.append(np.asarray(q * spectrum @ q.T, np.float32))
    b = jnp.asarray(rng.normal(size=(4, n)), jnp.float32)
    sol = solve(batched(matrices, b), b, GMRES(restart=restart, batch_ndim=1))
    true = np.array(
        [residual(*args) for args in zip(matrices, sol.value, b, strict=True)]
    )
    claimed, converged = sol.stats["relative_residual"], sol.stats["converged"]
    assert (true <= 2 * np.asarray(claimed)).all()
    assert (true[np.asarray(converged)] <= 1.5e-5).all()
    assert converged.tolist() == [False, False, True, True]
    assert sol.result == lx.RESULTS.stagnation
    # What could be had was had: each within ε ‖A‖ ‖x‖.
    sizes = np.linalg.norm(sol.value, axis=1) / np.linalg.norm(b, axis=1)
    assert (true <= np.maximum(1.5e-5, 1.2e-7 * 1.5 * sizes)).all()


def test_a_large_solution_is_not_taken_for_an_exact_one(x64):
    matrix, b = shifted(0.3, 24), np.random.default_rng(0).normal(size=24)
    sol = solve(jnp.asarray(matrix), jnp.asarray(b), GMRES())
    true = residual(matrix, sol.value, b)
    assert true > 1e-8  # Or there would be nothing to see here.
    assert not bool(sol.stats["converged"])
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=0.1)


@pytest.mark.parametrize("restart", [60, 20])
def test_nothing_worse_than_zero_is_returned(restart, x64):
    # In exact arithmetic x is of 1e60; its rounding errors would be of 1e44.
    matrix, b = shifted(0.1, 60), np.random.default_rng(0).normal(size=60)
    sol = solve(jnp.asarray(matrix), jnp.asarray(b), GMRES(restart=restart))
    assert not bool(sol.stats["converged"])
    true = residual(matrix, sol.value, b)
    assert true < 1
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=1e-6)


@pytest.mark.parametrize("solver", [GMRES(), Neumann()], ids=["gmres", "neumann"])
def test_a_start_that_is_worse_than_zero_costs_one_product(solver):
    matrix, b = system(6, spread=0.7)
    plain = solve(matrix, b, solver)
    wave = jnp.cos(jnp.arange(6.0))
    for scale in (1e3, 1e12, 3e38):
        sol = solve(matrix, b, solver, y0=jnp.float32(scale) * wave)
        assert sol.result == lx.RESULTS.successful
        assert error(sol.value, plain.value) <= 1e-6
        more = int(sol.stats["num_products"]) - int(plain.stats["num_products"])
        assert more == 1


def test_a_bad_start_of_one_problem_leaves_the_others_theirs(x64):
    matrix, b = system(6, spread=0.7)
    exact = jnp.linalg.solve(matrix, b)
    rows = jnp.stack([b, b, b])
    starts = jnp.stack([exact, 1e9 * exact, exact + 1e-6 * b])
    operator = batched(jnp.stack(3 * [matrix]), rows)
    sol = solve(operator, rows, GMRES(1e-4, batch_ndim=1), y0=starts)
    assert error(sol.value[0], exact) <= 1e-15
    assert error(sol.value[2], starts[2]) <= 1e-15
    alone = solve(matrix, b, GMRES(1e-4))
    assert error(sol.value[1], alone.value) <= 1e-12


@pytest.mark.parametrize("solver", [GMRES(), Neumann()], ids=["gmres", "neumann"])
@pytest.mark.parametrize(
    ("entry", "a"), [(3.4e38, 1.5), (1e38, 0.5), (2e-38, 0.5), (1.2e-38, 0.75)]
)
def test_right_hand_sides_at_the_ends_of_the_range(solver, entry, a):
    # From 8.6e37 on XLA flushes the reciprocal of the norm to 0.
    b = jnp.full(2, entry, jnp.float32)
    sol = solve(a * jnp.eye(2), b, solver)
    assert bool(sol.stats["converged"])
    got = np.asarray(sol.value, np.float64) / entry
    np.testing.assert_allclose(got, 1 / a, rtol=2e-5)
    start = solve(a * jnp.eye(2), b, solver, y0=b / a)
    assert int(start.stats["num_products"]) == 1


def test_a_solution_beyond_the_range_is_no_success():
    sol = solve(0.5 * jnp.eye(2), jnp.full(2, 3e38, jnp.float32), GMRES())
    assert np.isinf(sol.value).all()
    assert sol.result == lx.RESULTS.breakdown
    assert not bool(sol.stats["converged"])
    assert np.isinf(sol.stats["relative_residual"])
