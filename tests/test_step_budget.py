"""A budget of steps for every problem of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, weigh

P = helpers.batched()
BUDGETS = jnp.array([1, 5, 3, 8])
NEWTON = deqjax.NewtonKrylov
UNROLLED, REVERSIBLE = deqjax.UnrolledAdjoint(), deqjax.ReversibleAdjoint()
STATIC = {
    "picard": (deqjax.Picard(None, None, batch_ndim=1), UNROLLED),
    "reversible": (deqjax.Reversible(None, None, batch_ndim=1), REVERSIBLE),
    "reversible, unrolled": (deqjax.Reversible(None, None, batch_ndim=1), UNROLLED),
    "anderson": (deqjax.Anderson(None, None, batch_ndim=1), UNROLLED),
}
TESTED = {
    "picard, tested": (deqjax.Picard(1e-2, 1e-3, batch_ndim=1), None),
    "reversible, tested": (deqjax.Reversible(1e-2, 1e-3, batch_ndim=1), REVERSIBLE),
    "anderson, tested": (deqjax.Anderson(1e-2, 1e-3, batch_ndim=1), None),
    "broyden, tested": (deqjax.Broyden(1e-2, 1e-3, batch_ndim=1), None),
    "newton, tested": (NEWTON(1e-2, 1e-3, batch_ndim=1), None),
}
CASES = STATIC | TESTED


def solve(args, name, budget, max_steps=8, **kwargs):
    solver, adjoint = CASES[name]
    options = {"step_budget": budget}
    return deqjax.fixed_point(
        P.fn,
        P.z0,
        args,
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        options=options,
        **kwargs,
    )


@pytest.mark.parametrize("name", CASES)
def test_every_problem_has_its_own_budget(name):
    """As in four solves, each with one of the budgets for all."""
    run = jax.jit(lambda budget: solve(P.args, name, budget))
    got = run(BUDGETS)
    for i, budget in enumerate(BUDGETS):
        want = run(jnp.full(4, budget))
        np.testing.assert_allclose(got.value[i], want.value[i], rtol=2e-5, atol=1e-6)
        for statistic in ("num_steps", "converged"):
            assert got.stats[statistic][i] == want.stats[statistic][i]
        one, all_ = got.stats["residual"][i], want.stats["residual"][i]
        np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-6)
    assert run._cache_size() == 1
    # A single number is the same budget for all.
    equal = jax.jit(lambda budget: solve(P.args, name, budget))(jnp.array(5))
    want = run(jnp.full(4, 5))
    np.testing.assert_allclose(equal.value, want.value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["picard", "reversible", "reversible, unrolled"])
def test_gradients_are_those_of_the_steps_of_each_problem(name, x64):
    p = helpers.batched()
    solver, adjoint = CASES[name]

    def ours(args):
        sol = deqjax.fixed_point(
            p.fn,
            p.z0,
            args,
            solver=solver,
            adjoint=adjoint,
            max_steps=8,
            options={"step_budget": BUDGETS},
        )
        return weigh(sol.value)

    def textbook(args):
        y = z = p.z0
        for n in range(8):
            going = (n < BUDGETS)[:, None]
            if name == "picard":
                z = jnp.where(going, p.fn(z, args), z)
            else:
                y = jnp.where(going, helpers.mix(0.5, y, p.fn(z, args)), y)
                z = jnp.where(going, helpers.mix(0.5, z, p.fn(y, args)), z)
        return weigh(z)

    got, want = (jax.jit(jax.value_and_grad(f))(p.args) for f in (ours, textbook))
    assert error(got, want) <= 1e-12


def test_a_budget_of_no_steps_returns_the_start():
    budget = jnp.array([0, 2, 0, 4])
    sol = jax.jit(lambda a: solve(a, "reversible", budget))(P.args)
    np.testing.assert_array_equal(sol.value[0], P.z0[0])
    np.testing.assert_array_equal(sol.stats["num_steps"], budget)
    assert bool(jnp.all(sol.value[1] != P.z0[1]))


@pytest.mark.parametrize(
    ("name", "budget", "kwargs", "words"),
    [
        ("picard", jnp.ones(3, int), {}, r"shape \(4,\).*got the shape \(3,\)"),
        ("picard", 2.0, {}, "must be an integer"),
        ("picard", BUDGETS, {"has_aux": True}, "one budget"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(name, budget, kwargs, words):
    with pytest.raises(ValueError, match=words):
        solve(P.args, name, budget, **kwargs)


def test_a_cut_gradient_has_one_budget():
    with pytest.raises(ValueError, match="`last` cuts off"):
        deqjax.fixed_point(
            P.fn,
            P.z0,
            P.args,
            solver=deqjax.Picard(None, None, batch_ndim=1),
            adjoint=deqjax.UnrolledAdjoint(last=2),
            options={"step_budget": BUDGETS},
        )
