"""The Jacobian-free gradient against its closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import deqjax
from tests import helpers
from tests.helpers import dense, error, problem

SETTINGS = {
    "solver": deqjax.Picard(1e-14, 1e-14),
    "adjoint": deqjax.JFBAdjoint(),
    "max_steps": 300,
}


@pytest.mark.parametrize("kind", ["tanh", "tree", "aux", "idle"])
def test_gradient_is_the_pull_back_of_one_evaluation(kind, x64):
    p = problem(kind)
    got = eqx.filter_jit(eqx.filter_grad(helpers.loss(p, **SETTINGS)))(p.args)
    want = dense(p)
    assert error(got, want.jfb) <= 1e-12
    assert error(got, want.gradient) >= 0.05


def test_forward_mode_makes_the_same_approximation(x64):
    p = problem("tanh")

    def value(args):
        return deqjax.fixed_point(p.fn, p.z0, args, **SETTINGS).value

    t = jax.tree.map(jnp.sin, p.args)
    z = helpers.settle(p)
    want = jax.jvp(lambda a: p.fn(z, a), (p.args,), (t,))[1]
    assert error(jax.jvp(value, (p.args,), (t,))[1], want) <= 1e-12


def test_costs_one_evaluation_and_one_product(x64):
    p, counter = problem("tanh"), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    run = helpers.loss(q, **SETTINGS)
    jax.jit(run)(p.args)
    evals = counter.evaluations
    counter.reset()
    jax.jit(jax.grad(run))(p.args)
    assert counter.evaluations == evals + 1
    assert counter.pulls == 1


def test_nothing_calls_the_host():
    p = problem("tanh")
    run = jax.jit(jax.grad(helpers.loss(p, adjoint=deqjax.JFBAdjoint())))
    assert "callback" not in run.lower(p.args).compile().as_text()


def test_the_tangent_of_a_pytree_has_its_structure(x64):
    p = problem("tree")
    value = lambda a: deqjax.fixed_point(p.fn, p.z0, a, **SETTINGS).value
    got = jax.jvp(value, (p.args,), (p.args,))[1]
    z = helpers.settle(p)
    want = jax.jvp(lambda a: p.fn(z, a), (p.args,), (p.args,))[1]
    assert jax.tree.structure(got) == jax.tree.structure(p.z0)
    assert error(ravel_pytree(got)[0], ravel_pytree(want)[0]) <= 1e-12


def test_other_problems_than_fixed_points_are_refused():
    with pytest.raises(TypeError, match=r"`JFBAdjoint`.*fixed-point.*Newton"):
        optx.root_find(
            lambda y, _: y - 1,
            optx.Newton(1e-3, 1e-3),
            jnp.zeros(()),
            adjoint=deqjax.JFBAdjoint(),
        )
