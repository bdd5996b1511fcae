"""What exact reversal costs, and its smallest problems."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.adjoints.test_drift import reversal
from tests.adjoints.test_exact_reversal import looped, solve
from tests.helpers import error, norm_map, problem, weigh, weights

Exact = deqjax.Reversible


def temp_bytes(run, *args):
    return run.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("beta", "bits"), [(0.5, 1), (0.75, 2)])
def test_memory_per_step_is_that_of_the_packed_digits(beta, bits):
    w, x = weights(jr.key(0), 64), jr.normal(jr.key(1), (16, 64))
    solver = Exact(None, None, beta=beta)

    def size(steps):
        run = lambda a: weigh(
            solve(norm_map, 0 * x, a, solver=solver, steps=steps).value
        )
        return temp_bytes(jax.jit(jax.grad(run)), (w, x))

    slope = (size(80) - size(16)) / 64
    digits = 2 * bits * x.size / 8
    assert 0.99 * digits <= slope <= 1.3 * digits


@pytest.mark.parametrize("tol", [None, 1e-4], ids=["static", "tested"])
def test_inference_keeps_no_digits(tol):
    p = problem("tanh", 64)
    solver = Exact(tol, tol, beta=0.9)
    run = lambda steps: jax.jit(
        lambda a: solve(p.fn, p.z0, a, solver=solver, steps=steps).value
    )
    assert temp_bytes(run(512), p.args) == temp_bytes(run(16), p.args) > 0


@pytest.mark.parametrize("steps", [1, 8, 9])
def test_a_gradient_reverses_and_does_not_recompute(steps):
    p, counter = problem("tanh"), helpers.Counter()
    run = reversal(counter.wrap(p.fn), p.z0, solver=Exact(None, None), steps=steps)
    run(p.args, deqjax.BackwardStats())
    assert (counter.evaluations, counter.pulls) == (4 * steps, 2 * steps)


@pytest.mark.parametrize("steps", [1, 12])
def test_sizes_of_one(steps):
    fn = lambda z, a: jnp.cos(a * z)
    for z0 in (jnp.ones(()), jnp.zeros((1,)), jnp.zeros((1, 1, 1))):
        run = reversal(fn, z0, solver=Exact(None, None, beta=0.9), steps=steps)
        got, stats = run(jnp.float32(0.9), deqjax.BackwardStats())
        want = jax.grad(looped(fn, steps, 0.9))(jnp.float32(0.9), z0)
        assert float(stats.drift) == 0
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("tol", [None, 1e-3], ids=["static", "tested"])
def test_gradients_of_aux(tol):
    p = problem("aux", 6)
    solver = Exact(tol, tol, beta=0.8)
    sol = solve(p.fn, p.z0, p.args, solver=solver, steps=30, has_aux=True)
    n = int(sol.stats["num_steps"]) - (tol is not None)
    run = helpers.loss(p, solver=solver, max_steps=30)
    got = jax.jit(jax.grad(run, (0, 1)))(p.args, p.z0)

    def plain(args, z0):
        y, z, aux = z0, z0, None
        for _ in range(n):
            y = helpers.mix(0.8, y, p.fn(z, args)[0])
            f, aux = p.fn(y, args)
            z = helpers.mix(0.8, z, f)
        return weigh((z, aux if tol is None else p.fn(z, args)[1]))

    assert n >= 2
    want = eqx.filter_jit(jax.grad(plain, (0, 1)))(p.args, p.z0)
    assert error(got, want) <= 3e-6
