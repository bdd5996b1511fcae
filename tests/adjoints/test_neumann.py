"""The gradient by a truncated Neumann series against its closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import deqjax
from tests import helpers
from tests.helpers import dense, error, problem

SETTINGS = {"solver": deqjax.Picard(1e-14, 1e-14), "max_steps": 300}


def loss(p, adjoint):
    return helpers.loss(p, adjoint=adjoint, **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "terms", "beta"),
    [("tanh", 1, 1.0), ("tree", 4, 1.0), ("aux", 3, 0.6), ("idle", 12, 0.7)],
)
def test_gradient_is_that_of_the_truncated_series(kind, terms, beta, x64):
    p = problem(kind)
    adjoint = deqjax.NeumannAdjoint(terms, beta)
    got = eqx.filter_jit(eqx.filter_grad(loss(p, adjoint)))(p.args)
    want = dense(p)
    assert error(got, want.by(want.terms(terms, beta))) <= 1e-9
    assert error(got, want.gradient) >= 1e-5


def test_one_undamped_term_is_the_jacobian_free_gradient(x64):
    p = problem("aux")
    got = jax.jit(jax.grad(loss(p, deqjax.NeumannAdjoint(1))))(p.args)
    assert error(got, dense(p).jfb) <= 1e-12


def test_many_terms_are_exact(x64):
    p = problem("tanh")
    got = jax.jit(jax.grad(loss(p, deqjax.NeumannAdjoint(80))))(p.args)
    assert error(got, dense(p).gradient) <= 1e-9


def test_forward_mode_makes_the_same_approximation(x64):
    p = problem("aux")
    run = loss(p, deqjax.NeumannAdjoint(3, 0.8))
    direction = jax.tree.map(jnp.sin, p.args)
    got = jax.jit(lambda a: jax.jvp(run, (a,), (direction,))[1])(p.args)
    ref = dense(p)
    want = helpers.inner(ref.by(ref.terms(3, 0.8)), direction)
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_second_derivatives_have_the_series_for_every_inverse(x64):
    # z = a / (1 − b), whose Hessian is [[0, s²], [s², 2 s² z]] with s = 1 / (1 − b).
    fn = lambda z, args: args[1] * z + args[0]
    args = (jnp.array(2.0), jnp.array(0.5))
    run = lambda args: (
        deqjax.fixed_point(
            fn, jnp.zeros(()), args, adjoint=deqjax.NeumannAdjoint(3), **SETTINGS
        ).value
    )
    s, z = 1 + 0.5 + 0.25, 4.0
    want = [[0.0, s**2], [s**2, 2 * s**2 * z]]
    np.testing.assert_allclose(np.array(jax.hessian(run)(args)), want, rtol=1e-10)


def test_costs_one_evaluation_and_one_product_per_term(x64):
    p, counter = problem("tanh"), helpers.Counter()
    run = loss(p._replace(fn=counter.wrap(p.fn)), deqjax.NeumannAdjoint(4))
    jax.jit(run)(p.args)
    evals = counter.evaluations
    counter.reset()
    jax.jit(jax.grad(run))(p.args)
    assert counter.evaluations == evals + 1
    assert counter.pulls == 4


@pytest.mark.parametrize("terms", [1, 3, 9])
def test_half_precision_adds_up_in_float32(terms):
    slope, terms_wide = 0.75, sum(0.75**t for t in range(terms))
    fn = lambda z, a: jnp.bfloat16(slope) * z + a
    run = lambda a: (
        deqjax.fixed_point(
            fn,
            jnp.zeros((), jnp.bfloat16),
            a,
            solver=deqjax.Picard(1e-2, 1e-2),
            adjoint=deqjax.NeumannAdjoint(terms),
        ).value
    )
    got = jax.grad(run)(jnp.bfloat16(1.0))
    assert got.dtype == jnp.bfloat16
    # Of bfloat16, no more than the products and the last rounding.
    np.testing.assert_allclose(float(got), terms_wide, rtol=2**-8)


@pytest.mark.parametrize(
    ("args", "words"),
    [((0,), "`num_terms`.*≥ 1.*0"), ((2, 0.0), "`beta`.*0"), ((2, 2.0), "`beta`.*2")],
)
def test_arguments_are_refused_by_name(args, words):
    with pytest.raises(ValueError, match=words):
        deqjax.NeumannAdjoint(*args)
    with pytest.raises(TypeError, match="probe"):
        deqjax.NeumannAdjoint(2, probe=1)


def test_other_problems_than_fixed_points_are_refused():
    with pytest.raises(TypeError, match=r"`NeumannAdjoint`.*fixed-point.*Newton"):
        optx.root_find(
            lambda y, _: y - 1,
            optx.Newton(1e-3, 1e-3),
            jnp.zeros(()),
            adjoint=deqjax.NeumannAdjoint(2),
        )
