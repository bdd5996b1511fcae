"""Anderson and Broyden: against textbooks written in NumPy, and their safeguards."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.solvers._anderson import _eliminate_in_a_loop, _eliminate_written_out
from tests import helpers
from tests.helpers import OK, error

ACCELERATED = {"anderson": deqjax.Anderson, "broyden": deqjax.Broyden}
accelerated = pytest.mark.parametrize("name", ACCELERATED)

# --- textbooks ------------------------------------------------------------------------


def anderson(f, z, history, rtol, most):
    """Evaluations of Walker & Ni (2011): least squares on differences."""
    residuals, images = [], []
    for evals in range(1, most + 1):
        image = f(z)
        r = image - z
        if np.linalg.norm(r) <= rtol * np.linalg.norm(image):
            return evals
        residuals = [*residuals, r][-history - 1 :]
        images = [*images, image][-history - 1 :]
        z = image
        if len(residuals) > 1:
            d, e = np.diff(residuals, axis=0).T, np.diff(images, axis=0).T
            z = image - e @ np.linalg.lstsq(d, r, rcond=None)[0]
    return most


def broyden(f, z, history, rtol, most):
    """Evaluations with a dense inverse, begun anew after `history` updates."""
    image = f(z)
    g, inverse, updates = z - image, np.eye(len(z)), 0
    for evals in range(1, most + 1):
        if np.linalg.norm(g) <= rtol * np.linalg.norm(image):
            return evals
        step = -inverse @ g
        z = z + step
        image = f(z)
        change, g = (z - image) - g, z - image
        if updates == history:
            inverse, updates = np.eye(len(z)), 0
            continue
        moved = inverse @ change
        inverse += np.outer(step - moved, step @ inverse) / (step @ moved)
        updates += 1
    return most


TEXTBOOKS = {"anderson": anderson, "broyden": broyden}


def linear(n, radius, kind, seed=0):
    """z ↦ A z + b with spectral radius `radius`."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n))
    if kind == "complex":
        a *= radius / np.abs(np.linalg.eigvals(a)).max()
    else:
        q = np.linalg.qr(a)[0]
        values = radius * rng.uniform(-1 if kind == "symmetric" else 0, 1, n)
        values[0] = radius
        a = (q * values) @ q.T
    return a, rng.normal(size=n)


@accelerated
@pytest.mark.parametrize("kind", ["symmetric", "positive", "complex"])
@pytest.mark.parametrize("radius", [0.5, 0.9])
def test_evaluations_are_those_of_the_textbook(name, kind, radius, x64):
    n = 200
    a, b = linear(n, radius, kind)
    solver = ACCELERATED[name](1e-6, 0.0)
    most = TEXTBOOKS[name](lambda z: a @ z + b, np.zeros(n), solver.history, 1e-6, 300)
    fn = lambda z, args: args[0] @ z + args[1]
    sol = deqjax.fixed_point(
        fn, jnp.zeros(n), (jnp.asarray(a), jnp.asarray(b)), solver=solver, max_steps=300
    )
    assert sol.result == OK
    assert abs(int(sol.stats["num_evals"]) - most) <= 0.1 * most + 2
    exact = np.linalg.solve(np.eye(n) - a, b)
    assert error(sol.value, exact) <= 2e-6 / (1 - radius)


@pytest.mark.slow
@accelerated
@pytest.mark.parametrize("kind", ["symmetric", "positive", "complex"])
@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
def test_evaluations_at_dimension_1000(name, kind, radius, x64):
    n = 1000
    a, b = linear(n, radius, kind, 1)
    solver = ACCELERATED[name](1e-6, 0.0)
    most = TEXTBOOKS[name](lambda z: a @ z + b, np.zeros(n), solver.history, 1e-6, 600)
    fn = lambda z, args: args[0] @ z + args[1]
    sol = deqjax.fixed_point(
        fn, jnp.zeros(n), (jnp.asarray(a), jnp.asarray(b)), solver=solver, max_steps=600
    )
    assert int(sol.stats["num_evals"]) <= 1.1 * most + 2


@accelerated
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_a_line_takes_at_most_four_evaluations(name, wide, request):
    if wide:
        request.getfixturevalue("x64")
    solver = ACCELERATED[name](1e-6, 0.0)
    sol = deqjax.fixed_point(lambda z, _: 0.99 * z + 1, jnp.zeros(()), solver=solver)
    assert sol.result == OK
    assert int(sol.stats["num_evals"]) <= 4
    assert abs(float(sol.value) - 100) <= 2e-2


