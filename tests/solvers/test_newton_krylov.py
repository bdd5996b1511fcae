"""NewtonKrylov: its steps, its searches, what they cost and how they end."""

import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import OK, dense, error, problem

RESULTS = optx.RESULTS


def solve(fn, z0, args=None, max_steps=64, record=False, **kwargs):
    return deqjax.fixed_point(
        fn,
        z0,
        args,
        solver=deqjax.NewtonKrylov(**kwargs),
        max_steps=max_steps,
        options={"record": record},
    )


# --- convergence ----------------------------------------------------------------------


def test_with_exact_solves_it_is_newtons_method(x64):
    p = problem("tree")
    tight = GMRES(1e-14)
    sol = solve(*p[:3], rtol=0.0, atol=1e-12, linear_solver=tight, record=True)
    n = int(sol.stats["num_steps"])
    flat, back = jax.flatten_util.ravel_pytree(p.z0)
    f = lambda z: jax.flatten_util.ravel_pytree(p.fn(back(z), p.args))[0]
    jacobian = jax.jit(jax.jacfwd(f))
    want, z = [], flat
    for _ in range(n):
        r = np.asarray(f(z) - z)
        want.append(np.linalg.norm(r))
        z = z + np.linalg.solve(np.eye(len(r)) - np.asarray(jacobian(z)), r)
    history = np.asarray(sol.stats["residual_history"])[:n]
    np.testing.assert_allclose(history, want, rtol=1e-6, atol=1e-13)
    # Quadratic: r_{k+1} ≤ C r_k² with one C.
    assert np.all(history[1:-1] <= 3 * history[:-2] ** 2)
    assert n <= 7


def test_inexact_solves_take_fewer_products_for_the_same_answer(x64):
    p = problem("tanh", 24)
    p = p._replace(args=(1.3 * p.args[0], p.args[1]))
    loose = solve(*p[:3], rtol=1e-8, atol=1e-9)
    tight = solve(*p[:3], rtol=1e-8, atol=1e-9, linear_solver=GMRES(1e-10))
    for sol in (loose, tight):
        assert sol.result == OK
        assert error(sol.value, helpers.settle(p)) <= 1e-7
    assert int(loose.stats["num_products"]) <= 0.6 * int(tight.stats["num_products"])
    assert int(loose.stats["num_steps"]) <= int(tight.stats["num_steps"]) + 2


def test_forcing_terms_are_those_of_eisenstat_and_walker(x64):
    # Along the iterates, ‖r_{k+1}‖ is at most about η_k ‖r_k‖.
    p = problem("tanh", 24)
    sol = solve(*p[:3], rtol=1e-10, atol=1e-12, record=True)
    history = np.asarray(sol.stats["residual_history"])[: int(sol.stats["num_steps"])]
    eta = 0.1
    for before, after in itertools.pairwise(history):
        enough = 0.5 * (1e-12 + 1e-10 * np.linalg.norm(sol.value)) / before
        assert after <= max(eta, enough) * before + before**2
        ratio, guard = 0.9 * (after / before) ** 2, 0.9 * eta**2
        eta = max(ratio, guard) if guard > 0.1 else ratio


def test_a_stiff_implicit_step(x64):
    # Backward Euler for y' = −λ (y³ − ½) − Σ y: f expands by up to 3 hλ ≈ 2e4.
    rate = jnp.logspace(0, 6, 5)
    y0, h = jnp.ones(5), 0.01
    fn = lambda y, rate: y0 - h * (rate * (y**3 - 0.5) + jnp.sum(y))
    sol = solve(fn, y0, rate, rtol=1e-10, atol=1e-12)
    assert sol.result == OK
    z, k = np.array(sol.value) + 1e-3, np.asarray(rate)
    for _ in range(20):
        jacobian = -h * (np.diag(3 * k * z**2) + 1)
        r = 1 - h * (k * (z**3 - 0.5) + np.sum(z)) - z
        z = z + np.linalg.solve(np.eye(5) - jacobian, r)
    assert error(sol.value, z) <= 1e-9


# --- the search -----------------------------------------------------------------------


def test_a_search_converges_where_plain_newton_diverges(x64):
    fn = lambda z, _: z - jnp.arctan(z)
    z = 3.0
    for _ in range(5):  # Plain Newton's method leaves for infinity.
        z = z - np.arctan(z) * (1 + z * z)
    assert abs(z) > 1e6
    sol = solve(fn, jnp.array(3.0), rtol=0.0, atol=1e-10, record=True)
    assert sol.result == OK
    assert abs(float(sol.value)) <= 1e-10
    # The first trial is that of Newton's method, and is not taken.
    history = np.asarray(sol.stats["residual_history"])
    first = 3 - np.arctan(3.0) * 10
    np.testing.assert_allclose(history[1], np.arctan(abs(first)), rtol=1e-12)
    assert history[1] > history[0] > history[2]
    # A trial that is not taken costs no product.
    assert int(sol.stats["num_products"]) < int(sol.stats["num_steps"]) - 1


