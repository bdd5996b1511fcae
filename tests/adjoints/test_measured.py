"""What a probe calls converged is so, whatever the Jacobian and the arithmetic."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax

pytestmark = pytest.mark.optimised

N, COUNT = 16, 300
# State, products inside f, tolerance of the linear solve.
ARITHMETIC = [
    ("bfloat16", "bfloat16", 1e-2),
    ("float16", "float16", 1e-2),
    ("float32", "float32", 1e-5),
    ("float32", "bfloat16", 1e-5),
    ("float32", "bfloat16", 1e-2),
]


def jacobians(count):
    """Symmetric, complex, non-normal, near I, orthogonal and nearly singular ones."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        radius, noise = (0.5, 0.9, 0.99, 0.999, 0.9999)[i % 5], rng.normal(size=(N, N))
        q = np.linalg.qr(rng.normal(size=(N, N)))[0]
        few = np.r_[radius, rng.uniform(-0.5, 0.5, N - 1)]
        least = np.r_[1 - 1e-6, np.linspace(0, radius, N - 1)]
        out.append(
            (
                (q * np.linspace(-radius, radius, N)) @ q.T,
                noise * radius / np.abs(np.linalg.eigvals(noise)).max(),
                q @ (np.diag(few) + np.triu(noise, 1)) @ q.T,
                radius * np.eye(N) + 0.5 * (1 - radius) * q,
                radius * q,
                (q * least) @ q.T,
            )[i % 6]
        )
    return np.stack(out), rng.normal(size=(count, N))


@ft.cache
def gradients(dtype, inner, tol):
    """(J, z̄, zeros) ↦ λ and the record, one compiled program for all of a batch."""
    solver = deqjax.Picard(rtol=None, atol=None)

    def run(zero, probe, matrix, weights):
        def f(z, _):
            return (matrix @ z.astype(inner)).astype(dtype) + zero

        linear = deqjax.linear.GMRES(tol)
        adjoint = deqjax.ImplicitAdjoint(linear, probe=probe)
        start = jnp.zeros_like(zero)
        sol = deqjax.fixed_point(f, start, solver=solver, max_steps=1, adjoint=adjoint)
        return jnp.sum(sol.value * weights)

    return jax.jit(jax.vmap(jax.grad(run, argnums=(0, 1))))


def solved(arithmetic, count):
    """The true relative residuals, and the record of the backward passes."""
    dtype, inner, _ = arithmetic
    matrices, weights = jacobians(count)
    matrices, weights = jnp.asarray(matrices, inner), jnp.asarray(weights, dtype)
    probe = deqjax.BackwardStats((count,))
    run = gradients(*arithmetic)
    found, stats = run(jnp.zeros_like(weights), probe, matrices, weights)
    j, b, x = (np.asarray(a, np.float64) for a in (matrices, weights, found))
    rest = b - x + np.einsum("nij,ni->nj", j, x)
    return np.linalg.norm(rest, axis=1) / np.linalg.norm(b, axis=1), stats


def check(arithmetic, count):
    tol = arithmetic[-1]
    true, stats = solved(arithmetic, count)
    converged, claimed = stats.converged > 0, np.asarray(stats.relative_residual)
    assert (true[converged] <= 3 * tol).all()
    assert (claimed[converged] <= tol).all()
    assert (true[~converged] <= 3 * claimed[~converged]).all()
    # And not by doubting everything.
    assert converged[true <= 0.5 * tol].all()
    hopeless = arithmetic[1:] == ("bfloat16", 1e-5)
    assert converged.mean() >= (0 if hopeless else 0.2)


@pytest.mark.parametrize("arithmetic", ARITHMETIC[::2])
def test_what_converged_is_below_its_tolerance(arithmetic):
    check(arithmetic, 30)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_three_hundred_problems_are_told_truly(arithmetic):
    check(arithmetic, COUNT)


# --- problems that are not independent ------------------------------------------------