@accelerated
def test_the_scale_of_the_problem_does_not_matter(name, x64):
    a, b = linear(40, 0.9, "complex")
    fn = lambda z, args: args[0] @ z + args[1]
    evals, values = [], []
    for scale in (1.0, 1e-30, 1e30):
        args = jnp.asarray(a), jnp.asarray(scale * b)
        solver = ACCELERATED[name](1e-8, 0.0)
        sol = deqjax.fixed_point(fn, jnp.zeros(40), args, solver=solver, max_steps=200)
        assert sol.result == OK
        evals.append(int(sol.stats["num_evals"]))
        values.append(np.asarray(sol.value) / scale)
    assert len(set(evals)) == 1
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-6)


@accelerated
@pytest.mark.parametrize("history", [1, 2, 12])
def test_any_history_serves(name, history, x64):
    p = helpers.problem("tree", 6)
    solver = ACCELERATED[name](1e-9, 0.0, history=history)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, max_steps=200)
    assert sol.result == OK
    assert error(sol.value, helpers.settle(p)) <= 1e-8


@pytest.mark.parametrize("rows", [2, 7])
def test_both_eliminations_solve_the_system(x64, rows):
    """Accelerators take the one that is written out; here both are compiled."""
    spread = np.random.default_rng(rows).normal(size=(3, rows, rows + 2))
    a = spread @ np.swapaxes(spread, -1, -2)
    b = spread[..., :1]
    want = np.linalg.solve(a, b)[:, :-1, 0]
    system = jnp.array(np.concatenate([a, b], -1))
    for eliminate in (_eliminate_in_a_loop, _eliminate_written_out):
        np.testing.assert_allclose(jax.jit(eliminate)(system), want, rtol=1e-8)


def test_leaves_are_mixed_with_one_set_of_weights(x64):
    """A pytree is solved in the steps of the vector that it makes up."""
    a, b = linear(24, 0.9, "complex")
    args = jnp.asarray(a), jnp.asarray(b)
    fn = lambda z, args: args[0] @ z + args[1]

    def split(z, args):
        f = fn(jnp.concatenate([z["a"].reshape(-1), z["b"]]), args)
        return {"a": f[:20].reshape(4, 5), "b": f[20:]}

    start = {"a": jnp.zeros((4, 5)), "b": jnp.zeros(4)}
    for name, solver in ACCELERATED.items():
        whole = deqjax.fixed_point(
            fn, jnp.zeros(24), args, solver=solver(1e-8, 0.0), max_steps=99
        )
        parts = deqjax.fixed_point(
            split, start, args, solver=solver(1e-8, 0.0), max_steps=99
        )
        assert int(whole.stats["num_steps"]) == int(parts.stats["num_steps"]), name
        np.testing.assert_allclose(parts.value["b"], whole.value[20:], rtol=1e-9)


# --- safeguards -----------------------------------------------------------------------


def poisoned(at):
    """A contraction with rate 0.9 whose evaluation number `at` gives NaN."""
    count = []

    def answer(f):
        count.append(1)
        return np.where(len(count) == at, np.full_like(f, np.nan), f)

    def fn(z, x):
        f = 0.9 * jnp.sin(z) + x
        shape = jax.ShapeDtypeStruct(f.shape, f.dtype)
        return jax.pure_callback(answer, shape, f)

    return fn


@accelerated
@pytest.mark.parametrize("at", [2, 3, 5])
def test_one_bad_evaluation_is_survived(name, at):
    x = jnp.linspace(0.1, 1.0, 5)
    solver = ACCELERATED[name](1e-5, 1e-6)
    sol = deqjax.fixed_point(poisoned(at), jnp.zeros(5), x, solver=solver)
    assert sol.result == OK
    z = np.asarray(sol.value)
    np.testing.assert_allclose(0.9 * np.sin(z) + np.asarray(x), z, atol=1e-4)


@accelerated
def test_the_best_iterate_survives_a_map_that_turns_to_nan(name):
    """Beyond the unit ball f is NaN, and its fixed point lies there."""
    fn = lambda z, _: jnp.where(jnp.abs(z) > 1, jnp.nan, 0.5 * z + 0.6)
    sol = deqjax.fixed_point(
        fn, jnp.zeros(3), solver=ACCELERATED[name](1e-5, 1e-6), max_steps=60
    )
    assert sol.result != OK
    assert not bool(sol.stats["converged"])
    z = np.asarray(sol.value)
    assert np.isfinite(z).all()
    r = np.linalg.norm(0.5 * z + 0.6 - z)
    np.testing.assert_allclose(sol.stats["residual"], r, rtol=1e-5)
    assert r <= np.sqrt(3) * 0.6


