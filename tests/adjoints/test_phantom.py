"""Phantom gradients against their closed form, and off the fixed point."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax

import deqjax
from tests import helpers
from tests.helpers import dense, error, problem

SETTINGS = {"solver": deqjax.Picard(1e-14, 1e-14), "max_steps": 300}


def loss(p, adjoint, **kwargs):
    return helpers.loss(p, adjoint=adjoint, **{**SETTINGS, **kwargs})


@pytest.mark.parametrize(
    ("kind", "steps", "beta"),
    [("tanh", 1, 1.0), ("tree", 4, 0.5), ("aux", 3, 0.6), ("idle", 12, 0.7)],
)
def test_at_the_fixed_point_it_is_the_damped_series(kind, steps, beta, x64):
    p = problem(kind)
    adjoint = deqjax.PhantomAdjoint(steps, beta)
    got = eqx.filter_jit(eqx.filter_grad(loss(p, adjoint)))(p.args)
    want = dense(p)
    assert error(got, want.by(want.terms(steps, beta))) <= 1e-9
    assert error(got, want.gradient) >= 1e-5


@pytest.mark.parametrize("steps", [3, 10], ids=["unrolled", "loop"])
def test_off_the_fixed_point_it_is_that_of_the_steps(steps, x64):
    p, beta = problem("aux"), 0.6
    z = p.z0
    for _ in range(2):
        z = p.fn(z, p.args)[0]
    # aux is that of the last evaluation, and its gradient that at the answer.
    score = lambda z, aux: jnp.sum(jnp.sin(z)) + aux["energy"]

    def ours(args):
        sol = deqjax.fixed_point(
            p.fn,
            p.z0,
            args,
            has_aux=True,
            solver=deqjax.Picard(None, None),
            adjoint=deqjax.PhantomAdjoint(steps, beta),
            max_steps=2,
        )
        return score(sol.value, sol.aux)

    def reference(args):
        u = z
        for _ in range(steps):
            u = helpers.mix(beta, u, p.fn(u, args)[0])
        here = z + (u - lax.stop_gradient(u))
        return score(here, p.fn(here, args)[1])

    got = jax.jit(jax.grad(ours))(p.args)
    assert error(got, jax.jit(jax.grad(reference))(p.args)) <= 1e-12


def test_the_value_is_that_of_the_solve(x64):
    p = problem("tanh")
    solve = lambda adjoint: (
        deqjax.fixed_point(
            p.fn,
            p.z0,
            p.args,
            solver=deqjax.Picard(None, None),
            adjoint=adjoint,
            max_steps=3,
        ).value
    )
    phantom, plain = solve(deqjax.PhantomAdjoint(4)), solve(deqjax.ImplicitAdjoint())
    assert helpers.identical(phantom, plain)


def test_the_start_has_gradient_zero(x64):
    p = problem("tanh")
    run = loss(p, deqjax.PhantomAdjoint(2), solver=deqjax.Picard(None, None))
    assert not np.any(jax.grad(run, argnums=1)(p.args, p.z0))


def test_a_gradient_that_nobody_takes_costs_nothing():
    p, counter = problem("tanh"), helpers.Counter()
    run = loss(p._replace(fn=counter.wrap(p.fn)), deqjax.PhantomAdjoint(4))
    plain = loss(p._replace(fn=counter.wrap(p.fn)), deqjax.JFBAdjoint())
    jax.jit(plain)(p.args)
    evals = counter.evaluations
    counter.reset()
    jax.jit(run)(p.args)
    assert counter.evaluations == evals
    assert counter.pulls == 0
    counter.reset()
    jax.jit(jax.grad(run))(p.args)
    assert counter.evaluations == evals + 4
    # The first step is pulled back to args alone, past the counter at z.
    assert counter.pulls == 3


def test_gradient_of_the_gradient_takes_the_answer_for_phantom_too(x64):
    # z = a / (1 − b) = s a, undamped: dz/da = s by definition. Then d²z/da db is that
    # of u₂(z, a, b) = a + b a + b² z: 1 + 2 b dz/db... by hand below.
    fn = lambda z, args: args[1] * z + args[0]
    run = lambda a, b: (
        deqjax.fixed_point(
            fn,
            jnp.zeros(()),
            (a, b),
            adjoint=deqjax.PhantomAdjoint(2, 1.0),
            **SETTINGS,
        ).value
    )
    a, b = jnp.array(2.0), jnp.array(0.5)
    z, s = 4.0, 1 + 0.5
    # ∂/∂a: 1 + b. ∂/∂b: a + 2 b z, in which z moves with a by s and with b by z s.
    g_a, g_b = jax.grad(run, (0, 1))(a, b)
    np.testing.assert_allclose([g_a, g_b], [s, 2.0 + 2 * 0.5 * z], rtol=1e-12)
    first = lambda a, b: jax.grad(run, 1)(a, b)
    got = jax.grad(first, (0, 1))(a, b)
    dz = {"a": s, "b": 2.0 + 2 * 0.5 * z}
    want = [1 + 2 * 0.5 * dz["a"], 2 * z + 2 * 0.5 * dz["b"]]
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_forward_mode_is_refused():
    p = problem("tanh")
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(loss(p, deqjax.PhantomAdjoint(2)), (p.args,), (p.args,))


@pytest.mark.parametrize(
    ("args", "words"),
    [((0,), "`num_steps`.*≥ 1.*0"), ((2, 0.0), "`beta`.*0"), ((2, 2.0), "`beta`.*2")],
)
def test_arguments_are_refused_by_name(args, words):
    with pytest.raises(ValueError, match=words):
        deqjax.PhantomAdjoint(*args)
    with pytest.raises(TypeError, match="probe"):
        deqjax.PhantomAdjoint(2, probe=1)


def test_other_problems_than_fixed_points_are_refused():
    with pytest.raises(TypeError, match=r"`PhantomAdjoint`.*fixed-point.*Newton"):
        optx.root_find(
            lambda y, _: y - 1,
            optx.Newton(1e-3, 1e-3),
            jnp.zeros(()),
            adjoint=deqjax.PhantomAdjoint(2),
        )
