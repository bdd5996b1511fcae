"""Gradients through the iterates, against plain backpropagation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, inner, problem, weigh

UNROLLED = deqjax.UnrolledAdjoint()


def plain(p, steps, beta=1.0):
    """(args, z0) -> the loss of z_N, with the aux of the last evaluation."""

    def run(args, z0):
        z, aux = z0, None
        for _ in range(steps):
            f, aux = helpers.pair(p)(z, args)
            z = helpers.mix(beta, z, f)
        return weigh((z, aux))

    return run


def gradient(run, argnums=(0, 1)):
    return jax.jit(jax.grad(run, argnums))


@pytest.mark.parametrize("kind", ["tree", "aux"])
@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("steps", [3, 10], ids=["unrolled", "loop"])
def test_static_solve_has_the_gradient_of_the_steps_taken(kind, beta, steps, x64):
    p = problem(kind)
    solver = deqjax.Picard(None, None, beta=beta)
    run = helpers.loss(p, solver=solver, adjoint=UNROLLED, max_steps=steps)
    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(plain(p, steps, beta))(p.args, p.z0)) <= 1e-12


@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_tested_solve_has_the_gradient_of_the_steps_taken(kind, x64):
    p = problem(kind)
    settings = {"solver": deqjax.Picard(1e-3, 1e-4), "adjoint": UNROLLED}
    run = helpers.loss(p, **settings)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, has_aux=p.has_aux, **settings)
    n = int(sol.stats["num_steps"])

    def reference(args, z0):
        z = z0
        for _ in range(n - 1):
            z = helpers.pair(p)(z, args)[0]
        # The last evaluation tests z, and gives its aux.
        return weigh((z, helpers.pair(p)(z, args)[1]))

    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(reference)(p.args, p.z0)) <= 1e-12


def test_gradient_is_that_of_finite_differences(x64):
    p = problem("tree")
    solver = deqjax.Picard(None, None)
    run = helpers.loss(p, solver=solver, adjoint=UNROLLED, max_steps=4)
    direction, want = helpers.slope(run, p.args)
    got = inner(gradient(run, 0)(p.args), direction)
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_checkpoints_do_not_change_the_gradient(checkpoints, x64):
    p = problem("tanh")
    adjoint = deqjax.UnrolledAdjoint(checkpoints=checkpoints)
    solver = deqjax.Picard(None, None)
    run = helpers.loss(p, solver=solver, adjoint=adjoint, max_steps=5)
    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(plain(p, 5))(p.args, p.z0)) <= 1e-12


@pytest.mark.parametrize("steps", [3, 10], ids=["unrolled", "loop"])
def test_reversible_solver_may_be_unrolled(steps, x64):
    p = problem("tree")
    solver = deqjax.Reversible(None, None, beta=0.7)
    run = helpers.loss(p, solver=solver, adjoint=UNROLLED, max_steps=steps)
    want = lambda a, z: weigh(helpers.reversible(p.fn, z, a, steps, 0.7))
    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(want)(p.args, p.z0)) <= 1e-12


def test_a_budget_limits_what_is_differentiated(x64):
    p = problem("tanh")
    solver = deqjax.Picard(None, None)

    @jax.jit
    def got(args, n):
        options = {"step_budget": n}
        run = helpers.loss(
            p, solver=solver, adjoint=UNROLLED, max_steps=6, options=options
        )
        return jax.grad(run)(args)

    for n in (2, 4):
        want = gradient(plain(p, n), 0)(p.args, p.z0)
        assert error(got(p.args, jnp.array(n)), want) <= 1e-12


def test_problems_of_a_batch_are_differentiated_as_if_alone(x64):
    p = helpers.batched()
    settings = {"adjoint": UNROLLED, "max_steps": 40}
    whole = deqjax.Picard(1e-4, 1e-6, batch_ndim=1)
    got = gradient(helpers.loss(p, solver=whole, **settings), 1)(p.args, p.z0)

    def lanes(z0):
        w, x, gain = p.args
        one = lambda x, gain, z: deqjax.fixed_point(
            p.fn, z, (w, x, gain), solver=deqjax.Picard(1e-4, 1e-6), **settings
        )
        return weigh(jax.vmap(lambda *a: one(*a).value)(x, gain, z0))

    assert error(got, gradient(lanes, 0)(p.z0)) <= 1e-10
    assert np.linalg.norm(got) > 0


def test_leaves_that_f_does_not_use_have_gradient_zero(x64):
    p = problem("idle")
    solver = deqjax.Picard(None, None)
    run = helpers.loss(p, solver=solver, adjoint=UNROLLED, max_steps=10)
    got = eqx.filter_jit(eqx.filter_grad(run))(p.args)
    assert not np.any(got["unused"])
    args, fixed = eqx.partition(p.args, eqx.is_inexact_array)
    reference = lambda a: plain(p, 10)(eqx.combine(a, fixed), p.z0)
    assert error(got, jax.jit(jax.grad(reference))(args)) <= 1e-12


@pytest.mark.parametrize("checkpoints", [0, -1])
def test_checkpoints_must_be_positive(checkpoints):
    with pytest.raises(ValueError, match=f"`checkpoints`.*{checkpoints}"):
        deqjax.UnrolledAdjoint(checkpoints=checkpoints)
