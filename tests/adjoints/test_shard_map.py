"""Solves and gradients in the program of one device, with JAX's checks and without."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import deqjax

W, X = 0.2 * jr.normal(jr.key(0), (3, 3)), jr.normal(jr.key(1), (8, 3))
STATIC = {"rtol": None, "atol": None}
CASES = {
    "anderson": (deqjax.Anderson(batch_ndim=1), deqjax.ImplicitAdjoint()),
    "broyden": (deqjax.Broyden(batch_ndim=1), deqjax.ImplicitAdjoint()),
    "newton": (deqjax.NewtonKrylov(batch_ndim=1), deqjax.ImplicitAdjoint()),
    "neumann": (deqjax.Picard(batch_ndim=1), deqjax.NeumannAdjoint(3)),
    "phantom": (deqjax.Picard(**STATIC), deqjax.PhantomAdjoint(3)),
    "unrolled": (deqjax.Picard(batch_ndim=1), deqjax.UnrolledAdjoint()),
    "last": (deqjax.Picard(**STATIC), deqjax.UnrolledAdjoint(last=2)),
    "reversible": (deqjax.Reversible(batch_ndim=1), deqjax.ReversibleAdjoint()),
    "static": (deqjax.Reversible(**STATIC), deqjax.ReversibleAdjoint()),
}


def solve(solver, adjoint, x, w):
    """The solution; f has a constant of its own, and the start is one."""
    shift = 0.1 * jnp.ones(3)
    f = lambda z, x: jnp.tanh(z @ w + x + shift)
    settings = {"solver": solver, "adjoint": adjoint, "max_steps": 20}
    return deqjax.fixed_point(f, jnp.zeros(x.shape), x, **settings).value


def mesh():
    assert jax.device_count() > 1
    return jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))


def skip_unless_known(implicit):
    """Skip where JAX itself loses sight of what varies from device to device."""
    if jax.__version_info__ < (0, 9):
        pytest.skip("JAX up to 0.8: `eval_shape` does not say what varies")
    if implicit and jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12: lowering of `custom_linear_solve` forgets what varies")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", [True, False])
def test_gradients_are_those_of_one_device(name, check):
    if check:
        skip_unless_known(name in ("anderson", "broyden", "newton", "neumann"))
    alone = ft.partial(solve, *CASES[name])
    specs = {"mesh": mesh(), "in_specs": (P("d"), P()), "out_specs": P("d")}
    parts = jax.shard_map(alone, **specs, check_vma=check)
    run = lambda f: jax.jit(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1)))(X, W)
    for got, want in zip(run(parts), run(alone), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)


def test_a_probe_has_the_record_of_every_problem():
    skip_unless_known(implicit=True)
    solver, sizes = deqjax.Anderson(batch_ndim=1), (8,)

    def gradient(x, w, probe):
        def loss(w, probe):
            adjoint = deqjax.ImplicitAdjoint(probe=probe)
            return jnp.sum(solve(solver, adjoint, x, w) ** 2)

        return jax.grad(loss, argnums=1)(w, probe)

    specs = {"in_specs": (P("d"), P(), P("d")), "out_specs": P("d")}
    run = jax.jit(jax.shard_map(gradient, mesh=mesh(), **specs))
    stats = run(X, W, deqjax.BackwardStats(sizes))
    want = jax.jit(gradient)(X, W, deqjax.BackwardStats(sizes))
    assert np.all(stats.converged == 1)
    assert np.all(stats.relative_residual <= 1e-5)
    np.testing.assert_allclose(stats.forward_residual, want.forward_residual, rtol=1e-3)
