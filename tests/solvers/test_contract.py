"""What every solver promises, whatever its method."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import deqjax
from tests import helpers
from tests.helpers import OK, SOLVERS, batched, error, identical, problem

solvers = pytest.mark.parametrize("name", SOLVERS)
# Those that solve a linear problem whether or not its map expands.
LINEAR = {"anderson", "broyden", "newton"}
lengths = pytest.mark.parametrize("steps", [3, 12])


def solve(p, solver, **kwargs):
    return deqjax.fixed_point(
        p.fn, p.z0, p.args, solver=solver, has_aux=p.has_aux, **kwargs
    )


def residual(p, z):
    """‖fn(z) − z‖ and ‖fn(z)‖, from one more evaluation."""
    f, z = helpers.flat(helpers.pair(p)(z, p.args)[0]), helpers.flat(z)
    return np.linalg.norm(f - z), np.linalg.norm(f)


# --- the answer -----------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("kind", ["tanh", "relu", "norm", "linear", "tree", "idle"])
def test_finds_the_fixed_point(name, kind, x64):
    p = problem(kind)
    sol = solve(p, SOLVERS[name](1e-10, 1e-12), max_steps=200)
    assert sol.result == OK
    assert error(sol.value, helpers.settle(p)) <= 1e-8
    assert bool(sol.stats["converged"])


@solvers
def test_keeps_the_dtype_of_the_state(name, dtype):
    eps = float(jnp.finfo(dtype).eps)
    p = problem("tanh")
    p = p._replace(
        z0=p.z0.astype(dtype), args=jax.tree.map(lambda x: x.astype(dtype), p.args)
    )
    sol = solve(p, SOLVERS[name](8 * eps, 8 * eps), max_steps=200)
    assert sol.result == OK
    assert sol.value.dtype == dtype
    assert sol.stats["residual"].dtype == max(
        dtype, jnp.dtype("float32"), key=lambda d: d.itemsize
    )
    w, x = (np.asarray(a, np.float64) for a in p.args)
    z = np.zeros_like(x)
    for _ in range(400):
        z = np.tanh(z @ w + x)
    # ‖(I − J)⁻¹‖ ≤ 1 / 0.3, and the rounding of f itself.
    assert error(sol.value, z) <= 60 * eps


@solvers
def test_stops_by_the_rule_with_statistics_of_the_value(name, x64):
    p = problem("aux")
    sol = solve(p, SOLVERS[name](1e-5, 1e-7), max_steps=100)
    r, norm = residual(p, sol.value)
    assert r <= 1e-7 + 1e-5 * norm
    np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-9)
    np.testing.assert_allclose(sol.stats["relative_residual"], r / norm, rtol=1e-9)
    aux = p.fn(sol.value, p.args)[1]
    assert error(sol.aux, aux) <= 1e-14
    assert int(sol.aux["n"]) == 3
    assert int(sol.stats["max_steps"]) == 100
    # It stops at the first such iterate: one step less does not pass.
    fewer = solve(
        p, SOLVERS[name](1e-5, 1e-7), max_steps=int(sol.stats["num_steps"]) - 1
    )
    assert fewer.result == optx.RESULTS.nonlinear_max_steps_reached
    assert not bool(fewer.stats["converged"])


@solvers
def test_only_rtol_or_only_atol_is_met(name, x64):
    p = problem("tanh")
    sol = solve(p, SOLVERS[name](0.0, 1e-4), max_steps=100)
    assert sol.result == OK
    assert residual(p, sol.value)[0] <= 1e-4
    sol = solve(p, SOLVERS[name](1e-4, 0.0), max_steps=100)
    assert sol.result == OK
    r, norm = residual(p, sol.value)
    assert r <= 1e-4 * norm


@solvers
def test_min_steps_come_before_the_test(name):
    p = problem("tanh")
    sol = solve(p, SOLVERS[name](1e3, 1e3, min_steps=5), max_steps=20)
    assert sol.result == OK
    # Five steps, and the evaluation that tests where they led.
    assert int(sol.stats["num_steps"]) == 6
    assert int(solve(p, SOLVERS[name](1e3, 1e3), max_steps=20).stats["num_steps"]) == 1


@solvers
def test_tolerances_may_be_traced(name):
    p = problem("tanh")
    run = jax.jit(lambda tol: solve(p, SOLVERS[name](tol, tol)).stats["num_steps"])
    few, many = int(run(jnp.array(1e-1))), int(run(jnp.array(1e-5)))
    assert few == int(solve(p, SOLVERS[name](1e-1, 1e-1)).stats["num_steps"])
    assert many == int(solve(p, SOLVERS[name](1e-5, 1e-5)).stats["num_steps"])
    assert few < many


# --- counting -------------------------------------------------------------------------


@solvers
def test_every_evaluation_is_counted(name):
    p, counter = problem("tanh"), helpers.Counter()
    # Newton's method needs forward mode.
    fn = counter.wrap(p.fn, pulls=name != "newton")

    def count(solver, **kwargs):
        counter.reset()
        sol = solve(p._replace(fn=fn), solver, **kwargs)
        assert counter.evaluations == int(sol.stats["num_evals"])
        return counter.evaluations, int(sol.stats["num_steps"])

    per_step = 2 if name == "reversible" else 1
    evals, steps = count(SOLVERS[name](1e-4, 1e-6))
    assert evals == per_step * (steps - 1) + 1
    assert count(SOLVERS[name](1e-30, 1e-30), max_steps=5) == (4 * per_step + 1, 5)
    for n in (3, 12):
        assert count(SOLVERS[name](None, None), max_steps=n) == (n * per_step, n)
        budget = {"step_budget": n - 2}
        want = ((n - 2) * per_step, n - 2)
        assert count(SOLVERS[name](None, None), max_steps=n, options=budget) == want


@solvers
def test_the_map_is_traced_once(name):
    p, traces = problem("tanh"), []

    def fn(z, args):
        traces.append(1)
        return p.fn(z, args)

    for tol in (1e-4, None):
        traces.clear()
        solve(p._replace(fn=fn), SOLVERS[name](tol, tol), max_steps=20)
        assert len(traces) == 1


@solvers
@pytest.mark.parametrize("tol", [1e-4, None], ids=["tested", "static"])
def test_nothing_calls_the_host(name, tol):
    p = problem("tanh")
    run = jax.jit(lambda a: solve(p._replace(args=a), SOLVERS[name](tol, tol)).value)
    assert "callback" not in run.lower(p.args).compile().as_text()


# --- static loops ---------------------------------------------------------------------


@solvers
@lengths
def test_without_tolerances_all_steps_are_taken(name, steps):
    p = batched()
    solver = SOLVERS[name](None, None, batch_ndim=1)
    sol = solve(p, solver, max_steps=steps)
    assert sol.result == OK
    assert np.all(np.asarray(sol.stats["num_steps"]) == steps)
    assert sol.stats["residual"].shape == (4,)
    assert sol.stats["converged"].shape == (4,)


@solvers
@lengths
def test_a_budget_limits_the_steps_without_another_compilation(name, steps):
    p, traces = problem("tanh"), []
    p = p._replace(z0=p.z0 + 0.3)

    @eqx.filter_jit
    def run(solver, budget):
        traces.append(1)
        sol = solve(p, solver, max_steps=steps, options={"step_budget": budget})
        return sol.value, sol.stats["num_steps"]

    for solver in (SOLVERS[name](None, None), SOLVERS[name](1e-30, 1e-30)):
        traces.clear()
        for budget in (steps - 2, 99, steps - 1):
            value, taken = run(solver, jnp.array(budget))
            n = min(budget, steps)
            assert int(taken) == n
            want = solve(p, solver, max_steps=n).value
            assert error(value, want) <= 1e-6
        assert len(traces) == 1


@solvers
def test_budgets_of_python_integers_share_a_compilation(name):
    p, solver = problem("tanh"), SOLVERS[name](None, None)
    run = lambda n: solve(p, solver, options={"step_budget": n})
    assert int(run(1).stats["num_steps"]) == 1
    with helpers.compilations() as compiled:
        for n in (2, 3):
            assert int(run(n).stats["num_steps"]) == n
    assert not compiled


@pytest.mark.optimised
@solvers
@pytest.mark.parametrize("steps", [3, 12, None])
def test_residuals_are_recorded_per_problem(name, steps):
    p = batched()
    tol = 1e-4 if steps is None else None
    solver = SOLVERS[name](tol, tol, batch_ndim=1)
    sol = solve(p, solver, max_steps=steps or 60, options={"record": True})
    plain = solve(p, solver, max_steps=steps or 60)
    history = np.asarray(sol.stats["residual_history"])
    taken = np.broadcast_to(np.asarray(sol.stats["num_steps"]), (4,))
    assert history.shape == (steps or 60, 4)
    for i in range(4):
        n = int(taken[i])
        assert np.isfinite(history[:n, i]).all()
        assert np.isnan(history[n:, i]).all()
        # Anderson and Broyden answer with the best iterate, static or not.
        best = name in {"anderson", "broyden"}
        of_answer = history[:n, i].min() if best else history[n - 1, i]
        np.testing.assert_allclose(of_answer, sol.stats["residual"][i], rtol=1e-5)
    assert identical(sol.value, plain.value)
    assert "residual_history" not in plain.stats


# --- failures -------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("tol", [1e-4, None], ids=["tested", "static"])
def test_nan_and_overflow_are_never_success(name, tol):
    for fn in (lambda z, _: z * jnp.nan, lambda z, _: 100 * z + 1):
        if name in LINEAR and fn(1.0, None) == 101:
            continue
        solver = SOLVERS[name](tol, tol)
        sol = deqjax.fixed_point(fn, jnp.ones(3), solver=solver, max_steps=60)
        assert sol.result == optx.RESULTS.nonfinite
        assert not bool(sol.stats["converged"])


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in LINEAR])
def test_a_solve_that_did_not_converge_returns_the_best_iterate(name, x64):
    # Expands about its fixed point, so that the first iterate is the best.
    fn = lambda z, x: -2 * z + x
    z0 = jnp.array([0.3, 0.2])
    solver = SOLVERS[name](1e-12, 1e-12, beta=0.9)
    sol = deqjax.fixed_point(fn, z0, jnp.ones(2), solver=solver, max_steps=3)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert int(sol.stats["num_steps"]) == 3
    assert identical(sol.value, z0)
    want = np.linalg.norm(-3 * np.asarray(z0) + 1)
    np.testing.assert_allclose(sol.stats["residual"], want, rtol=1e-12)


@solvers
def test_an_infinite_norm_does_not_pass_the_test(name):
    # ‖f‖ overflows while ‖f − z‖ = 0: ∞ ≤ rtol ∞ would be true.
    z0 = jnp.full(4, 3e38)
    solver = SOLVERS[name](1e-4, 1e-6)
    sol = deqjax.fixed_point(lambda z, _: z, z0, solver=solver, max_steps=5)
    assert sol.result != OK
    assert not bool(sol.stats["converged"])


@solvers
def test_throw_raises_only_for_failures(name):
    p = problem("tanh")
    assert solve(p, SOLVERS[name](1e-4, 1e-6), throw=True).result == OK
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        solve(p, SOLVERS[name](1e-30, 1e-30), throw=True, max_steps=5)
    with pytest.raises(RuntimeError, match="Nonfinite"):
        deqjax.fixed_point(
            lambda z, _: z * jnp.nan, p.z0, solver=SOLVERS[name](None, None), throw=True
        )


# --- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rtol": -1.0}, "`rtol`.*non-negative.*-1.0"),
        ({"rtol": float("nan")}, "`rtol`.*nan"),
        ({"atol": float("inf")}, "`atol`.*inf"),
        ({"rtol": None}, "`rtol` and `atol` must both"),
        ({"atol": None}, "`rtol` and `atol` must both"),
        ({"batch_ndim": -1}, "`batch_ndim`.*-1"),
        ({"min_steps": -2}, "`min_steps`.*-2"),
        ({"beta": 0.0}, "`beta`.*0.0"),
        ({"beta": -0.5}, "`beta`.*-0.5"),
        ({"beta": 2.0}, "`beta`.*2.0"),
    ],
)
@pytest.mark.parametrize("solver", [deqjax.Picard, deqjax.Reversible])
def test_arguments_are_refused_by_name(solver, kwargs, words):
    with pytest.raises(ValueError, match=words):
        solver(**kwargs)


# --- switches of JAX that users may have set ------------------------------------------


SWITCHES = {
    "disable_jit": ft.partial(jax.disable_jit, True),
    "rank_promotion": ft.partial(jax.numpy_rank_promotion, "raise"),
}
# By name of a solver, those adjoints that have arithmetic of their own.
SWITCHED = {name: (name, deqjax.JFBAdjoint()) for name in SOLVERS} | {
    "reversible": ("reversible", deqjax.ReversibleAdjoint()),
    "implicit": ("picard", deqjax.ImplicitAdjoint()),
    "neumann": ("picard", deqjax.NeumannAdjoint(2)),
    "shine": ("broyden", deqjax.ShineAdjoint()),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", SWITCHED)
def test_switches_of_jax_change_nothing(name, switch):
    name, adjoint = SWITCHED[name]
    tol = None if name == "reversible" else 1e-2
    solver = SOLVERS[name](tol, tol, batch_ndim=1)
    x = jnp.array([[0.3, -0.2], [0.1, 0.5]])

    def solve(x):
        fn = lambda z, x: 0.4 * jnp.tanh(z) + x
        kwargs = {"adjoint": adjoint, "max_steps": 3}
        sol = deqjax.fixed_point(fn, jnp.zeros_like(x), x, solver=solver, **kwargs)
        return jnp.sum(sol.value**2), sol.value

    want = jax.grad(solve, has_aux=True)(x)
    with SWITCHES[switch]():
        got = jax.grad(solve, has_aux=True)(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
