"""optimistix's solvers on fixed-point problems: answers, gradients, honest ends."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import OK, Problem, dense, error, problem, weigh

RESULTS = optx.RESULTS
EXACT = deqjax.ImplicitAdjoint(GMRES(1e-13))

# name -> tolerance -> solver
THEIRS = {
    "iteration": lambda t: optx.FixedPointIteration(t, t),
    "best iteration": lambda t: optx.BestSoFarFixedPoint(
        optx.FixedPointIteration(t, t)
    ),
    "newton": lambda t: optx.Newton(t, t),
    "chord": lambda t: optx.Chord(t, t),
    "best root": lambda t: optx.BestSoFarRootFinder(optx.Newton(t, t)),
    "dogleg": lambda t: optx.Dogleg(t, t),
    "levenberg": lambda t: optx.LevenbergMarquardt(t, t),
    "gauss": lambda t: optx.GaussNewton(t, t),
    "bfgs": lambda t: optx.BFGS(t, t),
    "gradients": lambda t: optx.NonlinearCG(t, t),
    "optax": lambda t: optx.OptaxMinimiser(optax.sgd(0.5, 0.5), t, t),
}
# These share the code of another.
twins = {"gauss", "gradients", "best root"}
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in twins)) for n in THEIRS]
)
# One of each kind.
kinds = pytest.mark.parametrize("name", ["iteration", "newton", "levenberg", "bfgs"])


def solve(p, solver, **kwargs):
    return deqjax.fixed_point(
        p.fn, p.z0, p.args, solver=solver, has_aux=p.has_aux, **kwargs
    )


def tree_problem() -> Problem:
    """A pytree state, and aux that depends on it."""

    def fn(z, args):
        w, x = args
        a = jnp.tanh(w @ z["a"] + 0.2 * z["b"] + x)
        f = {"a": a, "b": 0.4 * jnp.sin(z["b"]) + 0.2 * jnp.sum(z["a"])}
        return f, {"energy": jnp.sum(z["a"] ** 2 * x), "n": jnp.array(3)}

    p = problem("tanh", 3)
    z0 = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    return Problem(fn, z0, (0.6 * p.args[0], p.args[1]), has_aux=True)


def residual(p, z):
    f = helpers.flat(helpers.pair(p)(z, p.args)[0])
    with np.errstate(invalid="ignore"):
        return np.linalg.norm(f - helpers.flat(z)), np.linalg.norm(f)


# --- the answer and its gradient ------------------------------------------------------


@every
def test_value_and_gradient(name, x64):
    p = tree_problem()

    def run(args):
        sol = solve(
            p._replace(args=args), THEIRS[name](1e-8), adjoint=EXACT, max_steps=400
        )
        return weigh((sol.value, sol.aux)), (sol.value, sol.aux, sol.result, sol.stats)

    got, (value, aux, result, stats) = jax.jit(jax.grad(run, has_aux=True))(p.args)
    assert result == OK
    assert bool(stats["converged"])
    assert error(value, helpers.settle(p)) <= 1e-7
    # A minimiser's own chain would be off by many orders of magnitude.
    assert error(got, dense(p).gradient) <= 1e-6
    # Value, aux and residual belong together.
    r, norm = residual(p, value)
    np.testing.assert_allclose(stats["residual"], r, rtol=1e-4, atol=1e-16)
    np.testing.assert_allclose(stats["relative_residual"], r / norm, rtol=1e-4)
    assert error(aux, p.fn(value, p.args)[1]) <= 1e-14
    assert "num_evals" not in stats
    assert int(stats["num_steps"]) <= 400


@pytest.mark.parametrize(
    "adjoint",
    [optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint()],
    ids=["implicit", "checkpoints"],
)
def test_their_adjoints_differentiate_them(adjoint, x64):
    p = problem("tanh", 3)
    run = helpers.loss(p, solver=optx.Newton(1e-12, 1e-12), adjoint=adjoint)
    assert error(jax.jit(jax.grad(run))(p.args), dense(p).gradient) <= 1e-9


@pytest.mark.parametrize("name", ["newton", "bfgs"])
def test_unrolled_and_biased_gradients(name, x64):
    p = problem("tanh", 3)
    want = dense(p)
    options = {"solver": THEIRS[name](1e-9), "max_steps": 60}
    jfb = helpers.loss(p, adjoint=deqjax.JFBAdjoint(), **options)
    assert error(jax.jit(jax.grad(jfb))(p.args), want.jfb) <= 1e-6
    unrolled = helpers.loss(p, adjoint=deqjax.UnrolledAdjoint(), **options)
    # BFGS ends before what its derivative depends on has converged.
    tol = 1e-8 if name == "newton" else 1e-2
    assert error(jax.jit(jax.grad(unrolled))(p.args), want.gradient) <= tol


def test_bisection_takes_its_interval_from_the_options(x64):
    def run(a, lower):
        sol = deqjax.fixed_point(
            lambda z, a: jnp.cos(a * z),
            jnp.array(0.5),
            a,
            solver=optx.Bisection(1e-10, 1e-10),
            options={"lower": lower, "upper": 2.0},
            adjoint=EXACT,
        )
        return sol.value, sol.result

    grad = jax.grad(run, has_aux=True)
    got, result = grad(jnp.array(1.0), 0.0)
    z = 0.7390851332151607
    assert result == OK
    np.testing.assert_allclose(run(jnp.array(1.0), 0.0)[0], z, atol=1e-9)
    np.testing.assert_allclose(got, -z * np.sin(z) / (1 + np.sin(z)), rtol=1e-8)
    with pytest.raises(RuntimeError, match="not contained"):
        run(jnp.array(1.0), 1.0)


def test_tags_reach_their_root_finders():
    solver = optx.Newton(1e-6, 1e-6, linear_solver=lx.Diagonal())
    fn = lambda z, a: jnp.cos(a * z)
    solve = lambda solver, tags: deqjax.fixed_point(
        fn, jnp.ones(3), jnp.linspace(0.5, 1.0, 3), solver=solver, tags=tags
    )
    sol = solve(solver, frozenset({lx.diagonal_tag}))
    assert sol.result == OK
    with pytest.raises(ValueError, match="diagonal"):
        solve(solver, frozenset())


# --- honest ends ----------------------------------------------------------------------


@kinds
def test_without_a_fixed_point_there_is_no_success(name):
    for fn in (lambda z, _: z + 1, lambda z, _: z**2 + 1, lambda z, _: z * jnp.nan):
        p = Problem(fn, jnp.full(2, 0.3), None)
        sol = solve(p, THEIRS[name](1e-4), max_steps=30)
        assert sol.result != OK
        assert not bool(sol.stats["converged"])
        r = residual(p, sol.value)[0]
        np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-5)


def test_a_local_minimum_of_the_residual_is_no_success():
    # ½ (z² + 1 − z)² is least at z = ½, where f(z) − z = ¾.
    fn = lambda z, _: z**2 + 1
    solver = optx.BFGS(1e-4, 1e-4)
    theirs = optx.minimise(lambda z, _: 0.5 * (fn(z, 0) - z) ** 2, solver, 0.3)
    assert theirs.result == OK
    np.testing.assert_allclose(theirs.value, 0.5, atol=1e-3)
    run = lambda throw: deqjax.fixed_point(
        fn, jnp.array(0.3), solver=solver, throw=throw
    )
    sol = run(False)
    assert sol.result == RESULTS.nonlinear_max_steps_reached
    np.testing.assert_allclose(sol.value, 0.5, atol=1e-3)
    np.testing.assert_allclose(sol.stats["residual"], 0.75, rtol=1e-3)
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        run(True)


class _Leaps(optx.FixedPointIteration):
    """Claims success as others do, and then returns another point."""

    far: float = 1.0

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y + self.far, aux, {"leaps": 1}


@pytest.mark.parametrize(
    ("far", "result"),
    [(1.0, RESULTS.nonlinear_divergence), (np.nan, RESULTS.nonfinite), (1e-4, OK)],
)
def test_success_is_measured_where_the_solve_ended(far, result):
    fn = lambda z, _: 0.5 * z + 1
    solver = _Leaps(1e-3, 1e-3, far=far)
    sol = deqjax.fixed_point(fn, jnp.zeros(()), solver=solver)
    assert sol.result == result
    assert bool(sol.stats["converged"]) == (result == OK)
    assert sol.stats["leaps"] == 1


def test_a_residual_of_zero_needs_no_tolerance():
    # 0 / 0 in an entry is no failure.
    fn = lambda z, a: a * z
    sol = deqjax.fixed_point(
        fn, jnp.zeros(2), jnp.array([0.5, 2.0]), solver=optx.Newton(1e-3, 1e-30)
    )
    assert sol.result == OK
    np.testing.assert_array_equal(sol.value, 0)


# --- budget, record, batches, dtypes --------------------------------------------------


@kinds
def test_a_budget_limits_the_steps_without_another_compilation(name):
    p, traces = tree_problem(), []

    @jax.jit
    def run(n):
        traces.append(1)
        sol = solve(p, THEIRS[name](1e-6), options={"step_budget": n}, max_steps=60)
        return sol.stats["num_steps"], sol.result

    steps = [int(run(jnp.array(n))[0]) for n in (1, 2, 60)]
    assert steps[:2] == [1, 2]
    assert 2 < steps[2] < 60
    assert len(traces) == 1
    assert run(jnp.array(2))[1] == RESULTS.nonlinear_max_steps_reached
    assert run(jnp.array(60))[1] == OK


def test_residuals_are_recorded_at_no_cost():
    p, counter = problem("tanh", 3), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    solver = optx.FixedPointIteration(1e-4, 1e-4)
    sol = solve(q, solver, options={"record": True})
    n = int(sol.stats["num_steps"])
    # One more where the solve ended.
    assert counter.evaluations == n + 1
    want = [residual(p, z)[0] for z in helpers.picard(p, n - 1)]
    history = sol.stats["residual_history"]
    np.testing.assert_allclose(history[:n], want, rtol=1e-3, atol=1e-7)
    assert np.isnan(history[n:]).all()


def test_what_was_not_evaluated_is_not_recorded():
    # The first step of Nelder–Mead hands out no evaluation.
    fn = lambda z, _: 0.5 * z + 1
    sol = deqjax.fixed_point(
        fn,
        jnp.ones(()),
        solver=optx.NelderMead(1e-3, 1e-3),
        max_steps=100,
        options={"record": True},
    )
    assert sol.result == OK
    np.testing.assert_allclose(sol.value, 2, atol=1e-2)
    history = np.asarray(sol.stats["residual_history"])
    n = int(sol.stats["num_steps"])
    assert np.isnan(history[0])
    assert np.isfinite(history[1:n]).all()


@pytest.mark.parametrize("name", ["newton", "bfgs"])
def test_vmap_solves_each_problem_as_if_alone(name):
    p = helpers.batched()
    w, x, gain = p.args

    def one(x, gain):
        q = p._replace(z0=jnp.zeros(3), args=(w, x, gain))
        sol = solve(q, THEIRS[name](1e-4), max_steps=100)
        return sol.value, sol.stats["num_steps"], sol.stats["converged"]

    value, steps, converged = jax.jit(jax.vmap(one))(x, gain)
    alone = jax.jit(one)
    assert bool(jnp.all(converged))
    for i in range(4):
        want = alone(x[i], gain[i])
        assert error(value[i], want[0]) <= 1e-3
        assert abs(int(steps[i]) - int(want[1])) <= 1


@kinds
def test_half_precision_and_mixed_states(name):
    p = tree_problem()
    half = jnp.bfloat16

    def fn(z, args):
        f, _ = p.fn({"a": z["a"].astype(jnp.float32), "b": z["b"]}, args)
        return {"a": f["a"].astype(half), "b": f["b"]}

    z0 = {"a": jnp.zeros(3, half), "b": jnp.zeros(())}
    run = lambda args: solve(Problem(fn, z0, args), THEIRS[name](2e-2), max_steps=200)
    sol = run(p.args)
    assert sol.result == OK
    assert sol.value["a"].dtype == half
    assert sol.stats["residual"].dtype == jnp.float32
    assert error(sol.value, helpers.settle(p)) <= 3e-2
    f = fn(sol.value, p.args)
    np.testing.assert_allclose(
        sol.stats["residual"],
        np.linalg.norm(helpers.flat(f) - helpers.flat(sol.value)),
        rtol=1e-5,
    )


@kinds
def test_single_precision_states_with_x64_switched_on(name, x64):
    p = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, jax.Array) else x,
        problem("tanh", 3),
    )
    sol = solve(p, THEIRS[name](1e-5), max_steps=200)
    assert sol.result == OK
    assert sol.value.dtype == jnp.float32
    assert error(sol.value, helpers.settle(p)) <= 1e-3


# --- what is refused ------------------------------------------------------------------


def test_a_solver_without_tolerances_is_refused():
    static = optx.BestSoFarFixedPoint(deqjax.Picard(None, None))
    with pytest.raises(ValueError, match="BestSoFarFixedPoint.*`rtol` and `atol`"):
        deqjax.fixed_point(lambda z, _: z, jnp.ones(2), solver=static)
