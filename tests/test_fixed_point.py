"""The entry point: what it accepts, refuses and returns."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import deqjax
from deqjax import _fixed_point
from tests import helpers
from tests.helpers import OK, error, identical, problem

half = lambda z, _: 0.5 * z + 1


# --- defaults -------------------------------------------------------------------------


def test_defaults_are_anderson_and_the_implicit_gradient(x64):
    p = problem("tanh")
    sol = deqjax.fixed_point(p.fn, p.z0, p.args)
    want = deqjax.fixed_point(
        p.fn,
        p.z0,
        p.args,
        solver=deqjax.Anderson(1e-8, 1e-10, history=5),
        adjoint=deqjax.ImplicitAdjoint(),
        max_steps=64,
    )
    assert identical(sol.value, want.value)
    assert int(sol.stats["max_steps"]) == 64
    gradient = jax.grad(lambda a: helpers.loss(p)(a))(p.args)
    # Where the solve stops the formula is off by the order of the residual.
    assert 1e-12 < error(gradient, helpers.dense(p).gradient) <= 1e-7


def test_default_adjoint_of_a_reversible_solver_is_the_reversible_one(x64):
    # Two steps: the gradient of the steps taken is not that of the fixed point.
    p = problem("tanh")
    solver = deqjax.Reversible(None, None)
    run = helpers.loss(p, solver=solver, max_steps=2)
    want = jax.grad(lambda a: helpers.weigh(helpers.reversible(p.fn, p.z0, a, 2, 0.5)))(
        p.args
    )
    assert error(jax.grad(run)(p.args), want) <= 1e-9


def test_statistics_have_these_names():
    sol = deqjax.fixed_point(half, jnp.zeros(2))
    names = {"num_steps", "max_steps", "num_evals", "residual", "relative_residual"}
    assert set(sol.stats) == names | {"converged"}
    assert sol.aux is None


def test_python_numbers_are_a_start():
    sol = deqjax.fixed_point(lambda z, _: {"a": 0.5 * z["a"] + 1}, {"a": 0.0})
    assert abs(float(sol.value["a"]) - 2) <= 1e-3


def test_jit_changes_nothing():
    p = problem("tree")
    run = lambda z, a: deqjax.fixed_point(p.fn, z, a).value
    assert error(jax.jit(run)(p.z0, p.args), run(p.z0, p.args)) <= 1e-6


# --- where gradients flow -------------------------------------------------------------


class Cell(eqx.Module):
    w: jax.Array
    x: jax.Array
    name: str = "cell"
    order: int = 1

    def __call__(self, z, args):
        return helpers.tanh_map(z, (self.w, self.x))


tight = {"solver": deqjax.Picard(1e-14, 1e-14), "max_steps": 200}


def test_gradients_reach_args_modules_and_closures_alike(x64):
    p = problem("tanh")
    adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-13))
    want = helpers.dense(p).gradient

    def by_module(args):
        q = p._replace(fn=Cell(*args), args=None)
        return helpers.loss(q, adjoint=adjoint, **tight)(None)

    def by_closure(args):
        q = p._replace(fn=lambda z, _: p.fn(z, args), args=None)
        return helpers.loss(q, adjoint=adjoint, **tight)(None)

    def by_both(args):
        q = p._replace(fn=lambda z, x: p.fn(z, (args[0], x)))
        return helpers.loss(q, adjoint=adjoint, **tight)(args[1])

    for run in (by_module, by_closure, by_both):
        assert error(jax.grad(run)(p.args), want) <= 1e-9
    module = eqx.filter_grad(
        lambda m: helpers.loss(p._replace(fn=m), adjoint=adjoint, **tight)(None)
    )(Cell(*p.args))
    assert error((module.w, module.x), want) <= 1e-9
    assert module.order is None


# --- throw ----------------------------------------------------------------------------


def test_throw_raises_under_jit_too():
    solve = ft.partial(deqjax.fixed_point, half, throw=True, max_steps=1)
    run = jax.jit(lambda z: solve(z).value)
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        jax.block_until_ready(run(jnp.zeros(2)))


@pytest.mark.parametrize("run", [lambda f: f, jax.grad])
def test_throw_raises_at_the_call_with_nothing_but_the_reason(run):
    """Without an outer `jax.jit`, and under `jax.grad` as well."""
    solve = ft.partial(deqjax.fixed_point, half, throw=True, max_steps=1)
    with pytest.raises(RuntimeError, match="maximum number of steps") as caught:
        run(lambda z: jnp.sum(solve(z).value))(jnp.zeros(2))
    assert "callback" not in str(caught.value).lower()
    assert "XlaRuntimeError" not in str(caught.value)


def test_without_throw_the_result_says_so():
    sol = deqjax.fixed_point(half, jnp.zeros(2), max_steps=1)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert sol.result != OK


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"z0": {}}, ValueError, "`z0` has no leaves"),
        ({"z0": {"a": jnp.array(1)}}, TypeError, r"`z0\['a'\]`.*floating.*int32"),
        ({"z0": 1j}, TypeError, "`z0`.*real.*complex"),
        ({"z0": ("x",)}, TypeError, r"`z0\[0\]` must be an array.*str"),
        ({"fn": lambda z, _: (z, z)}, ValueError, "structure.*has_aux=True"),
        ({"fn": lambda z, _: z[:2]}, ValueError, r"shape of `z0`.*\(3,\).*\(2,\)"),
        (
            {"fn": lambda z, _: z.astype(jnp.bfloat16)},
            ValueError,
            "dtype of `z0`.*float32.*bfloat16",
        ),
        ({"fn": lambda z, _: z, "has_aux": True}, ValueError, r"pair `\(z, aux\)`"),
        ({"max_steps": 0}, ValueError, "`max_steps`.*≥ 1.*0"),
        ({"solver": deqjax.Picard}, TypeError, "`solver`.*instance"),
        ({"solver": optx.Newton}, TypeError, "`solver`.*root finder.*instance"),
        ({"options": {"budget": 3}}, ValueError, r"`options`.*\['budget'\].*Anderson"),
        ({"options": {"step_budget": 1.5}}, ValueError, "step_budget.*integer.*1.5"),
        (
            {"options": {"step_budget": jnp.arange(2)}},
            ValueError,
            "step_budget.*integer",
        ),
        ({"options": {"record": 1}}, ValueError, "record.*True or False.*1"),
    ],
)
def test_bad_input_is_refused_by_name(kwargs, kind, words):
    given = {"fn": half, "z0": jnp.zeros(3), **kwargs}
    with pytest.raises(kind, match=words):
        deqjax.fixed_point(**given)


def test_what_is_not_a_function_or_an_adjoint_is_refused():
    # In these tests the annotations of `fixed_point` refuse them first.
    check = ft.partial(_fixed_point._check, solver=deqjax.Picard(), max_steps=3)
    check(half, adjoint=deqjax.JFBAdjoint())
    with pytest.raises(TypeError, match="`fn` must be callable.*int"):
        check(3, adjoint=deqjax.JFBAdjoint())
    with pytest.raises(TypeError, match="`adjoint`.*instance"):
        check(half, adjoint=deqjax.JFBAdjoint)


def test_the_leaf_of_another_shape_is_named():
    fn = lambda z, _: {"a": z["a"], "b": z["b"][:1]}
    with pytest.raises(ValueError, match=r"`\['b'\]`.*\(2,\).*\(1,\)"):
        deqjax.fixed_point(fn, {"a": jnp.ones(2), "b": jnp.ones(2)})


def test_reversible_adjoint_needs_the_reversible_solver():
    with pytest.raises(ValueError, match=r"Reversible.*Anderson"):
        deqjax.fixed_point(half, jnp.ones(2), adjoint=deqjax.ReversibleAdjoint())
