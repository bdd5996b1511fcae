"""Gradients by running the reversible iteration backwards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, inner, problem, weigh

arithmetics = pytest.mark.parametrize("arithmetic", ["exact"])


def solver(arithmetic, beta=0.5, tol=None, **kwargs):
    return deqjax.Reversible(tol, tol, beta=beta, **kwargs)


def loss(p, solver, **kwargs):
    return helpers.loss(p, solver=solver, **kwargs)


def plain(p, steps, beta=0.5, tested=False):
    """(args, z0) -> the loss of z_N by backpropagation through Python's own loop."""

    def run(args, z0):
        y, z, aux = z0, z0, None
        fn = helpers.pair(p)
        for _ in range(steps):
            y = helpers.mix(beta, y, fn(z, args)[0])
            f, aux = fn(y, args)
            z = helpers.mix(beta, z, f)
        # A tested solve returns the aux of its answer.
        return weigh((z, fn(z, args)[1] if tested else aux))

    return run


def gradient(run, argnums=(0, 1)):
    return jax.jit(jax.grad(run, argnums))


# --- exactness ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arithmetic", "beta", "steps"),
    [
        ("float", 0.5, 3),
        ("float", 0.5, 10),
        ("float", 0.8, 4),
        ("exact", 0.5, 3),
        ("exact", 0.8, 12),
    ],
)
@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_gradient_is_that_of_the_steps_taken(arithmetic, beta, steps, kind, x64):
    p = problem(kind)
    run = loss(p, solver(arithmetic, beta), max_steps=steps)
    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(plain(p, steps, beta))(p.args, p.z0)) <= 1e-9


@arithmetics
@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_tested_solve_has_the_gradient_of_the_steps_taken(arithmetic, kind, x64):
    p = problem(kind)
    s = solver(arithmetic, 0.8, 1e-2)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=s, has_aux=p.has_aux)
    n = int(sol.stats["num_steps"]) - 1
    assert n >= 2
    got = gradient(loss(p, s))(p.args, p.z0)
    want = gradient(plain(p, n, 0.8, tested=True))(p.args, p.z0)
    assert error(got, want) <= 1e-9


@arithmetics
def test_gradient_at_convergence_is_the_dense_one(arithmetic, x64):
    p = problem("tanh")
    steps = {"float": 12, "exact": 60}[arithmetic]
    got = gradient(loss(p, solver(arithmetic), max_steps=steps), 0)(p.args)
    # Of 12 steps only some of the way.
    tol = {"float": 0.3, "exact": 1e-9}[arithmetic]
    assert error(got, helpers.dense(p).gradient) <= tol


def test_gradient_is_that_of_finite_differences(x64):
    p = problem("tree")
    run = loss(p, solver("float"), max_steps=4)
    direction, want = helpers.slope(run, p.args)
    got = inner(gradient(run, 0)(p.args), direction)
    np.testing.assert_allclose(got, want, rtol=1e-8)
    along = lambda z: run(p.args, z)
    direction, want = helpers.slope(along, p.z0)
    got = inner(gradient(along, 0)(p.z0), direction)
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_gradients_reach_modules_and_closures(x64):
    p = problem("tanh")
    w, x = p.args

    class Cell(eqx.Module):
        w: jax.Array

        def __call__(self, z, args):
            return jnp.tanh(z @ self.w + args)

    want = gradient(plain(p, 4), 0)(p.args, p.z0)
    settings = {"solver": solver("float"), "max_steps": 4}
    by_module = lambda w, x: weigh(
        deqjax.fixed_point(Cell(w), p.z0, x, **settings).value
    )
    by_closure = lambda w, x: weigh(
        deqjax.fixed_point(lambda z, _: p.fn(z, (w, x)), p.z0, **settings).value
    )
    for run in (by_module, by_closure):
        assert error(gradient(run)(w, x), want) <= 1e-9


def test_leaves_that_f_does_not_use_have_gradient_zero(x64):
    p = problem("idle")
    run = loss(p, solver("float"), max_steps=9)
    got = eqx.filter_jit(eqx.filter_grad(run))(p.args)
    assert not np.any(got["unused"])
    args, fixed = eqx.partition(p.args, eqx.is_inexact_array)
    reference = lambda a: plain(p, 9)(eqx.combine(a, fixed), p.z0)
    assert error(got, jax.jit(jax.grad(reference))(args)) <= 1e-9


@arithmetics
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_gradients_of_lower_precision(arithmetic, state):
    dtype = jnp.dtype(state)
    p = problem("tanh")
    args = jax.tree.map(lambda x: x.astype(dtype), p.args)
    q = p._replace(z0=p.z0.astype(dtype))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    adjoint = deqjax.ReversibleAdjoint(drift_tol=1.0)
    run = loss(q, solver(arithmetic), max_steps=3, adjoint=adjoint)
    got = gradient(run, 0)(args)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    want = gradient(plain(p, 3), 0)(exact, p.z0)
    assert error(got, want) <= 30 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("steps", [4, 12], ids=["unrolled", "loop"])
def test_a_budget_limits_what_is_differentiated(steps, x64):
    p = problem("tanh")

    @jax.jit
    def got(args, n):
        options = {"step_budget": n}
        run = loss(p, solver("float"), max_steps=steps, options=options)
        return jax.grad(run)(args)

    for n in (2, 3):
        want = gradient(plain(p, n), 0)(p.args, p.z0)
        assert error(got(p.args, jnp.array(n)), want) <= 1e-9


# --- cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 10], ids=["unrolled", "loop"])
def test_each_step_costs_two_evaluations_with_their_pull_backs(steps):
    p, counter = problem("tanh"), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    run = loss(q, solver("float"), max_steps=steps)
    gradient(run, 0)(p.args)
    assert counter.evaluations == 4 * steps
    assert counter.pulls == 2 * steps


def test_nothing_calls_the_host():
    p = problem("tanh")
    for tol, steps in ((None, 3), (1e-3, 20)):
        run = loss(p, solver("float", tol=tol), max_steps=steps)
        text = gradient(run, 0).lower(p.args).compile().as_text()
        assert "callback" not in text


# --- batches --------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [None, 1e-2], ids=["static", "tested"])
def test_batch_ndim_and_vmap_have_the_same_gradient(tol, x64):
    p = helpers.batched()
    whole = loss(p, solver("float", tol=tol, batch_ndim=1), max_steps=9)

    def lanes(args, z0):
        w, x, gain = args
        one = lambda x, gain, z: deqjax.fixed_point(
            p.fn, z, (w, x, gain), solver=solver("float", tol=tol), max_steps=9
        )
        return weigh(jax.vmap(lambda *a: one(*a).value)(x, gain, z0))

    got, want = gradient(whole)(p.args, p.z0), gradient(lanes)(p.args, p.z0)
    assert error(got, want) <= 1e-9
    if tol is None:
        assert error(got, gradient(plain(p, 9))(p.args, p.z0)) <= 1e-9


def test_a_nan_batch_mate_is_never_silent():
    # Its drift is NaN, and the gradient of shared parameters has no part without it.
    p = helpers.batched()
    run = loss(p, solver("float", batch_ndim=1), max_steps=4)
    got = gradient(run, 0)(p.args, p.z0.at[2].set(jnp.nan))
    assert all(np.isnan(x).all() for x in got)


# --- what is refused ------------------------------------------------------------------


def test_forward_mode_is_refused():
    p = problem("tanh")
    run = loss(p, solver("float"), max_steps=2)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (p.args,), (p.args,))


def test_the_probe_must_be_one():
    with pytest.raises(TypeError, match="probe"):
        deqjax.ReversibleAdjoint(probe=3)
