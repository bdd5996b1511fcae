"""GMRES against the dense optimum over the Krylov space."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from deqjax.linear import GMRES
from tests.helpers import error
from tests.linear.systems import optimum, residual, solve, system


def gmres(rtol, atol=0.0, **kwargs):
    """With tolerances that may be traced, so that tests share a compilation."""
    return GMRES(jnp.asarray(rtol), jnp.asarray(atol), **kwargs)


# --- products and accuracy ------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_stops_at_the_first_product_that_meets_the_tolerance(rtol, x64):
    matrix, b = system()
    sol = solve(matrix, b, gmres(rtol))
    assert sol.result == lx.RESULTS.successful
    # One more measures the residual.
    assert int(sol.stats["num_products"]) == optimum(matrix, b, rtol) + 1
    true = residual(matrix, sol.value, b)
    assert true <= rtol
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=1e-3)
    np.testing.assert_allclose(
        sol.stats["residual"], true * np.linalg.norm(b), rtol=1e-3
    )


@pytest.mark.parametrize("spread", [0.5, 0.99, 3.0])
def test_float32_needs_at_most_two_products_more_than_the_optimum(spread):
    matrix, b = system(seed=2, spread=spread)
    sol = solve(matrix, b, gmres(1e-4))
    best = optimum(matrix, b, 1e-4)
    assert best <= int(sol.stats["num_products"]) <= best + 2
    assert residual(matrix, sol.value, b) <= 1.1e-4


def test_products_counted_are_those_made():
    matrix, b = system()
    calls = []

    def product(v):
        jax.debug.callback(lambda _: calls.append(1), v)
        return matrix @ v

    operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: b))
    sol = solve(operator, b, gmres(1e-4))
    jax.effects_barrier()
    # One more linearises a function that is linear, at zero.
    assert int(sol.stats["num_products"]) <= len(calls)
    assert len(calls) <= int(sol.stats["num_products"]) + 1


def test_a_full_space_solves_exactly(x64):
    matrix, b = system(6, spread=3.0)
    sol = solve(matrix, b, gmres(1e-13))
    assert int(sol.stats["num_products"]) <= 6 + 1
    assert error(sol.value, np.linalg.solve(matrix, b)) <= 1e-11


def test_restarts_cost_one_product_each_and_reach_the_tolerance(x64):
    matrix, b = system(30, spread=0.95)
    sol = solve(matrix, b, gmres(1e-8, restart=5))
    assert sol.result == lx.RESULTS.successful
    true = residual(matrix, sol.value, b)
    assert true <= 1e-8
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=1e-3)

    # By hand: cycles of at most 5 products, and one behind each for the residual.
    a, rhs, x, made = np.asarray(matrix), np.asarray(b), np.zeros(30), 0
    while residual(a, x, rhs) > 1.001e-8:
        r = rhs - a @ x
        powers = [np.linalg.matrix_power(a, i) @ r for i in range(5)]
        for k in range(1, 6):
            basis = np.linalg.qr(np.stack(powers[:k], 1))[0]
            y = np.linalg.lstsq(a @ basis, r, rcond=None)[0]
            made += 1
            if residual(a, x + basis @ y, rhs) <= 1e-8:
                break
        x, made = x + basis @ y, made + 1
    assert int(sol.stats["num_products"]) == made
    assert made > optimum(matrix, b, 1e-8)


def test_atol_is_absolute(x64):
    matrix, b = system()
    sol = solve(matrix, 1e3 * b, gmres(0.0, 1e-2))
    best = optimum(matrix, b, 1e-5 / np.linalg.norm(b))
    assert int(sol.stats["num_products"]) == best + 1
    assert float(sol.stats["residual"]) <= 1e-2


@pytest.mark.parametrize(
    ("state", "rtol"),
    [("float32", 1e-5), ("float64", 1e-8), ("bfloat16", 1e-2), ("float16", 1e-2)],
)
def test_default_tolerance_is_by_dtype(state, rtol, x64):
    matrix, b = system(dtype=jnp.float32)
    matrix, b = matrix.astype(state), b.astype(state)
    sol = solve(matrix, b, GMRES())
    assert sol.value.dtype == jnp.dtype(state)
    assert sol.result == lx.RESULTS.successful
    best = optimum(matrix, b, rtol)
    assert best <= int(sol.stats["num_products"]) <= best + 2
    # Products of half precision err by their own precision.
    tol = rtol + 4 * float(jnp.finfo(state).eps) * (jnp.finfo(state).bits == 16)
    assert residual(matrix, sol.value, b) <= 1.01 * tol


# --- right-hand sides -----------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e38])
def test_the_scale_of_the_right_hand_side_does_not_matter(scale):
    matrix, b = system()
    b = b / 10
    plain = solve(matrix, b, gmres(1e-5))
    scaled = solve(matrix, jnp.float32(scale) * b, gmres(1e-5))
    assert scaled.result == lx.RESULTS.successful
    assert int(scaled.stats["num_products"]) == int(plain.stats["num_products"])
    got = np.asarray(scaled.value, np.float64) / scale
    assert error(got, plain.value) <= 1e-4


def test_zero_gives_zero_after_no_product():
    matrix, b = system()
    sol = solve(matrix, 0 * b, gmres(1e-5))
    assert not np.any(sol.value)
    assert int(sol.stats["num_products"]) == 0
    assert float(sol.stats["residual"]) == 0
    assert bool(sol.stats["converged"])
    assert sol.result == lx.RESULTS.successful


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_no_success(bad):
    matrix, b = system()
    sol = solve(matrix, b.at[2].set(bad), gmres(1e-5))
    assert sol.result == lx.RESULTS.nonfinite_input
    assert not bool(sol.stats["converged"])
    assert np.isnan(sol.value).all()
    operator = solve(matrix.at[0, 0].set(bad), b, gmres(1e-5))
    assert operator.result != lx.RESULTS.successful
    assert not bool(operator.stats["converged"])


# --- failures -------------------------------------------------------------------------


def test_a_singular_system_without_solution_breaks_down(x64):
    matrix, b = jnp.diag(jnp.array([1.0, 2.0, 0.0])), jnp.ones(3)
    sol = solve(matrix, b, GMRES())
    assert sol.result == lx.RESULTS.breakdown
    assert not bool(sol.stats["converged"])
    np.testing.assert_allclose(
        sol.stats["residual"], residual(matrix, sol.value, b) * 3**0.5, rtol=1e-6
    )
    assert np.abs(sol.value).max() <= 10


def test_a_singular_system_with_a_solution_is_solved(x64):
    matrix, b = jnp.diag(jnp.array([1.0, 2.0, 0.0])), jnp.array([1.0, 1.0, 0.0])
    sol = solve(matrix, b, gmres(1e-12))
    assert sol.result == lx.RESULTS.successful
    np.testing.assert_allclose(sol.value, [1.0, 0.5, 0.0], atol=1e-12)


def test_most_products_are_respected(x64):
    matrix, b = system()
    sol = solve(matrix, b, gmres(1e-12, max_steps=4))
    assert sol.result == lx.RESULTS.max_steps_reached
    assert int(sol.stats["num_products"]) == 4
    true = residual(matrix, sol.value, b)
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=1e-6)


def test_a_cycle_that_makes_no_progress_ends_the_solve():
    # A cyclic shift: nothing is gained before the dimension is reached.
    n = 8
    matrix, b = jnp.roll(jnp.eye(n), 1, 0), jnp.eye(n)[0]
    sol = solve(matrix, b, gmres(1e-5, restart=3))
    assert sol.result == lx.RESULTS.stagnation
    assert int(sol.stats["num_products"]) <= 2 * 4
    whole = solve(matrix, b, gmres(1e-5))
    assert whole.result == lx.RESULTS.successful
    assert int(whole.stats["num_products"]) == n + 1


# --- options --------------------------------------------------------------------------


def test_a_start_that_solves_costs_one_product(x64):
    matrix, b = system()
    x = jnp.linalg.solve(matrix, b)
    sol = solve(matrix, b, gmres(1e-8), y0=x)
    assert int(sol.stats["num_products"]) == 1
    assert error(sol.value, x) <= 1e-12
    near = solve(matrix, b, gmres(1e-8), y0=x + 1e-5 * b)
    assert residual(matrix, near.value, b) <= 1e-8
    far = solve(matrix, b, gmres(1e-8))
    assert int(near.stats["num_products"]) < int(far.stats["num_products"])


def test_a_perfect_preconditioner_leaves_one_product_and_its_measurement(x64):
    matrix, b = system(spread=3.0)
    inverse = lx.MatrixLinearOperator(jnp.linalg.inv(matrix))
    sol = solve(matrix, b, gmres(1e-8), preconditioner=inverse)
    assert int(sol.stats["num_products"]) == 2
    assert residual(matrix, sol.value, b) <= 1e-8


# --- structure ------------------------------------------------------------------------


def test_pytrees_are_solved_jointly(x64):
    matrix, b = system()
    split = lambda v: {"a": v[:4], "b": (v[4:].reshape(2, 8),)}
    join = lambda t: jnp.concatenate([t["a"], t["b"][0].reshape(-1)])
    operator = lx.FunctionLinearOperator(
        lambda t: split(matrix @ join(t)), jax.eval_shape(lambda: split(b))
    )
    sol = solve(operator, split(b), gmres(1e-10))
    flat = solve(matrix, b, gmres(1e-10))
    assert error(join(sol.value), flat.value) <= 1e-12
    assert int(sol.stats["num_products"]) == int(flat.stats["num_products"])


def test_problems_of_a_batch_are_solved_as_if_alone(x64):
    matrices, bs = zip(
        *(system(20, i, s) for i, s in enumerate((0.1, 0.5, 0.9))), strict=True
    )
    a, b = jnp.stack(matrices), jnp.stack(bs).at[0].mul(1e-12)
    operator = lx.FunctionLinearOperator(
        lambda v: jnp.einsum("bij,bj->bi", a, v), jax.eval_shape(lambda: b)
    )
    whole = solve(operator, b, gmres(1e-6, batch_ndim=1))
    lanes = jax.jit(
        jax.vmap(
            lambda a, b: lx.linear_solve(lx.MatrixLinearOperator(a), b, gmres(1e-6))
        )
    )(a, b)
    assert whole.result == lx.RESULTS.successful
    assert whole.stats["residual"].shape == (3,)
    products = []
    for i in range(3):
        alone = solve(a[i], b[i], gmres(1e-6))
        assert error(whole.value[i], alone.value) <= 1e-10
        assert error(lanes.value[i], alone.value) <= 1e-10
        products.append(int(alone.stats["num_products"]))
    # Products are made for all problems until the last one is done.
    assert len(set(products)) > 1
    assert int(whole.stats["num_products"]) == max(products)
    assert lanes.stats["num_products"].tolist() == 3 * [max(products)]


def test_failed_and_zero_batch_mates_change_nothing(x64):
    matrix, b = system()
    rows = jnp.stack([b, 0 * b, jnp.nan * b, 2 * b])
    operator = lx.FunctionLinearOperator(
        lambda v: v @ matrix.T, jax.eval_shape(lambda: rows)
    )
    sol = solve(operator, rows, gmres(1e-8, batch_ndim=1))
    alone = solve(matrix, b, gmres(1e-8))
    assert error(sol.value[0], alone.value) <= 1e-12
    assert error(sol.value[3], 2 * alone.value) <= 1e-12
    assert not np.any(sol.value[1])
    assert np.isnan(sol.value[2]).all()
    assert sol.stats["converged"].tolist() == [True, True, False, True]
    assert sol.result == lx.RESULTS.nonfinite_input


def test_transposed_and_differentiated_by_lineax(x64):
    matrix, b = system(5)
    run = lambda m, b: jnp.sum(
        jnp.sin(lx.linear_solve(lx.MatrixLinearOperator(m), b, gmres(1e-13)).value)
    )
    dense = lambda m, b: jnp.sum(jnp.sin(jnp.linalg.solve(m, b)))
    got = jax.jit(jax.grad(run, (0, 1)))(matrix, b)
    assert error(got, jax.grad(dense, (0, 1))(matrix, b)) <= 1e-10


def test_lineax_throws_for_failures():
    operator = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 0.0])))
    with pytest.raises(RuntimeError, match="breakdown"):
        lx.linear_solve(operator, jnp.ones(2), GMRES())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rtol": -1.0}, "`rtol`.*-1.0"),
        ({"atol": float("nan")}, "`atol`.*nan"),
        ({"restart": 0}, "`restart`.*≥ 1.*0"),
        ({"max_steps": 0}, "`max_steps`.*≥ 1.*0"),
        ({"batch_ndim": -1}, "`batch_ndim`.*≥ 0.*-1"),
    ],
)
def test_arguments_are_refused_by_name(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GMRES(**kwargs)


def test_operators_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square.*size 3.*size 2"):
        solve(jnp.ones((2, 3)), jnp.ones(2), GMRES())


def test_a_system_that_is_singular_up_to_rounding_is_not_solved_on_paper(x64):
    # By recurrence the residual vanishes, for an x of 1e15 that solves nothing.
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    matrix = jnp.asarray(q @ np.diag([1.0, 0.3, 3e-16]) @ q.T)
    sol = solve(matrix, jnp.ones(3), gmres(1e-9))
    assert sol.result == lx.RESULTS.breakdown
    assert np.abs(sol.value).max() <= 100
    true = residual(matrix, sol.value, np.ones(3)) * 3**0.5
    np.testing.assert_allclose(sol.stats["residual"], true, rtol=1e-6)


def test_a_residual_below_the_rounding_errors_is_computed(x64):
    # κ = 1e8: what can be reached is about 1e-8, the tolerance is below.
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    matrix = jnp.asarray(q @ np.diag([1.0, 0.5, 0.2, 1e-8]) @ q.T)
    sol = solve(matrix, jnp.ones(4), gmres(1e-10))
    true = residual(matrix, sol.value, np.ones(4))
    # Four products, and more to see what they are worth.
    assert int(sol.stats["num_products"]) > 4
    assert true <= float(sol.stats["relative_residual"]) + 1e8 * 2.3e-16


# --- large systems --------------------------------------------------------------------


def large(kind, radius, n=500):
    """I − J of dimension n with spectral radius `radius`; complex spectra, or real."""
    rng = np.random.default_rng(7)
    j = rng.normal(size=(n, n))
    j = j + j.T if kind == "real" else j
    j = radius * j / np.abs(np.linalg.eigvals(j)).max()
    return jnp.asarray(np.eye(n) - j), jnp.asarray(rng.normal(size=n))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "radius"),
    [("complex", 0.5), ("complex", 0.9), ("complex", 0.99), ("real", 0.99)],
)
def test_full_gmres_needs_no_more_than_two_products_above_the_optimum(
    kind, radius, x64
):
    matrix, b = large(kind, radius)
    best = optimum(matrix, b, 1e-6)
    full = solve(matrix, b, gmres(1e-6, restart=200))
    assert best <= int(full.stats["num_products"]) <= best + 2
    assert residual(matrix, full.value, b) <= 1e-6
    # In float32, where the tolerance is near to what there is.
    single = jax.tree.map(lambda a: a.astype("float32"), (matrix, b))
    half = solve(*single, GMRES(1e-5, restart=200))
    best = optimum(matrix, b, 1e-5)
    assert best <= int(half.stats["num_products"]) <= best + 2
    assert residual(matrix, half.value, b) <= 1.1e-5

    restarted = solve(matrix, b, gmres(1e-6))
    assert restarted.result == lx.RESULTS.successful
    true = residual(matrix, restarted.value, b)
    assert true <= 1e-6
    np.testing.assert_allclose(restarted.stats["relative_residual"], true, rtol=1e-3)
    assert int(restarted.stats["num_products"]) >= optimum(matrix, b, 1e-6)
