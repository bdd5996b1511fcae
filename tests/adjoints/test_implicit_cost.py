"""Memory of the implicit gradient, its Hessians, and that no NaN arises on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import error, problem

pytestmark = pytest.mark.optimised

SOLVER = deqjax.Picard(1e-14, 1e-14)


def temporary(adjoint, shape):
    """The compiler's count of bytes for the gradient; a row is a problem of its own."""

    def run(a):
        sol = deqjax.fixed_point(
            lambda z, a: jnp.tanh(0.5 * jnp.roll(z, 1, -1) * a + a),
            jnp.zeros(shape),
            a,
            solver=deqjax.Picard(batch_ndim=len(shape) - 1),
            adjoint=adjoint,
        )
        return jnp.sum(sol.value**2)

    compiled = jax.jit(jax.grad(run)).lower(jnp.ones(shape)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("restart", "shape"),
    [(4, (1 << 15,)), (12, (1 << 15,)), (20, (1 << 15,)), (12, (32, 1 << 10))],
)
def test_memory_beyond_one_linearisation(restart, shape):
    one = temporary(deqjax.JFBAdjoint(), shape)
    solver = GMRES(restart=restart, batch_ndim=len(shape) - 1)
    more = temporary(deqjax.ImplicitAdjoint(solver), shape) - one
    assert more <= (restart + 5) * 4 * (1 << 15)


@pytest.mark.parametrize("kind", ["tree", "aux"])
def test_hessians_are_those_of_finite_differences(kind, x64):
    p = problem(kind, n=2)
    flat, back = ravel_pytree(p.args)
    adjoint = deqjax.ImplicitAdjoint(GMRES(1e-13))
    loss = helpers.loss(p, adjoint=adjoint, solver=SOLVER, max_steps=300)
    run = lambda a: loss(back(a))
    gradient = jax.jit(jax.grad(run))
    h, eye = 1e-3, np.eye(flat.size)
    at = lambda t, e: np.asarray(gradient(flat + t * h * e))
    want = np.stack(
        [(at(-2, e) - 8 * at(-1, e) + 8 * at(1, e) - at(2, e)) / (12 * h) for e in eye]
    )
    assert error(jnp.asarray(jax.jit(jax.hessian(run))(flat)), want) <= 1e-6
    product = jax.jit(lambda a, t: jax.jvp(jax.grad(run), (a,), (t,))[1])
    t = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))
    assert error(product(flat, t), want @ np.asarray(t)) <= 1e-6


def test_nothing_calls_the_host():
    p = problem("aux", n=2)
    flat, back = ravel_pytree(p.args)
    probe = deqjax.BackwardStats()
    adjoint = deqjax.ImplicitAdjoint(initial=jnp.zeros(2), probe=probe)
    run = lambda a: helpers.loss(p, adjoint=adjoint)(back(a))
    for transform in (jax.grad, jax.hessian):
        text = jax.jit(transform(run)).lower(flat).compile().as_text()
        assert "callback" not in text


ADJOINTS = [
    deqjax.ImplicitAdjoint(),
    deqjax.ImplicitAdjoint(deqjax.linear.Neumann(), on_failure="nan"),
    deqjax.NeumannAdjoint(3),
    deqjax.PhantomAdjoint(3),
    deqjax.JFBAdjoint(),
    deqjax.UnrolledAdjoint(),
    deqjax.UnrolledAdjoint(last=3),
]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_nothing_is_nan_where_nothing_failed(jit):
    p = problem("aux", n=2)
    with jax.debug_nans(True):
        for adjoint in ADJOINTS:
            if not jit and adjoint == deqjax.UnrolledAdjoint():
                # Eagerly, its loop hands out the empty record it began with.
                continue
            run = jax.grad(helpers.loss(p, adjoint=adjoint, max_steps=30))
            got = (jax.jit(run) if jit else run)(p.args)
            assert np.isfinite(helpers.flat(got)).all()
