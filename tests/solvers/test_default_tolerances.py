"""The tolerances of solvers that are given none follow the dtype of the state."""

import contextlib

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax import Anderson, Broyden, NewtonKrylov, Picard, Reversible

SOLVERS = [Anderson, Broyden, NewtonKrylov, Picard, Reversible]
RTOL = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4, "float64": 1e-8}


@contextlib.contextmanager
def precise(wanted):
    """With float64, or as it is."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted or before)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def layer(z, args):
    w, x = args
    return jnp.tanh(z @ w + x)


def problem(dtype, radius, seed):
    """z ↦ tanh(z W + x) for 8 examples, W a rotation times `radius`."""
    key, other = jr.split(jr.key(seed))
    w = radius * np.linalg.qr(jr.normal(key, (64, 64)))[0]
    return jnp.asarray(w, dtype), jr.normal(other, (8, 64), dtype)


def relative_residual(z, args):
    """That of the rounded map, in float64 and by NumPy."""
    f, z = (np.asarray(x, np.float64) for x in (layer(z, args), z))
    return np.linalg.norm(f - z) / np.linalg.norm(f)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("radius", [0.5, 0.75])
def test_the_default_is_met_before_the_last_step(solver, dtype, radius):
    with precise(dtype == "float64"):
        for seed in range(3):
            args = problem(dtype, radius, seed)
            z0 = jnp.zeros((8, 64), dtype)
            sol = deqjax.fixed_point(layer, z0, args, solver=solver(), max_steps=64)
            assert bool(sol.stats["converged"])
            assert int(sol.stats["num_steps"]) < 64
            # The rounding of two programs may differ in half precision.
            slack = 1.5 if dtype in ("bfloat16", "float16") else 1.02
            assert relative_residual(sol.value, args) <= slack * RTOL[dtype]


def halving(z, _):
    return jax.tree.map(lambda x: 0.5 * (x + 1), z)


def steps(z0, solver=None):
    """The steps of zₖ₊₁ = (zₖ + 1) / 2 from 0, whose k-th residual is 2⁻ᵏ⁻¹."""
    solver = Picard() if solver is None else solver
    return int(deqjax.fixed_point(halving, z0, solver=solver).stats["num_steps"])


def expected(rtol, atol):
    """As many as the stopping rule says, in exact arithmetic."""
    passes = lambda k: 0.5 ** (k + 1) <= atol + rtol * (1 - 0.5 ** (k + 1))
    return next(k for k in range(64) if passes(k)) + 1


@pytest.mark.parametrize("dtype", RTOL)
def test_the_default_of_each_dtype(dtype):
    with precise(dtype == "float64"):
        z0 = jnp.zeros((), dtype)
        assert steps(z0) == expected(RTOL[dtype], RTOL[dtype] / 100)
        # A number wins, each on its own.
        assert steps(z0, Picard(0.1, 0.05)) == expected(0.1, 0.05)
        assert steps(z0, Picard(rtol=0.1)) == expected(0.1, RTOL[dtype] / 100)
        assert steps(z0, Picard(atol=0.1)) == expected(RTOL[dtype], 0.1)


def test_the_coarsest_dtype_of_a_state_decides():
    mixed = {"fine": jnp.zeros(()), "coarse": jnp.zeros((), jnp.bfloat16)}
    assert steps(mixed) == expected(2e-2, 2e-4) < steps(mixed["fine"])


def test_what_is_no_tolerance_is_refused():
    with pytest.raises(ValueError, match='`rtol` must be.*"auto".*-1.0'):
        Picard(rtol=-1.0)
    with pytest.raises(ValueError, match="both None.*atol='auto'"):
        Picard(rtol=None)
