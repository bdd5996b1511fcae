"""What it takes to write a solver: the Chebyshev iteration, as in the guide."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import deqjax

RADIUS, N = 0.95, 8


class Chebyshev(deqjax.solvers.AbstractSolver):
    """z_{k+1} = z_{k-1} + ω_{k+1} (f(z_k) − z_{k-1}); J symmetric of a known radius."""

    radius: float
    rtol: float | str | None = "auto"
    atol: float | str | None = "auto"
    min_steps: int = 0
    batch_ndim: int = 0

    def init_memory(self, z, options):
        return z  # z_{k-1}

    def update(self, z, f, memory, trial):
        # ω = 2 T_k(1/ϱ) / (ϱ T_{k+1}(1/ϱ)), written for large k.
        k, decay = (
            trial.index.astype(jnp.float32),
            jnp.exp(-jnp.arccosh(1 / self.radius)),
        )
        ratio = decay * (1 + decay ** (2 * k)) / (1 + decay ** (2 * k + 2))
        omega = jnp.where(k == 0, 1, 2 * ratio / self.radius)
        step = lambda old, f: old + (omega * (f - old)).astype(old.dtype)
        return jtu.tree_map(step, memory, f), z


def system():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    return jnp.asarray((q * np.linspace(-RADIUS, RADIUS, N)) @ q.T, jnp.float32)


def solve(b, solver=None, **settings):
    f = lambda z, b: {"z": z["z"] @ system() + b}
    solver = Chebyshev(RADIUS, 1e-5, 0.0) if solver is None else solver
    return deqjax.fixed_point(f, {"z": 0 * b}, b, solver=solver, **settings)


def test_steps_are_those_of_the_textbook():
    b, a, rho = jr.normal(jr.key(0), (N,)), np.asarray(system(), np.float64), RADIUS
    z, old, omega = np.asarray(b, np.float64), np.zeros(N), 1.0
    for k in range(1, 12):
        omega = 1 / (1 - rho**2 / 2) if k == 1 else 1 / (1 - rho**2 * omega / 4)
        z, old = old + omega * (z @ a + np.asarray(b) - old), z
    # A solve that keeps the best iterate has evaluated the last one.
    settings = {"max_steps": 13, "options": {"record": True}}
    found = solve(b, Chebyshev(RADIUS, None, None), **settings).stats
    residual = np.linalg.norm(z @ a + np.asarray(b) - z)
    np.testing.assert_allclose(found["residual_history"][12], residual, rtol=1e-3)


@pytest.mark.parametrize("batch_ndim", [0, 1])
def test_it_has_all_that_a_solver_has(batch_ndim):
    b = jr.normal(jr.key(1), (3, N) if batch_ndim else (N,))
    solver = Chebyshev(RADIUS, 1e-5, 0.0, batch_ndim=batch_ndim)
    loss = lambda b: jnp.sum(solve(b, solver).value["z"])
    sol, inverse = solve(b, solver), np.linalg.inv(np.eye(N) - system())
    assert np.all(sol.stats["converged"])
    plain = solve(b, deqjax.Picard(1e-5, 0.0))
    assert sol.stats["num_evals"] < plain.stats["num_evals"]
    np.testing.assert_allclose(sol.value["z"], b @ inverse, rtol=1e-2, atol=1e-3)
    want = np.broadcast_to(inverse.sum(1), b.shape)
    np.testing.assert_allclose(jax.grad(loss)(b), want, rtol=1e-3)
    lanes = jax.vmap(lambda b: solve(b).value["z"])(b.reshape(-1, N))
    np.testing.assert_allclose(lanes.reshape(b.shape), sol.value["z"], rtol=1e-4)
