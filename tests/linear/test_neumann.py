"""The Neumann series against its closed form."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from deqjax.linear import Neumann
from tests.helpers import error
from tests.linear.systems import residual, solve, system


def neumann(rtol, atol=0.0, beta=1.0, **kwargs):
    """With numbers that may be traced, so that tests share a compilation."""
    rtol, atol, beta = (jnp.asarray(x) for x in (rtol, atol, beta))
    return Neumann(rtol, atol, beta=beta, **kwargs)


def terms(matrix, b, count, beta=1.0):
    """β Σ_{t<k} (I − βA)ᵗ b for k = 1, …, count, in NumPy."""
    a, term = np.asarray(matrix, np.float64), beta * np.asarray(b, np.float64)
    total, out = np.zeros_like(term), []
    for _ in range(count):
        total = total + term
        term = term - beta * (a @ term)
        out.append(total)
    return out


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_stops_at_the_first_product_that_meets_the_tolerance(rtol, beta, x64):
    matrix, b = system(spread=0.8)
    sol = solve(matrix, b, neumann(rtol, beta=beta))
    sums = terms(matrix, b, 200, beta)
    first = next(i for i, x in enumerate(sums) if residual(matrix, x, b) <= rtol)
    # The product that tests the sum of i + 1 terms is number i + 1.
    assert sol.result == lx.RESULTS.successful
    assert int(sol.stats["num_products"]) == first + 1
    assert error(sol.value, sums[first]) <= 1e-12
    true = residual(matrix, sol.value, b)
    np.testing.assert_allclose(sol.stats["relative_residual"], true, rtol=1e-6)
    size = true * np.linalg.norm(b)
    np.testing.assert_allclose(sol.stats["residual"], size, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_a_fixed_number_of_terms(count, x64):
    matrix, b = system(spread=0.8)
    sol = solve(matrix, b, Neumann(num_terms=count, beta=0.6))
    assert error(sol.value, terms(matrix, b, count, 0.6)[-1]) <= 1e-13
    assert int(sol.stats["num_products"]) == count - 1
    # Nothing is tested, so nothing is claimed.
    assert not {"residual", "relative_residual", "converged"} & set(sol.stats)
    assert sol.result == lx.RESULTS.successful


def test_damping_reaches_what_the_plain_series_does_not(x64):
    # Eigenvalues of J at ±2i and −1.5: beyond the circle until they are damped.
    j = jnp.array([[0.0, 2.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, -1.5]])
    matrix, b = jnp.eye(3) - j, jnp.ones(3)
    damped = solve(matrix, b, neumann(1e-6, beta=0.3))
    assert damped.result == lx.RESULTS.successful
    assert error(damped.value, np.linalg.solve(matrix, b)) <= 3e-6
    plain = solve(matrix, b, neumann(1e-6))
    assert plain.result == lx.RESULTS.max_steps_reached
    assert int(plain.stats["num_products"]) == 200
    # The best of what was seen: nothing is better than 0.
    assert not np.any(plain.value)
    np.testing.assert_allclose(plain.stats["relative_residual"], 1.0, rtol=1e-12)


def test_what_leaves_the_range_is_a_breakdown():
    matrix, b = 1e30 * jnp.eye(3), jnp.ones(3)
    sol = solve(matrix, b, neumann(1e-5))
    assert sol.result == lx.RESULTS.breakdown
    assert not bool(sol.stats["converged"])
    assert np.isfinite(sol.value).all()


def test_a_batch_is_solved_as_if_alone_whatever_its_mates_are(x64):
    matrices, bs = zip(
        *(system(20, i, s) for i, s in enumerate((0.1, 0.5, 0.8))), strict=True
    )
    a, b = jnp.stack([*matrices, *matrices[:2]]), jnp.stack([*bs, *bs[:2]])
    b = b.at[0].mul(1e-12).at[3].set(0.0).at[4].set(jnp.nan)
    operator = lx.FunctionLinearOperator(
        lambda v: jnp.einsum("bij,bj->bi", a, v), jax.eval_shape(lambda: b)
    )
    whole = solve(operator, b, neumann(1e-6, batch_ndim=1))
    products = []
    for i in range(3):
        alone = solve(a[i], b[i], neumann(1e-6))
        assert error(whole.value[i], alone.value) <= 1e-13
        products.append(int(alone.stats["num_products"]))
    assert len(set(products)) == 3
    assert int(whole.stats["num_products"]) == max(products)
    assert not np.any(whole.value[3])
    assert np.isnan(whole.value[4]).all()
    assert whole.stats["converged"].tolist() == [True, True, True, True, False]
    assert whole.result == lx.RESULTS.nonfinite_input


def test_zero_gives_zero_after_no_product():
    matrix, b = system(spread=0.8)
    sol = solve(matrix, 0 * b, neumann(1e-5))
    assert not np.any(sol.value)
    assert int(sol.stats["num_products"]) == 0
    assert sol.result == lx.RESULTS.successful


def test_start_and_preconditioner(x64):
    matrix, b = system(spread=0.8)
    x = jnp.linalg.solve(matrix, b)
    warm = solve(matrix, b, neumann(1e-8), y0=x)
    assert int(warm.stats["num_products"]) == 1
    assert error(warm.value, x) <= 1e-14
    lost = solve(matrix, b, neumann(1e-8), y0=jnp.nan * x)
    assert error(lost.value, x) <= 1e-7
    wild = 50.0 * matrix
    inverse = lx.MatrixLinearOperator(jnp.linalg.inv(wild))
    sol = solve(wild, b, neumann(1e-8), preconditioner=inverse)
    assert int(sol.stats["num_products"]) == 1
    assert residual(wild, sol.value, b) <= 1e-12


def test_pytrees_of_half_precision_are_solved_in_float32():
    matrix, b = system(spread=0.5)
    half = matrix.astype(jnp.bfloat16)
    split = lambda v: {"a": v[:4], "b": (v[4:].reshape(2, 8),)}
    join = lambda t: jnp.concatenate([t["a"], t["b"][0].reshape(-1)])
    rhs = split(b.astype(jnp.bfloat16))
    operator = lx.FunctionLinearOperator(
        lambda t: split(half @ join(t)), jax.eval_shape(lambda: rhs)
    )
    sol = solve(operator, rhs, Neumann())
    assert sol.result == lx.RESULTS.successful
    assert sol.value["a"].dtype == jnp.bfloat16
    assert residual(half.astype(jnp.float32), join(sol.value), join(rhs)) <= 2e-2


def test_transposed_by_lineax(x64):
    matrix, b = system(5, spread=0.5)
    run = lambda m, b: jnp.sum(
        jnp.sin(lx.linear_solve(lx.MatrixLinearOperator(m), b, neumann(1e-13)).value)
    )
    dense = lambda m, b: jnp.sum(jnp.sin(jnp.linalg.solve(m, b)))
    got = jax.jit(jax.grad(run, (0, 1)))(matrix, b)
    assert error(got, jax.grad(dense, (0, 1))(matrix, b)) <= 1e-10


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rtol": -1.0}, "`rtol`.*-1.0"),
        ({"beta": 2.0}, "`beta`.*2"),
        ({"max_steps": 0}, "`max_steps`.*≥ 1.*0"),
        ({"num_terms": 0}, "`num_terms`.*≥ 1.*0"),
        ({"batch_ndim": -1}, "`batch_ndim`.*≥ 0.*-1"),
    ],
)
def test_arguments_are_refused_by_name(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Neumann(**kwargs)


def test_operators_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`Neumann`.*square.*size 3.*size 2"):
        solve(jnp.ones((2, 3)), jnp.ones(2), Neumann())
    with pytest.raises(TypeError, match="`Neumann`.*real.*complex64"):
        solve(jnp.eye(2, dtype=complex), jnp.ones(2, complex), Neumann())
