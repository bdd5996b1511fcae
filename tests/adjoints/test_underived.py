"""Statistics and states have no derivative, and say so by name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests.helpers import SOLVERS

ADJOINTS = {
    "implicit": ("picard", deqjax.ImplicitAdjoint()),
    "jfb": ("picard", deqjax.JFBAdjoint()),
    "shine": ("broyden", deqjax.ShineAdjoint()),
    "phantom": ("picard", deqjax.PhantomAdjoint(2)),
    "unrolled": ("picard", deqjax.UnrolledAdjoint()),
    "truncated": ("picard", deqjax.UnrolledAdjoint(last=2)),
    "reversible": ("reversible", deqjax.ReversibleAdjoint()),
}
A = jnp.array([0.1, 0.5])
adjoints = pytest.mark.parametrize("name", ADJOINTS)
# As JAX and equinox report an error of a running program.
raises = pytest.raises(
    (RuntimeError, ValueError), match=r"`sol\.stats\['residual'\]` has no derivative"
)


def solve(a, name="jfb"):
    solver, adjoint = ADJOINTS[name]
    f = lambda z, a: 0.5 * jnp.tanh(z) + a
    return deqjax.fixed_point(
        f, jnp.zeros(2), a, solver=SOLVERS[solver](), adjoint=adjoint, max_steps=9
    )


def pair(a, name="jfb"):
    sol = solve(a, name)
    return jnp.sum(sol.value), sol.stats["residual"]


@adjoints
def test_a_statistic_in_a_loss_is_an_error(name):
    with raises:
        jax.grad(lambda a: sum(pair(a, name)))(A)


@adjoints
def test_statistics_besides_a_loss_are_no_error(name):
    def run(a):
        other = lambda a: (a[0], a[1])
        return jax.lax.cond(a[0] < 1, lambda a: pair(a, name), other, a)

    # The branch pulls a cotangent of zeros back.
    _, gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(A)
    assert np.all(np.isfinite(gradient))


def test_in_loops_and_batches():
    def run(a, place):
        def step(carry, _):
            value, residual = pair(carry[0])
            return (a + value, carry[1] + residual), residual

        last, every = jax.lax.scan(step, (a, jnp.zeros(())), None, length=2)
        return jnp.sum((*last, every)[place])

    assert np.all(np.isfinite(jax.grad(run)(A, 0)))
    for place in (1, 2):
        with raises:
            jax.grad(run)(A, place)
    with raises:
        jax.grad(lambda a: jnp.sum(jax.vmap(pair)(a)[1]))(jnp.stack([A, A]))


def test_a_state_in_a_loss_is_an_error():
    floats = lambda a: eqx.filter(solve(a).state, eqx.is_inexact_array)
    with pytest.raises((RuntimeError, ValueError), match=r"`sol\.state\.record"):
        jax.grad(lambda a: jnp.sum(floats(a).record.sizes))(A)


def test_forward_mode_and_second_derivatives():
    _, (value, residual) = jax.jvp(pair, (A,), (A,))
    assert np.isfinite(value)
    assert np.isinf(residual)
    with jax.debug_nans(True):
        hessian, _ = jax.jit(jax.hessian(pair, has_aux=True))(A)
    assert np.all(np.isfinite(hessian))


def test_no_callback_where_no_statistic_is_differentiated():
    run = jax.jit(jax.value_and_grad(pair, has_aux=True))
    assert "callback" not in run.lower(A).as_text()


@pytest.mark.parametrize("name", SOLVERS)
def test_without_a_test_nothing_has_converged(name):
    f = lambda z, a: 0.5 * z + a
    sol = deqjax.fixed_point(f, jnp.zeros(2), A, solver=SOLVERS[name](None, None))
    assert not bool(sol.stats["converged"])
    assert "not tested" in deqjax.summary(sol)
