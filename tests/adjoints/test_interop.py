"""deqjax in optimistix, and optimistix in deqjax."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import OK, SOLVERS, dense, error, problem, weigh

EXACT = deqjax.ImplicitAdjoint(GMRES(1e-13))


def gradient(run, args):
    return jax.jit(jax.grad(run))(args)


# --- deqjax solvers in optimistix -----------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "adjoint",
    [optx.RecursiveCheckpointAdjoint(), optx.ImplicitAdjoint(), EXACT],
    ids=["checkpoints", "implicit", "deqjax"],
)
def test_our_solvers_run_in_optimistix_with_any_adjoint(name, adjoint, x64):
    p = problem("tanh")
    solver = SOLVERS[name](1e-13, 1e-13)

    def run(args):
        sol = optx.fixed_point(p.fn, solver, p.z0, args, max_steps=300, adjoint=adjoint)
        return weigh(sol.value), sol

    args = p.args
    if name == "newton" and isinstance(adjoint, optx.RecursiveCheckpointAdjoint):
        with pytest.raises(RuntimeError, match=r"`NewtonKrylov`.*ImplicitAdjoint"):
            jax.grad(run, has_aux=True)(args)
        return
    got, sol = jax.jit(jax.grad(run, has_aux=True))(args)
    assert sol.result == OK
    assert error(sol.value, helpers.settle(p)) <= 1e-11
    assert error(got, dense(p).gradient) <= 1e-9


def test_their_default_adjoint_takes_our_aux(x64):
    p = problem("aux")
    sol = optx.fixed_point(
        p.fn, deqjax.Picard(1e-10, 1e-10), p.z0, p.args, has_aux=True
    )
    assert error(sol.aux, p.fn(helpers.settle(p), p.args)[1]) <= 1e-8


@pytest.mark.parametrize("name", SOLVERS)
def test_a_static_solve_ends_there_as_they_say(name):
    p = problem("tanh")
    run = lambda adjoint: optx.fixed_point(
        p.fn,
        SOLVERS[name](None, None),
        p.z0,
        p.args,
        max_steps=4,
        throw=False,
        adjoint=adjoint,
    )
    theirs, ours = run(optx.RecursiveCheckpointAdjoint()), run(EXACT)
    assert theirs.result == optx.RESULTS.nonlinear_max_steps_reached
    assert ours.result == OK
    assert error(theirs.value, ours.value) <= 1e-6


def test_reversible_pair_in_optimistix(x64):
    p = problem("tanh")
    solver = deqjax.Reversible(None, None, beta=0.6)

    def run(args):
        sol = optx.fixed_point(
            p.fn,
            solver,
            p.z0,
            args,
            max_steps=4,
            adjoint=deqjax.ReversibleAdjoint(),
        )
        return weigh(sol.value)

    want = lambda a: weigh(helpers.reversible(p.fn, p.z0, a, 4, 0.6))
    assert error(gradient(run, p.args), gradient(want, p.args)) <= 1e-9


# --- their solvers here ---------------------------------------------------------------

THEIRS = optx.FixedPointIteration(1e-13, 1e-13)


@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_their_iteration_runs_here(kind, x64):
    p = problem(kind)
    run = helpers.loss(p, solver=THEIRS, adjoint=EXACT, max_steps=300)
    sol = deqjax.fixed_point(
        p.fn, p.z0, p.args, solver=THEIRS, has_aux=p.has_aux, max_steps=300
    )
    assert sol.result == OK
    assert error(sol.value, helpers.settle(p)) <= 1e-11
    assert error(gradient(run, p.args), dense(p).gradient) <= 1e-9


def test_biased_and_unrolled_gradients_of_their_iteration(x64):
    p = problem("tanh")
    want = dense(p)
    jfb = helpers.loss(p, solver=THEIRS, adjoint=deqjax.JFBAdjoint(), max_steps=300)
    assert error(gradient(jfb, p.args), want.jfb) <= 1e-9
    unrolled = helpers.loss(
        p, solver=THEIRS, adjoint=deqjax.UnrolledAdjoint(), max_steps=300
    )
    assert error(gradient(unrolled, p.args), want.gradient) <= 1e-9


def test_a_budget_limits_their_iteration():
    p = problem("tanh")
    sol = deqjax.fixed_point(
        p.fn, p.z0, p.args, solver=THEIRS, options={"step_budget": 3}
    )
    assert int(sol.stats["num_steps"]) == 3
    assert error(sol.value, helpers.picard(p, 3)[-1]) <= 1e-6


def test_recording_in_their_entry_point_needs_our_solvers():
    p = problem("tanh")
    options = {"record": True}
    with pytest.raises(ValueError, match=r"record.*FixedPointIteration"):
        optx.fixed_point(p.fn, THEIRS, p.z0, p.args, options, adjoint=EXACT)


# --- our adjoint and linear solver for their problems ---------------------------------


def test_our_implicit_adjoint_differentiates_their_root_finds(x64):
    def fn(y, a):
        return y**3 + a * y - 2.0

    def run(a):
        sol = optx.root_find(
            fn, optx.Newton(1e-12, 1e-12), jnp.array(1.0), a, adjoint=EXACT
        )
        return sol.value

    y = float(run(jnp.array(1.5)))
    np.testing.assert_allclose(fn(y, 1.5), 0, atol=1e-12)
    want = -y / (3 * y**2 + 1.5)
    np.testing.assert_allclose(gradient(run, jnp.array(1.5)), want, rtol=1e-10)


def test_our_implicit_adjoint_differentiates_their_minimisations(x64):
    m = jnp.array([[2.0, 0.3], [0.3, 1.0]])

    def run(a):
        sol = optx.minimise(
            lambda y, a: 0.5 * y @ m @ y - a @ y,
            optx.BFGS(1e-10, 1e-10),
            jnp.zeros(2),
            a,
            adjoint=EXACT,
        )
        return sol.value[0]

    got = gradient(run, jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(got, np.linalg.inv(m)[0], rtol=1e-9)


def test_our_linear_solver_serves_their_newton(x64):
    p = problem("tanh")
    solver = optx.Newton(1e-12, 1e-12, linear_solver=GMRES(1e-12))
    sol = optx.root_find(lambda z, a: p.fn(z, a) - z, solver, p.z0, p.args)
    assert error(sol.value, helpers.settle(p)) <= 1e-11