def test_a_search_comes_back_from_where_f_is_not_finite(x64):
    # log z + 1 + z = z at 1/e; Newton's first trial from 5 is negative.
    fn = lambda z, _: jnp.log(z) + 1 + z
    sol = solve(fn, jnp.array([5.0, 0.5]), rtol=1e-9, atol=1e-9, record=True)
    assert np.isnan(sol.stats["residual_history"][1])
    assert sol.result == OK
    np.testing.assert_allclose(sol.value, np.exp(-1.0), rtol=1e-8)


def test_searches_of_a_batch_are_apart(x64):
    fn = lambda z, a: z - jnp.arctan(z - a)
    z0 = jnp.array([[0.1], [3.0], [jnp.nan], [20.0]])
    a = jnp.array([[0.0], [0.5], [0.0], [-1.0]])
    sol = solve(fn, z0, a, rtol=1e-9, atol=1e-9, batch_ndim=1)
    assert sol.result == RESULTS.nonfinite
    assert list(np.asarray(sol.stats["converged"])) == [True, True, False, True]
    steps = np.asarray(sol.stats["num_steps"])
    assert len(set(steps)) == 4
    for i in (0, 1, 3):
        alone = solve(fn, z0[i], a[i], rtol=1e-9, atol=1e-9)
        assert int(alone.stats["num_steps"]) == steps[i]
        np.testing.assert_allclose(sol.value[i], alone.value, rtol=1e-12)
        np.testing.assert_allclose(sol.value[i], a[i], atol=1e-8)


@pytest.mark.parametrize(
    "fn",
    [lambda z, _: z + 1, lambda z, _: z**2 + 1, lambda z, _: z + jnp.abs(z) + 1],
    ids=["singular", "minimum", "kink"],
)
def test_without_a_fixed_point_it_ends_visibly(fn):
    z0 = jnp.array([0.3, -0.7])
    sol = solve(fn, z0, max_steps=40)
    assert sol.result in (RESULTS.nonlinear_max_steps_reached, RESULTS.nonfinite)
    assert not bool(sol.stats["converged"])
    # Never worse than the start, and what is reported is true.
    r = np.linalg.norm(fn(sol.value, None) - sol.value)
    np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-5)
    assert r <= np.linalg.norm(fn(z0, None) - z0)


def test_a_singular_jacobian_is_left_by_a_picard_step(x64):
    # I − J = 0 at the start, and f(z) − z = 1 there.
    fn = lambda z, _: z + 1 - z**2
    sol = solve(fn, jnp.zeros(1), rtol=0.0, atol=1e-10)
    assert sol.result == OK
    np.testing.assert_allclose(sol.value, 1, atol=1e-9)


# --- costs ----------------------------------------------------------------------------


def test_products_and_evaluations_are_counted():
    p, products, evaluations = problem("tanh", 6), [], []

    @jax.custom_jvp
    def seen(z):
        return z

    @seen.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda _: products.append(1), tangents[0])
        return primals[0], tangents[0]

    def fn(z, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return p.fn(seen(z), args)

    sol = solve(fn, p.z0, p.args, rtol=1e-5, atol=1e-6)
    jax.effects_barrier()
    assert sol.result == OK
    assert int(sol.stats["num_evals"]) == len(evaluations) == sol.stats["num_steps"]
    assert int(sol.stats["num_products"]) == len(products) > 0


def test_any_lineax_solver_may_solve_the_systems(x64):
    p = problem("tree")
    want = helpers.settle(p)
    for linear in (lx.LU(), lx.GMRES(1e-8, 1e-8)):
        sol = solve(*p[:3], rtol=1e-10, atol=1e-12, linear_solver=linear)
        assert sol.result == OK
        assert error(sol.value, want) <= 1e-9
        assert "num_products" not in sol.stats


def test_the_implicit_gradient_is_exact(x64):
    p = problem("tanh")
    run = helpers.loss(
        p,
        solver=deqjax.NewtonKrylov(1e-13, 1e-13),
        adjoint=deqjax.ImplicitAdjoint(GMRES(1e-13)),
    )
    gradient = jax.jit(jax.grad(run))
    assert error(gradient(p.args), dense(p).gradient) <= 1e-10


def test_its_steps_cannot_be_unrolled():
    p = problem("tanh")
    run = helpers.loss(
        p, solver=deqjax.NewtonKrylov(), adjoint=deqjax.UnrolledAdjoint()
    )
    assert np.isfinite(run(p.args))
    with pytest.raises(RuntimeError, match=r"`NewtonKrylov`.*ImplicitAdjoint"):
        jax.grad(run)(p.args)


# --- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"linear_solver": GMRES(), "batch_ndim": 1}, "`linear_solver`.*0 and 1"),
        ({"rtol": None}, "`rtol` and `atol` must both"),
        ({"min_steps": -1}, "`min_steps`.*-1"),
    ],
)
def test_arguments_are_refused_by_name(kwargs, words):
    with pytest.raises(ValueError, match=words):
        deqjax.NewtonKrylov(**kwargs)
