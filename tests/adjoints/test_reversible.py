"""Gradients by running the reversible iteration backwards."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.experimental import io_callback

import deqjax
from tests import helpers
from tests.helpers import error, inner, problem, weigh, weights

pytestmark = pytest.mark.optimised


def solver(beta=0.5, tol=None, **kwargs):
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


@pytest.mark.parametrize(("beta", "steps"), [(0.5, 3), (0.5, 10), (0.8, 12)])
@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_gradient_is_that_of_the_steps_taken(beta, steps, kind, x64):
    p = problem(kind)
    run = loss(p, solver(beta), max_steps=steps)
    got = gradient(run)(p.args, p.z0)
    assert error(got, gradient(plain(p, steps, beta))(p.args, p.z0)) <= 1e-9


@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_tested_solve_has_the_gradient_of_the_steps_taken(kind, x64):
    p = problem(kind)
    s = solver(0.8, 1e-2)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=s, has_aux=p.has_aux)
    n = int(sol.stats["num_steps"]) - 1
    assert n >= 2
    got = gradient(loss(p, s))(p.args, p.z0)
    want = gradient(plain(p, n, 0.8, tested=True))(p.args, p.z0)
    assert error(got, want) <= 1e-9


def test_gradient_at_convergence_is_the_dense_one(x64):
    p = problem("tanh")
    got = gradient(loss(p, solver(), max_steps=60), 0)(p.args)
    assert error(got, helpers.dense(p).gradient) <= 1e-9


def test_gradient_is_that_of_finite_differences(x64):
    p = problem("tree")
    run = loss(p, solver(), max_steps=4)
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
    settings = {"solver": solver(), "max_steps": 4}
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
    run = loss(p, solver(), max_steps=9)
    got = eqx.filter_jit(eqx.filter_grad(run))(p.args)
    assert not np.any(got["unused"])
    args, fixed = eqx.partition(p.args, eqx.is_inexact_array)
    reference = lambda a: plain(p, 9)(eqx.combine(a, fixed), p.z0)
    assert error(got, jax.jit(jax.grad(reference))(args)) <= 1e-9


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_gradients_of_lower_precision(state):
    dtype = jnp.dtype(state)
    p = problem("tanh")
    args = jax.tree.map(lambda x: x.astype(dtype), p.args)
    q = p._replace(z0=p.z0.astype(dtype))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    run = loss(q, solver(), max_steps=3)
    got = gradient(run, 0)(args)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    want = gradient(plain(p, 3), 0)(exact, p.z0)
    assert error(got, want) <= 30 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("steps", [4, 12])
def test_a_budget_limits_what_is_differentiated(steps, x64):
    p = problem("tanh")

    @jax.jit
    def got(args, n):
        options = {"step_budget": n}
        run = loss(p, solver(), max_steps=steps, options=options)
        return jax.grad(run)(args)

    for n in (2, 3):
        want = gradient(plain(p, n), 0)(p.args, p.z0)
        assert error(got(p.args, jnp.array(n)), want) <= 1e-9


# --- cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 10])
def test_each_step_costs_two_evaluations_with_their_pull_backs(steps):
    p, counter = problem("tanh"), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    run = loss(q, solver(), max_steps=steps)
    gradient(run, 0)(p.args)
    assert counter.evaluations == 4 * steps
    assert counter.pulls == 2 * steps


def test_nothing_calls_the_host():
    p = problem("tanh")
    for tol, steps in ((None, 3), (1e-3, 20)):
        run = loss(p, solver(tol=tol), max_steps=steps)
        text = gradient(run, 0).lower(p.args).compile().as_text()
        assert "callback" not in text


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_per_step_is_that_of_the_record(bits):
    (w, x), z0 = small(64, "float32")

    def temp(steps):
        loss = lambda a: weigh(value(damped, z0, a, 0.5, steps, record_bits=bits))
        compiled = jax.jit(jax.grad(loss)).lower((w, x)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The exponents of the rows are 4 of 2 bytes per evaluation.
    per_step = (temp(96) - temp(32)) / 64 / z0.nbytes
    assert per_step == pytest.approx(2 * bits / 32, abs=0.03)


# --- batches --------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [None, 1e-2], ids=["static", "tested"])
def test_batch_ndim_and_vmap_have_the_same_gradient(tol, x64):
    p = helpers.batched()
    whole = loss(p, solver(tol=tol, batch_ndim=1), max_steps=9)

    def lanes(args, z0):
        w, x, gain = args
        one = lambda x, gain, z: deqjax.fixed_point(
            p.fn, z, (w, x, gain), solver=solver(tol=tol), max_steps=9
        )
        return weigh(jax.vmap(lambda *a: one(*a).value)(x, gain, z0))

    got, want = gradient(whole)(p.args, p.z0), gradient(lanes)(p.args, p.z0)
    assert error(got, want) <= 1e-9
    if tol is None:
        assert error(got, gradient(plain(p, 9))(p.args, p.z0)) <= 1e-9


def test_a_nan_batch_mate_is_never_silent():
    # Its drift is NaN, and the gradient of shared parameters has no part without it.
    p = helpers.batched()
    run = loss(p, solver(batch_ndim=1), max_steps=4)
    got = gradient(run, 0)(p.args, p.z0.at[2].set(jnp.nan))
    assert all(np.isnan(x).all() for x in got)


# --- weights, second derivatives, auxiliary outputs -----------------------------------


def small(width=8, dtype="float64"):
    """(args, z0) of `damped`."""
    w, x = (
        weights(jr.key(0), width, dtype, 0.9),
        jr.normal(jr.key(1), (4, width), dtype),
    )
    return (w, x), 0.1 * x[::-1]


def damped(z, args):
    return jnp.tanh(0.5 * z + 0.3 * z @ args[0] + args[1])


def value(fn, z0, args, beta, steps, probe=None, **settings):
    adjoint = deqjax.ReversibleAdjoint(probe=probe, **settings)
    return deqjax.fixed_point(
        fn, z0, args, solver=solver(beta), adjoint=adjoint, max_steps=steps
    ).value


def plain_value(fn, z0, args, beta, steps):
    """z_N by backpropagation through the two lines of the method."""
    y, z = z0, z0
    for _ in range(steps):
        y = helpers.mix(beta, y, fn(z, args))
        z = helpers.mix(beta, z, fn(y, args))
    return z


def test_a_weight_for_every_channel_and_its_gradient(x64):
    args, z0 = small(16)
    beta = jnp.linspace(0.3, 0.9, 16)
    run = lambda f: jax.grad(lambda b: weigh(f(damped, z0, args, b, 8)))
    assert error(run(value)(beta), run(plain_value)(beta)) <= 1e-12


def test_second_derivatives(x64):
    (w, x), z0 = small(4)

    def penalty(f):
        inner = jax.grad(lambda x: weigh(f(damped, z0, (w, x), 0.6, 5)))
        return lambda x: jnp.sum(inner(x) ** 2)

    t = jnp.ones_like(x)
    got = jax.jit(jax.grad(penalty(value)))(x)
    assert error(got, jax.grad(penalty(plain_value))(x)) <= 1e-12
    forward = lambda f: jax.jvp(jax.grad(penalty(f)), (x,), (t,))[1]
    assert error(forward(value), forward(plain_value)) <= 1e-12


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_aux_and_budgets(tol, x64):
    (w, x), z0 = small(4)
    fn = lambda z, x: (damped(z, (w, x)), jnp.sum(z**2 * x))
    solver = deqjax.Reversible(tol, tol, beta=0.6)

    def loss(x, n):
        options = {"step_budget": n}
        settings = {"solver": solver, "max_steps": 5, "options": options}
        return deqjax.fixed_point(fn, z0, x, has_aux=True, **settings).aux

    def wanted(x, n):
        taken = n if tol is None else max(n - 1, 0)
        y, z = z0, z0
        for _ in range(taken):
            y = 0.4 * y + 0.6 * damped(z, (w, x))
            z = 0.4 * z + 0.6 * damped(y, (w, x))
        return jnp.sum((y if tol is None else z) ** 2 * x)

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(
        x, jnp.arange(6)
    )
    for n in range(6):
        value, gradient = jax.value_and_grad(wanted)(x, n)
        assert error(values[n], value) <= 1e-12
        assert error(gradients[n], gradient) <= 1e-12


# --- noise --------------------------------------------------------------------------


def test_noise_is_always_noticed():
    args, z0 = small(16, "float32")
    count = [0]

    def draw():
        count[0] += 1
        return np.float32(1e-3 * np.sin(count[0]))

    def fn(z, a):
        noise = io_callback(draw, jax.ShapeDtypeStruct((), jnp.float32))
        return damped(z, a) + jax.lax.stop_gradient(noise)

    loss = lambda a, p: weigh(value(fn, z0, a, 0.5, 6, p))
    run = jax.jit(jax.grad(loss, (0, 1)))
    for _ in range(100):
        gradient, stats = run(args, deqjax.BackwardStats())
        assert float(stats.drift) > 0
        assert all(np.isnan(g).all() for g in gradient)
    loss = lambda a: weigh(value(fn, z0, a, 0.5, 6, on_drift="recompute"))
    want = jax.grad(lambda a: weigh(plain_value(damped, z0, a, 0.5, 6)))(args)
    assert error(jax.jit(jax.grad(loss))(args), want) <= 1e-2
    loss = lambda a: weigh(value(fn, z0, a, 0.5, 6, on_drift="raise"))
    with pytest.raises(RuntimeError, match="not undone exactly"):
        jax.block_until_ready(jax.jit(jax.grad(loss))(args))


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [lambda run, x: jax.jvp(run, (x,), (x,)), lambda run, x: jax.jacfwd(run)(x)],
    ids=["jvp", "jacfwd"],
)
def test_forward_mode_is_refused_with_what_to_use(transform):
    p = problem("tanh")
    run = loss(p, solver(), max_steps=2)
    with pytest.raises(TypeError, match=r"reverse mode.*ImplicitAdjoint\(\)"):
        transform(run, p.args)


def test_the_probe_must_be_one():
    with pytest.raises(TypeError, match="probe"):
        deqjax.ReversibleAdjoint(probe=3)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ft.partial(deqjax.Reversible, arithmetic="exact"), "arithmetic"),
        (ft.partial(deqjax.ReversibleAdjoint, anchors=2), "anchors"),
        (ft.partial(deqjax.ReversibleAdjoint, record_bits=5), "record_bits"),
        (ft.partial(deqjax.ReversibleAdjoint, drift_tol=-1.0), "drift_tol"),
        (ft.partial(deqjax.Reversible, beta=jnp.array(2)), "beta"),
        (ft.partial(deqjax.Reversible, beta=jnp.array([0.5, 1.5])), "beta"),
    ],
)
def test_bad_settings_are_refused_by_name(make, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        make()


@pytest.mark.parametrize("beta", [(0.3, 0.5), jnp.full((3,), 0.5)])
def test_weights_that_do_not_fit_are_refused(beta):
    with pytest.raises(ValueError, match="`beta`"):
        value(lambda z, a: 0.5 * z, jnp.ones((4, 2)), None, beta, 2)