@accelerated
def test_growth_is_met_by_going_back(name):
    """Plain steps from 2 overflow at once; the fixed point of e^z − 2 is attracting."""
    fn = lambda z, a: jnp.exp(z) - a
    sol = deqjax.fixed_point(
        fn,
        2 * jnp.ones((1, 4)),
        jnp.array([[2.0, 2.2, 2.5, 3.0]]),
        solver=ACCELERATED[name](1e-5, 1e-6, batch_ndim=1),
        max_steps=100,
    )
    assert sol.result == OK
    z = np.asarray(sol.value)
    np.testing.assert_allclose(np.exp(z) - [[2.0, 2.2, 2.5, 3.0]], z, atol=1e-3)


@accelerated
def test_a_flat_direction_is_no_success(name):
    """I − J is singular and there is no fixed point: f moves every iterate by 1."""
    sol = deqjax.fixed_point(
        lambda z, _: z + 1.0, jnp.zeros(3), solver=ACCELERATED[name](1e-6, 1e-6)
    )
    assert sol.result != OK
    assert np.isfinite(np.asarray(sol.value)).all()
    # Where there are fixed points along it, one is found.
    fn = lambda z, _: jnp.array([1.0, 0.5, -0.5]) * z + jnp.array([0.0, 1.0, 1.0])
    sol = deqjax.fixed_point(
        fn, jnp.array([7.0, 0.0, 0.0]), solver=ACCELERATED[name](1e-6, 1e-6)
    )
    assert sol.result == OK
    np.testing.assert_allclose(sol.value, [7.0, 2.0, 2 / 3], rtol=1e-5)


@accelerated
def test_oscillation_and_divergence_are_overcome(name):
    for fn, want in (
        (lambda z, _: 1 - z, 0.5),
        (lambda z, _: 10 * z + 1, -1 / 9),
        (lambda z, _: 2 - 3 * jnp.tanh(z), 0.534214),
    ):
        sol = deqjax.fixed_point(
            fn, jnp.ones(4), solver=ACCELERATED[name](1e-5, 1e-6), max_steps=60
        )
        assert sol.result == OK
        np.testing.assert_allclose(sol.value, np.full(4, want), rtol=1e-3)


# --- memory ---------------------------------------------------------------------------


@accelerated
def test_histories_are_neither_copied_nor_grow_with_the_steps(name):
    z, row = jnp.zeros((32, 64)), 4 * 32 * 64
    rows = {"anderson": 2 * 6, "broyden": 10}[name]
    fn = lambda z, x: jnp.tanh(0.5 * z + x)

    def temporary(steps, batch_ndim):
        solver = ACCELERATED[name](1e-30, 1e-30, batch_ndim=batch_ndim)
        run = lambda z, x: (
            deqjax.fixed_point(fn, z, x, solver=solver, max_steps=steps).value
        )
        compiled = jax.jit(run).lower(z, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes / row

    assert temporary(40, 0) <= rows + 9
    assert temporary(40, 1) <= rows + 10
    assert temporary(400, 0) == pytest.approx(temporary(40, 0), abs=0.1)


@pytest.mark.slow
@accelerated
def test_vmap_costs_what_a_batch_costs(name):
    """The compiled loops hold the same operations on rings of the same shapes."""
    w = helpers.weights(jax.random.key(0), 32)
    x = jnp.sin(jnp.arange(64 * 32.0)).reshape(64, 32)
    fn = lambda z, args: jnp.tanh(z @ args[0] + args[1])
    solve = ft.partial(deqjax.fixed_point, fn, max_steps=30)
    one = lambda x: (
        solve(jnp.zeros(32), (w, x), solver=ACCELERATED[name](1e-5, 1e-6)).value
    )
    batch = lambda x: (
        solve(0 * x, (w, x), solver=ACCELERATED[name](1e-5, 1e-6, batch_ndim=1)).value
    )
    mapped, whole = (jax.jit(g).lower(x).compile() for g in (jax.vmap(one), batch))
    np.testing.assert_allclose(mapped(x), whole(x), atol=1e-6)
    for of in (
        lambda c: c.cost_analysis()["flops"],
        lambda c: c.memory_analysis().temp_size_in_bytes,
    ):
        assert of(mapped) <= 1.1 * of(whole)