@pytest.mark.parametrize("kind", ["batch_ndim", "pmean"])
def test_problems_that_leak_into_one_another_are_not_converged(kind):
    n, m, rng = 4, 6, np.random.default_rng(0)
    matrix = 0.5 * rng.normal(size=(m, m)) / np.sqrt(m)
    weights = rng.normal(size=(n, m))
    a, batched = jnp.asarray(matrix, jnp.float32), kind == "batch_ndim"
    solver = deqjax.Picard(1e-6, 1e-6, batch_ndim=int(batched))

    def one(zero, probe, leak, c):
        mean = lambda z: jnp.mean(z, 0) if batched else jax.lax.pmean(z, "problem")
        f = lambda z, _: z @ a + leak * mean(z) + zero
        adjoint = deqjax.ImplicitAdjoint(probe=probe)
        start = jnp.zeros_like(zero)
        sol = deqjax.fixed_point(f, start, solver=solver, adjoint=adjoint)
        return jnp.sum(sol.value * c)

    def loss(zero, probe, leak, c):
        if batched:
            return one(zero, probe, leak, c)
        each = jax.vmap(one, (0, 0, None, 0), axis_name="problem")
        return jnp.sum(each(zero, probe, leak, c))

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for leak, scales in [
        (0.3, (1, 1, 1, 1)),
        (0.3, (1, 1, 4, 1e-3)),
        (0.3, (1, 0, 0, 0)),
        (1e-2, (1, 0, 0, 0)),
        (1e-9, (1, 1, 4, 1)),
        (0.0, (1, 1, 4, 0)),
    ]:
        c = np.asarray(scales)[:, None] * weights
        found, stats = run(
            jnp.zeros((n, m)),
            deqjax.BackwardStats((n,)),
            jnp.float32(leak),
            jnp.asarray(c, jnp.float32),
        )
        mixing = np.kron(np.full((n, n), 1 / n), np.eye(m))
        j = np.kron(np.eye(n), matrix) + leak * mixing
        want = np.linalg.solve(np.eye(n * m) - j, c.ravel())
        wrong = np.linalg.norm(np.ravel(found) - want) / np.linalg.norm(want)
        if bool(np.all(stats.converged)):
            assert wrong <= 1e-5
        assert bool(np.all(stats.converged)) == (leak < 1e-6)
        if leak >= 1e-6:
            assert float(np.max(stats.relative_residual)) >= 1e-3


def test_the_last_product_measures_what_the_others_have_led_to():
    matrices, weights = jacobians(1)
    matrix = jnp.asarray(matrices[0], jnp.float32)
    for most in (2, 3, 5):
        made = []

        @jax.custom_vjp
        def watched(z):
            return z

        def back(_, ct, made=made):
            jax.debug.callback(lambda _: made.append(1), ct)
            return (ct,)

        watched.defvjp(lambda z: (z, None), back)

        def run(zero, probe, most=most, watched=watched):
            f = lambda z, _: matrix @ watched(z) + zero
            linear = deqjax.linear.GMRES(0.0, max_steps=most)
            adjoint = deqjax.ImplicitAdjoint(linear, probe=probe)
            sol = deqjax.fixed_point(
                f, jnp.zeros(N), solver=deqjax.Picard(1e-6, 1e-6), adjoint=adjoint
            )
            return jnp.sum(sol.value * jnp.asarray(weights[0], jnp.float32))

        grad = jax.jit(jax.grad(run, argnums=(0, 1)))
        found, stats = grad(jnp.zeros(N), deqjax.BackwardStats())
        jax.effects_barrier()
        # One pull-back makes the gradient of what f holds.
        assert float(stats.num_products) == most == len(made) - 1
        b, x = weights[0], np.asarray(found, np.float64)
        true = np.linalg.norm(b - x + matrices[0].T @ x) / np.linalg.norm(b)
        np.testing.assert_allclose(stats.relative_residual, true, rtol=1e-4)
        assert float(stats.converged) == 0
