"""Solves within solves, and derivatives that reach a solve by its cotangent alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax

ADJOINTS = [
    deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-13)),
    deqjax.NeumannAdjoint(90),
]
W = 0.3 * np.cos(np.arange(9.0)).reshape(3, 3)
TIGHT = deqjax.Picard(1e-14, 1e-14)


def settle(w, adjoint):
    f = lambda z, w: jnp.tanh(w @ z + 0.5)
    return deqjax.fixed_point(
        f, jnp.zeros(3), w, solver=TIGHT, adjoint=adjoint, max_steps=300
    ).value


def jacobian(w):
    """∂z*/∂w, dense."""
    z = np.zeros(3)
    for _ in range(300):
        z = np.tanh(w @ z + 0.5)
    slope = np.diag(1 - z**2)
    return np.einsum("ij,k->ijk", np.linalg.solve(np.eye(3) - slope @ w, slope), z)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_mixed_derivatives_of_a_linear_head(adjoint, x64):
    """∂²/∂c∂w of ⟨c, z*(w)⟩ is ∂z*/∂w, in every order of modes."""
    pull = jax.grad(lambda w, c: jnp.vdot(c, settle(w, adjoint)))
    want, c = jacobian(W), jnp.arange(3.0)
    for mode in (jax.jacrev, jax.jacfwd):
        got = jax.jit(mode(pull, argnums=1))(W, c)
        np.testing.assert_allclose(jnp.moveaxis(got, -1, 0), want, atol=1e-9)
    # And the pull-back of a pull-back is the Jacobian again.
    _, back = jax.vjp(lambda w: settle(w, adjoint), W)
    t = np.sin(np.arange(9.0)).reshape(3, 3)
    (pushed,) = jax.linear_transpose(lambda ct: back(ct)[0], c)(t)
    np.testing.assert_allclose(pushed, np.einsum("ijk,jk->i", want, t), atol=1e-9)


def test_a_solve_within_f(x64):
    inner = lambda u, w: (
        deqjax.fixed_point(
            lambda v, a: jnp.tanh(a[0] * v + a[1]), jnp.zeros(3), (w, u), solver=TIGHT
        ).value
    )

    def loss(w, z0):
        f = lambda z, w: 0.5 * inner(z, w) + 1
        sol = deqjax.fixed_point(f, z0, w, solver=TIGHT, max_steps=300)
        return jnp.sum(jnp.cos(sol.value))

    run, h = jax.jit(loss), 1e-5
    want = (run(0.1 + h, jnp.zeros(3)) - run(0.1 - h, jnp.zeros(3))) / (2 * h)
    assert abs(want) > 1e-2
    slope = jax.jit(jax.value_and_grad(jax.grad(loss)))
    got, second = slope(0.1, jnp.zeros(3))
    np.testing.assert_allclose(got, want, rtol=1e-8)
    forward = jax.jit(jax.jacfwd(loss))(0.1, jnp.zeros(3))
    np.testing.assert_allclose(forward, want, rtol=1e-8)
    up, down = (slope(0.1 + t, jnp.zeros(3))[0] for t in (h, -h))
    np.testing.assert_allclose(second, (up - down) / (2 * h), rtol=1e-6)
