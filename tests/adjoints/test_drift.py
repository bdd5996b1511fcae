"""A wrong gradient never passes silently: drift, overflow, anchors."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.experimental import io_callback

import deqjax
from tests import helpers
from tests.adjoints.test_exact_reversal import case, looped, solve, widened
from tests.helpers import OK, error, problem, tanh_map, weigh

Exact = deqjax.Reversible
Float = ft.partial(deqjax.Reversible, arithmetic="float")
DIVERGED, NONFINITE = optx.RESULTS.nonlinear_divergence, optx.RESULTS.nonfinite


def reversal(fn, z0, *, solver, steps, probe_shape=(), **settings):
    """(args, probe) -> the gradients of both, compiled."""

    def loss(args, probe):
        adjoint = deqjax.ReversibleAdjoint(probe=probe, **settings)
        sol = solve(fn, z0, args, solver=solver, steps=steps, adjoint=adjoint)
        return weigh(sol.value)

    return jax.jit(jax.grad(loss, (0, 1)))


def is_nan(tree):
    return all(np.isnan(x).all() for x in jax.tree.leaves(tree))


# --- a function that does not repeat itself -------------------------------------------


class Restless:
    """tanh with a value drawn on the host at every evaluation."""

    def __init__(self, size=1e-3, after=0):
        self.rng, self.calls = np.random.default_rng(0), 0
        self.size, self.after = size, after

    def draw(self):
        self.calls += 1
        quiet = self.calls <= self.after
        return np.float32(0.0 if quiet else self.size * self.rng.uniform(0.5, 1))

    def __call__(self, z, args):
        noise = io_callback(self.draw, jax.ShapeDtypeStruct((), jnp.float32))
        return tanh_map(z, args) + jax.lax.stop_gradient(noise)


@pytest.mark.parametrize("anchors", [None, "auto", 2])
@pytest.mark.parametrize("steps", [4, 12], ids=["unrolled", "loop"])
def test_a_function_that_does_not_repeat_is_caught_every_time(anchors, steps):
    p = problem("tanh")
    solver = Exact(None, None, beta=0.5)
    run = reversal(Restless(), p.z0, solver=solver, steps=steps, anchors=anchors)
    trials = 100 if steps == 12 else 20
    caught = 0
    for _ in range(trials):
        gradient, stats = run(p.args, deqjax.BackwardStats())
        caught += is_nan(gradient) and float(stats.drift) > 1e-4
    assert caught == trials


def test_a_single_other_value_is_caught():
    # Only the last evaluation of all, the one that is pulled back first or last.
    p = problem("tanh")
    steps = 10
    fn = Restless(2.0**-20, after=4 * steps - 1)
    run = reversal(fn, p.z0, solver=Exact(None, None, beta=0.5), steps=steps)
    gradient, stats = run(p.args, deqjax.BackwardStats())
    jax.effects_barrier()
    assert fn.calls == 4 * steps
    assert is_nan(gradient)
    assert 0 < float(stats.drift) < 2.0**-15


def test_a_tested_solve_that_does_not_repeat_is_caught():
    p = problem("tanh")
    run = reversal(Restless(), p.z0, solver=Exact(1e-1, 1e-1, beta=0.5), steps=30)
    gradient, stats = run(p.args, deqjax.BackwardStats())
    assert is_nan(gradient)
    assert float(stats.drift) > 1e-4


# --- what a drift does ----------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_drift_can_raise_or_recompute(arithmetic):
    p, steps = problem("tanh"), 20
    fn = Restless(1e-6) if arithmetic == "exact" else p.fn
    solver = Exact(None, None, beta=0.8, arithmetic=arithmetic)
    probe = deqjax.BackwardStats()
    run = reversal(fn, p.z0, solver=solver, steps=steps, on_drift="raise")
    with pytest.raises(RuntimeError, match="not undone exactly"):
        jax.block_until_ready(run(p.args, probe))
    run = reversal(fn, p.z0, solver=solver, steps=steps, on_drift="recompute")
    got, stats = run(p.args, probe)
    assert float(stats.drift) > 0
    want = jax.jit(jax.grad(looped(p.fn, steps, 0.8)))(p.args, p.z0)
    # In the first case of another draw of the noise.
    assert error(got, want) <= (1e-4 if arithmetic == "exact" else 2e-6)


def test_what_does_not_drift_is_not_recomputed():
    p, counter = problem("tanh"), helpers.Counter()
    fn = counter.wrap(p.fn)
    solver = Exact(None, None)
    run = reversal(fn, p.z0, solver=solver, steps=10, on_drift="recompute")
    got, stats = run(p.args, deqjax.BackwardStats())
    assert float(stats.drift) == 0
    assert (counter.evaluations, counter.pulls) == (40, 20)
    want = jax.jit(jax.grad(looped(p.fn, 10)))(p.args, p.z0)
    assert error(got, want) <= 1e-6


def test_a_drift_within_the_tolerance_is_accepted():
    p = problem("tanh")
    settings = {"solver": Exact(None, None), "steps": 6}
    for tol, accepted in ((1e-2, True), (1e-9, False)):
        run = reversal(Restless(1e-5), p.z0, drift_tol=tol, **settings)
        gradient, stats = run(p.args, deqjax.BackwardStats())
        assert 0 < float(stats.drift) < 1e-2
        assert is_nan(gradient) != accepted
        if accepted:
            want = jax.jit(jax.grad(looped(tanh_map, 6)))(p.args, p.z0)
            assert error(gradient, want) <= 1e-3


@pytest.mark.parametrize(
    "settings",
    [{"anchors": 0}, {"anchors": "all"}, {"on_drift": "warn"}, {"drift_tol": -1.0}],
)
def test_settings_are_checked(settings):
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        deqjax.ReversibleAdjoint(**settings)


def test_a_deep_solve_in_floats_is_nan_and_not_wrong():
    c = case("norm")
    want = jax.jit(jax.grad(looped(c.fn, 40, 0.8)))(c.args, c.z0)
    probe = deqjax.BackwardStats()
    run = reversal(c.fn, c.z0, solver=Float(None, None, beta=0.8), steps=40)
    got, stats = run(c.args, probe)
    assert is_nan(got)
    assert not float(stats.drift) <= 1e-3
    run = reversal(c.fn, c.z0, solver=Exact(None, None, beta=0.8), steps=40)
    assert error(run(c.args, probe)[0], want) <= 2e-6


# --- anchors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "beta", "steps", "tol"),
    [
        (1, 0.9, 40, 2e-6),
        (2, 0.5, 41, 1e-5),
        ("auto", 0.8, 30, 2e-4),
        ("auto", 0.5, 7, 1e-4),
        (50, 0.5, 5, 1e-4),
    ],
)
def test_anchors_bound_the_error_of_float_arithmetic(anchors, beta, steps, tol, x64):
    c = case("norm")
    solver = Float(None, None, beta=beta)
    run = reversal(c.fn, c.z0, solver=solver, steps=steps, anchors=anchors)
    got, stats = run(c.args, deqjax.BackwardStats())
    exact = looped(c.fn, steps, beta)
    want = jax.jit(jax.grad(exact))(*widened((c.args, c.z0)))
    assert error(got, want) <= tol
    assert 0 < float(stats.drift) <= 1e-3


def test_anchors_of_a_tested_batch_whose_problems_end_apart(x64):
    p = helpers.batched()
    settings = {"solver": Exact(1e-6, 1e-6, beta=0.8, batch_ndim=1), "steps": 90}
    probe = deqjax.BackwardStats((4,))
    want, _ = reversal(p.fn, p.z0, **settings)(p.args, probe)
    assert not is_nan(want)
    settings["solver"] = Float(1e-6, 1e-6, beta=0.8, batch_ndim=1)
    got, stats = reversal(p.fn, p.z0, anchors=3, **settings)(p.args, probe)
    assert error(got, want) <= 1e-7
    assert stats.drift.shape == (4,)
    assert (stats.drift > 0).all()
    assert (stats.drift < 1e-9).all()


# --- leaving the grid, and what is not a number ---------------------------------------


def grows(z, a):
    return a * z + 1


@pytest.mark.parametrize("tol", [None, 1e-5], ids=["static", "tested"])
@pytest.mark.parametrize("steps", [6, 40], ids=["unrolled", "loop"])
def test_leaving_the_grid_is_reported(tol, steps):
    solver = Exact(tol, tol, beta=0.5, batch_ndim=1)
    a = jnp.array([[3.0], [0.5], [-2.9]])
    z0 = jnp.ones((3, 1))
    sol = solve(grows, z0, a, solver=solver, steps=steps)
    # Of a tested solve only once all problems are done.
    late = optx.RESULTS.nonlinear_max_steps_reached
    assert sol.result == (late if tol and steps == 6 else DIVERGED)
    np.testing.assert_array_equal(sol.stats["overflow"], [True, False, True])
    assert not sol.stats["converged"][::2].any()
    if tol is None:
        assert np.isnan(sol.value[::2]).all()
    if tol is None or steps == 40:
        y = z = 1.0
        for _ in range(steps):
            y = (y + 0.5 * z + 1) / 2
            z = (z + 0.5 * y + 1) / 2
        np.testing.assert_allclose(sol.value[1], [z], rtol=1e-4 if tol else 1e-6)
    run = reversal(grows, z0, solver=solver, steps=steps)
    gradient, stats = run(a, deqjax.BackwardStats((3,)))
    if tol is None:
        assert is_nan(gradient)
    else:
        # The answer is the best iterate, whose steps are undone.
        assert float(stats.drift[1]) == 0


def test_leaving_the_grid_in_the_companion_alone_is_reported():
    # y_n overflows, and what f makes of it is finite.
    fn = lambda z, a: 1 + a * jnp.maximum(z - 0.9, 0)
    for steps in (2, 4, 12):
        solver = Exact(None, None)
        sol = solve(
            fn, jnp.array([0.85]), jnp.array([200.0]), solver=solver, steps=steps
        )
        if steps > 2:
            assert sol.result == DIVERGED
        assert (
            bool(sol.stats["overflow"])
            == (sol.result != OK)
            == bool(np.isnan(sol.value).all())
        )


@pytest.mark.parametrize("tol", [None, 1e-3], ids=["static", "tested"])
@pytest.mark.parametrize("steps", [4, 12], ids=["unrolled", "loop"])
def test_a_nan_of_f_is_never_lost(tol, steps):
    # f(z₀) is not a number, but f is a number everywhere below.
    fn = lambda z, a: jnp.sqrt(a - z)
    z0, a = jnp.array([2.0]), jnp.array([1.0])
    sol = solve(fn, z0, a, solver=Exact(tol, tol), steps=steps)
    assert sol.result == NONFINITE
    assert not sol.stats["converged"]
    assert not sol.stats["overflow"]
    run = reversal(fn, z0, solver=Exact(tol, tol), steps=steps)
    if tol is None:
        assert np.isnan(sol.value).all()
        assert is_nan(run(a, deqjax.BackwardStats())[0])


def test_a_nan_of_one_problem_leaves_the_others_alone():
    p = helpers.batched()
    w, x, gain = p.args
    settings = {"solver": Exact(None, None, batch_ndim=1), "steps": 12}
    bad = (w, x.at[2, 0].set(jnp.nan), gain)
    sol, good = (solve(p.fn, p.z0, a, **settings) for a in (bad, p.args))
    rest = np.array([0, 1, 3])
    np.testing.assert_array_equal(sol.value[rest], good.value[rest])
    np.testing.assert_array_equal(sol.stats["converged"], [True, True, False, True])
    assert np.isnan(sol.value[2]).all()


# --- derivatives by other adjoints ----------------------------------------------------


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize(
    "adjoint", [deqjax.UnrolledAdjoint(), optx.RecursiveCheckpointAdjoint()]
)
def test_plain_differentiation_gives_the_derivative_of_the_update(adjoint, steps, x64):
    p = problem("tree")
    z0, args = jax.tree.map(lambda x: x.astype(jnp.float32), (p.z0, p.args))
    solver = Exact(None, None, beta=0.8)
    run = lambda a, z: weigh(
        solve(p.fn, z, a, solver=solver, steps=steps, adjoint=adjoint).value
    )
    got = jax.jit(jax.grad(run, (0, 1)))(args, z0)
    want = jax.jit(jax.grad(looped(p.fn, steps, 0.8), (0, 1)))(*widened((args, z0)))
    assert error(got, want) <= 3e-6


# --- beta of run time -----------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("tol", [None, 1e-4], ids=["static", "tested"])
def test_beta_is_chosen_at_run_time(arithmetic, tol):
    c = case("norm")
    betas = (0.5, 0.75, 0.7) if arithmetic == "exact" else (0.5, 0.61, 0.7)
    steps = 12 if arithmetic == "exact" else 4
    make = ft.partial(deqjax.Reversible, tol, tol, arithmetic=arithmetic)
    traces = []

    @jax.jit
    def chosen(args, i, probe):
        traces.append(1)
        loss = lambda a, q: weigh(
            solve(
                c.fn,
                c.z0,
                a,
                q,
                solver=make(beta=betas),
                steps=steps,
                options={"beta": i},
            ).value
        )
        return jax.value_and_grad(loss, (0, 1))(args, probe)

    @ft.partial(jax.jit, static_argnums=0)
    def fixed(beta, args):
        solver = make(beta=beta)
        loss = lambda a: weigh(solve(c.fn, c.z0, a, solver=solver, steps=steps).value)
        return jax.value_and_grad(loss)(args)

    for i, beta in enumerate(betas):
        value, (got, stats) = chosen(c.args, jnp.array(i), deqjax.BackwardStats())
        assert arithmetic == "float" or float(stats.drift) == 0
        same, want = fixed(beta, c.args)
        np.testing.assert_allclose(value, same, rtol=1e-6)
        assert error(got, want) <= (1e-6 if arithmetic == "exact" else 1e-3)
    assert len(traces) == 1


def test_a_choice_needs_a_tuple_and_a_tuple_a_choice():
    p = problem("tanh")
    for beta, options in (((0.5, 0.8), {}), (0.5, {"beta": 0})):
        with pytest.raises(ValueError, match="chooses from a tuple"):
            solve(p.fn, p.z0, p.args, solver=Exact(beta=beta), steps=3, options=options)
