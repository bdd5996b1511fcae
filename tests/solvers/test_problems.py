"""Every solver on fixed-point problems of several kinds, in both entry points."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import deqjax
from tests.helpers import OK, SOLVERS, Problem, error, settle

solvers = pytest.mark.parametrize("name", SOLVERS)


def affine():
    a = jnp.array([[0.3, -0.2, 0.1], [0.1, 0.4, 0.0], [0.0, -0.3, 0.2]])
    return Problem(lambda z, b: a @ z + b, jnp.zeros(3), jnp.array([1.0, -1.0, 2.0]))


def trigonometric():
    fn = lambda z, a: 0.5 * jnp.sin(a * z) + 0.3 * jnp.cos(jnp.roll(z, 1))
    return Problem(fn, jnp.ones(5), jnp.linspace(0.5, 1.5, 5))


def pytree():
    def fn(z, a):
        x, (y, s) = z["x"], z["y"]
        return {
            "x": 0.4 * jnp.tanh(x) + jnp.mean(y) * a,
            "y": (0.3 * y + 0.1 * jnp.outer(x, x), 0.5 * jnp.cos(s)),
        }

    z0 = {"x": jnp.zeros(2), "y": (jnp.ones((2, 2)), jnp.zeros(()))}
    return Problem(fn, z0, jnp.array([0.5, -0.4]))


def implicit_euler():
    """One step of a reaction–diffusion equation."""
    n, h = 12, 0.1
    u = jnp.sin(jnp.linspace(0, 3, n))

    def fn(z, u):
        around = jnp.roll(z, 1) + jnp.roll(z, -1) - 2 * z
        return u + h * (around + z - z**3)

    return Problem(fn, u, u)


def implicit_midpoint():
    """One step of a pendulum, for the two stages of its state."""
    h = 0.5

    def fn(z, start):
        angle, speed = jnp.split((z + start) / 2, 2)
        return start + h * jnp.concatenate([speed, -jnp.sin(angle)])

    start = jnp.array([1.0, 0.2])
    return Problem(fn, start, start)


PROBLEMS = [affine, trigonometric, pytree, implicit_euler, implicit_midpoint]


@solvers
@pytest.mark.parametrize("make", PROBLEMS, ids=lambda f: f.__name__)
def test_the_problem_is_solved_through_both_entry_points(name, make):
    p = make()
    want = settle(p)
    solver = SOLVERS[name](1e-5, 1e-6)
    ours = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, max_steps=100)
    theirs = optx.fixed_point(
        p.fn,
        solver,
        p.z0,
        p.args,
        max_steps=100,
        throw=False,
        adjoint=deqjax.ReversibleAdjoint()
        if isinstance(solver, deqjax.Reversible)
        else deqjax.ImplicitAdjoint(),
    )
    for sol in (ours, theirs):
        assert sol.result == OK
        assert error(sol.value, want) <= 1e-4
        assert jax.tree.structure(sol.value) == jax.tree.structure(p.z0)


# --- faults ---------------------------------------------------------------------------


@solvers
def test_a_leaf_may_be_empty(name):
    z0 = {"a": jnp.zeros(3), "none": jnp.zeros((0, 2))}
    fn = lambda z, _: {"a": 0.5 * jnp.cos(z["a"]), "none": 2 * z["none"]}
    sol = deqjax.fixed_point(fn, z0, solver=SOLVERS[name](1e-5, 1e-6))
    assert sol.result == OK
    z = np.asarray(sol.value["a"])
    np.testing.assert_allclose(0.5 * np.cos(z), z, atol=1e-4)
    assert sol.value["none"].shape == (0, 2)


@solvers
def test_a_batch_may_be_empty(name):
    solver = SOLVERS[name](1e-5, 1e-6, batch_ndim=1)
    sol = deqjax.fixed_point(lambda z, _: jnp.cos(z), jnp.zeros((0, 3)), solver=solver)
    assert sol.result == OK
    assert sol.value.shape == (0, 3)
    assert sol.stats["residual"].shape == sol.stats["converged"].shape == (0,)
    assert int(sol.stats["num_evals"]) <= 1


@solvers
def test_leaves_may_have_different_dtypes(name):
    z0 = {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16)}

    def fn(z, _):
        a, b = z["a"], z["b"]
        mean = jnp.mean(b.astype(jnp.float32))
        return {
            "a": 0.5 * jnp.cos(a) + 0.1 * mean,
            "b": 0.5 * b + jnp.sum(a).astype(b.dtype),
        }

    sol = deqjax.fixed_point(fn, z0, solver=SOLVERS[name](1e-2, 1e-2))
    assert sol.result == OK
    assert [x.dtype for x in jax.tree.leaves(sol.value)] == [jnp.float32, jnp.bfloat16]
    f = fn(sol.value, None)
    for got, want in zip(jax.tree.leaves(f), jax.tree.leaves(sol.value), strict=True):
        np.testing.assert_allclose(*(np.float32(x) for x in (got, want)), atol=0.15)


@solvers
@pytest.mark.parametrize("bad", [jnp.arange(3), jnp.ones(3, jnp.complex64)])
def test_other_numbers_are_refused(name, bad):
    with pytest.raises(TypeError, match="`z0`"):
        deqjax.fixed_point(lambda z, _: z, bad, solver=SOLVERS[name]())
