"""Backpropagation through the last steps alone, against the same done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax

import deqjax
from tests import helpers
from tests.helpers import dense, error, problem, weigh

pytestmark = pytest.mark.optimised


def truncated(p, steps, last, extra=False, beta=1.0):
    """(args, z0) -> the loss of z_N, differentiable through the last steps only.

    With `extra`, aux comes from one more evaluation, at z_N.
    """

    def run(args, z0):
        z, aux = z0, None
        for i in range(steps):
            if last < steps and i == steps - last:
                z = lax.stop_gradient(z)
            f, aux = helpers.pair(p)(z, args)
            z = helpers.mix(beta, z, f)
        return weigh((z, helpers.pair(p)(z, args)[1] if extra else aux))

    return run


def gradient(run, argnums=(0, 1)):
    return jax.jit(jax.grad(run, argnums))


def loss(p, last, **kwargs):
    checkpoints = kwargs.pop("checkpoints", None)
    adjoint = deqjax.UnrolledAdjoint(checkpoints, last=last)
    return helpers.loss(p, adjoint=adjoint, **kwargs)


@pytest.mark.parametrize(
    ("kind", "last", "checkpoints"),
    [("aux", 3, None), ("tree", 3, 2), ("tanh", 12, None), ("tanh", 20, None)],
)
def test_static_solve(kind, last, checkpoints, x64):
    p, solver = problem(kind), deqjax.Picard(None, None, beta=0.6)
    run = loss(p, last, solver=solver, max_steps=14, checkpoints=checkpoints)
    want = gradient(truncated(p, 14, last, beta=0.6))(p.args, p.z0)
    got = gradient(run)(p.args, p.z0)
    assert error(got, want) <= 1e-12
    # The start counts where no step is left out, and only there.
    assert bool(np.any(helpers.flat(got[1]))) == (last >= 14)


@pytest.mark.parametrize("last", [1, 4, 60])
def test_tested_solve_differentiates_the_steps_that_led_to_the_answer(last, x64):
    p, solver = problem("aux"), deqjax.Picard(1e-3, 1e-4)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, has_aux=True, solver=solver)
    # One evaluation tests the answer and makes no step.
    steps = int(sol.stats["num_steps"]) - 1
    assert 4 < steps < 60
    got = gradient(loss(p, last, solver=solver))(p.args, p.z0)
    want = gradient(truncated(p, steps, last, extra=True))(p.args, p.z0)
    assert error(got, want) <= 1e-12
    assert np.linalg.norm(helpers.flat(got[0])) > 1e-2


def test_at_the_fixed_point_it_is_the_truncated_series(x64):
    p = problem("tanh")
    run = loss(p, 3, solver=deqjax.Picard(1e-14, 1e-14), max_steps=300)
    ref = dense(p)
    assert error(gradient(run, 0)(p.args, p.z0), ref.by(ref.terms(3, 1.0))) <= 1e-9


def test_lanes_have_windows_of_their_own(x64):
    p = helpers.batched()
    w, x, gain = p.args
    adjoint = deqjax.UnrolledAdjoint(last=4)

    def one(x, gain, z):
        sol = deqjax.fixed_point(
            p.fn, z, (w, x, gain), solver=deqjax.Picard(1e-4, 1e-6), adjoint=adjoint
        )
        return weigh(sol.value)

    # Of 3 steps that led to the answer, and of dozens.
    together = jax.jit(jax.vmap(jax.grad(one)))(x, gain, p.z0)
    alone = jax.jit(jax.grad(one))
    for i in range(4):
        assert error(together[i], alone(x[i], gain[i], p.z0[i])) <= 1e-12


def test_a_budget_moves_the_window(x64):
    p, solver = problem("tanh"), deqjax.Picard(None, None)

    @jax.jit
    def got(args, n):
        options = {"step_budget": n}
        run = loss(p, 2, solver=solver, max_steps=6, options=options)
        return jax.grad(run)(args)

    for n in (1, 4):
        want = gradient(truncated(p, n, 2), 0)(p.args, p.z0)
        assert error(got(p.args, jnp.array(n)), want) <= 1e-12


def test_their_iteration_is_truncated_too(x64):
    p = problem("tanh")
    solver = optx.FixedPointIteration(1e-13, 1e-13)
    run = loss(p, 3, solver=solver, max_steps=300)
    ref = dense(p)
    assert error(gradient(run, 0)(p.args, p.z0), ref.by(ref.terms(3, 1.0))) <= 1e-9


def test_the_memory_is_that_of_the_window():
    n = 2048
    fn = lambda z, a: jnp.tanh(jnp.sin(3.0 * z) * a + z)

    def temporary(steps):
        adjoint = deqjax.UnrolledAdjoint(last=3)

        def run(a):
            sol = deqjax.fixed_point(
                fn,
                jnp.zeros(n),
                a,
                solver=deqjax.Picard(None, None),
                adjoint=adjoint,
                max_steps=steps,
            )
            return jnp.sum(sol.value)

        compiled = jax.jit(jax.grad(run)).lower(jnp.ones(n)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(400) <= temporary(20) + 1024


def test_a_tested_batch_is_refused_by_name():
    p = helpers.batched()
    solver = deqjax.Picard(batch_ndim=1)
    with pytest.raises(ValueError, match=r"`last`.*`batch_ndim=1`.*jax.vmap"):
        loss(p, 2, solver=solver)(p.args)


@pytest.mark.parametrize("last", [0, True])
def test_last_must_be_a_positive_integer(last):
    with pytest.raises(ValueError, match=f"`last`.*{last}"):
        deqjax.UnrolledAdjoint(last=last)
