"""Eigenvalues and singular values against dense ones of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax.diagnostics import singular_values, spectrum

MATRICES, SIZE = 50, 60


def linear(z, a):
    return jnp.einsum("bij,bj->bi", a, z, precision="highest")


def non_normal():
    """50 matrices of dimension 20 to 60, padded by zeros, of spectral radius 0.95."""
    rng = np.random.default_rng(0)
    out, pairs = np.zeros((MATRICES, SIZE, SIZE)), 0
    for i in range(MATRICES):
        n = rng.integers(20, SIZE + 1)
        a = rng.normal(size=(n, n)) / np.sqrt(n)
        a += 0.3 * np.triu(rng.normal(size=(n, n)), 1)
        values = np.linalg.eigvals(a)
        largest = values[np.argmax(np.abs(values))]
        pairs += abs(largest.imag) > 1e-6
        out[i, :n, :n] = 0.95 / abs(largest) * a
    return out, pairs


@pytest.fixture(params=["float32", "float64"])
def real(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield jnp.dtype(request.param)
    jax.config.update("jax_enable_x64", False)


def test_the_spectral_radius_of_non_normal_matrices_is_the_dense_one(real):
    matrices, pairs = non_normal()
    assert pairs > 30
    norms = np.linalg.norm(matrices, 2, axis=(1, 2))
    assert np.median(norms) > 2  # far from normal
    z = jnp.zeros((MATRICES, SIZE), real)
    got = spectrum(linear, z, jnp.asarray(matrices, real), num=2, batch_ndim=1)
    assert got.eigenvalues.shape == (MATRICES, 2)
    assert bool(jnp.all(got.converged))
    radius = np.asarray(got.spectral_radius)
    dense = np.abs(np.linalg.eigvals(matrices)).max(1)
    assert np.sum(np.abs(radius - dense) < 1e-3) == MATRICES
    tight = 1e-4 if real == jnp.float32 else 1e-7
    np.testing.assert_allclose(radius, dense, atol=tight)
    # The residual bounds the distance to the spectrum as the condition has it.
    for value, error, a in zip(
        np.asarray(got.eigenvalues), np.asarray(got.error), matrices, strict=True
    ):
        exact = np.linalg.eigvals(a)
        distance = np.abs(value[:, None] - exact).min(1)
        assert np.all(distance <= 3 * error + 50 * jnp.finfo(real).eps)


def test_what_has_not_converged_is_marked():
    """A radius so crowded that a few vectors without restarts cannot resolve it."""
    a = jnp.diag(jnp.linspace(0.5, 0.9, 100))
    f = lambda z, a: a @ z
    short = spectrum(f, jnp.zeros(100), a, num=3, basis=6, max_restarts=0)
    assert not bool(jnp.any(short.converged))
    # The residual reported is that of the matrix, to a normal one the distance.
    for value, residual in zip(short.eigenvalues, short.residual, strict=True):
        distance = np.abs(np.diag(a) - np.asarray(value).real).min()
        assert distance <= float(residual) + 1e-6
    long = spectrum(f, jnp.zeros(100), a, num=3, basis=12)
    assert bool(jnp.all(long.converged))
    np.testing.assert_allclose(
        np.asarray(long.eigenvalues).real, np.asarray(jnp.diag(a))[:-4:-1], rtol=1e-5
    )
    assert "no" in str(short)
    assert "no" not in str(long).split("converged")[1]


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
def test_states_are_trees_and_maps_may_be_nonlinear(mode):
    def f(z, args):
        a, b = z["a"], z["b"][0]
        return {"a": jnp.tanh(a + 0.5 * b.sum()), "b": (0.3 * jnp.sin(b + a[0]),)}

    z = {"a": jnp.array([0.3]), "b": (jnp.array([[0.1, -0.2]]),)}
    got = spectrum(f, z, num=3, mode=mode)
    flat, back = jax.flatten_util.ravel_pytree(z)
    jac = jax.jacobian(lambda v: jax.flatten_util.ravel_pytree(f(back(v), None))[0])
    want = np.linalg.eigvals(np.asarray(jac(flat)))
    np.testing.assert_allclose(
        got.eigenvalues, want[np.argsort(-np.abs(want))], atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_equal_moduli_and_all_scales(scale):
    """An orthogonal matrix: every restart has to cut between equal moduli."""
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    a = jnp.asarray(scale * q, jnp.float32)
    got = spectrum(lambda z, a: a @ z, jnp.zeros(40), a, basis=12, max_restarts=5)
    assert abs(float(got.spectral_radius) / scale - 1) < 1e-2 or not bool(
        jnp.any(got.converged)
    )
    exact = spectrum(lambda z, a: a @ z, jnp.zeros(40), a, basis=40)
    assert bool(jnp.all(exact.converged))
    np.testing.assert_allclose(float(exact.spectral_radius) / scale, 1, rtol=1e-5)


def test_tiny_eigenvalues_are_in_order():
    a = jnp.array([1e-15, 4e-15, -3e-15, 2e-15])
    got = spectrum(lambda z, a: a * z, jnp.zeros(4), a, num=3)
    np.testing.assert_allclose(
        np.asarray(got.eigenvalues).real, [4e-15, -3e-15, 2e-15], rtol=1e-5
    )


def test_zero_one_entry_and_nan():
    zero = spectrum(lambda z, a: 0 * z + a, jnp.ones(3), 1.0, num=2)
    assert bool(jnp.all(zero.converged))
    assert float(zero.spectral_radius) == 0
    scalar = spectrum(lambda z, a: a * z, jnp.ones(()), -0.5)
    assert scalar.eigenvalues.shape == (1,)
    np.testing.assert_allclose(scalar.eigenvalues, [-0.5], rtol=1e-6)
    bad = jnp.array([0.5, jnp.nan])[:, None]
    got = spectrum(lambda z, a: a * z, jnp.ones((2, 3)), bad, num=1, batch_ndim=1)
    np.testing.assert_allclose(got.spectral_radius[0], 0.5, rtol=1e-5)
    assert bool(jnp.isnan(got.spectral_radius[1]))
    assert got.converged[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_states(half):
    a = jnp.diag(jnp.linspace(0.1, 0.8, 12)).astype(half)
    got = spectrum(lambda z, a: a @ z, jnp.zeros(12, half), a, num=1)
    assert got.residual.dtype == jnp.float32
    assert abs(float(got.spectral_radius) - 0.8) < 0.02


def test_singular_values_are_the_dense_ones(real):
    matrices, _ = non_normal()
    matrices = matrices[:2]
    z = jnp.zeros((2, SIZE), real)
    got = singular_values(linear, z, jnp.asarray(matrices, real), batch_ndim=1)
    assert bool(jnp.all(got.converged))
    shifted = np.linalg.svd(np.eye(SIZE) - matrices, compute_uv=False)
    tol = {"rtol": 1e-5 if real == jnp.float32 else 1e-10}
    norms = np.linalg.norm(matrices, 2, axis=(1, 2))
    np.testing.assert_allclose(got.jacobian, norms, **tol)
    np.testing.assert_allclose(got.largest, shifted[:, 0], **tol)
    np.testing.assert_allclose(got.smallest, shifted[:, -1], **tol)
    np.testing.assert_allclose(
        got.condition, shifted[:, 0] / shifted[:, -1], rtol=10 * tol["rtol"]
    )


def test_a_singular_system_is_not_called_converged():
    a = jnp.array([1.0, 0.5, 0.2])
    got = singular_values(lambda z, a: a * z, jnp.ones(3), a)
    assert not bool(got.converged[2]) or float(got.smallest) < 1e-6
    assert float(got.condition) > 1e5 or not bool(got.converged[2])


def test_bad_arguments():
    f = lambda z, a: z
    for wrong, match in (
        ({"num": 0}, "`num`"),
        ({"mode": "fd"}, "`mode`"),
        ({"rtol": -1.0}, "`rtol`"),
        ({"batch_ndim": 3}, "batch_ndim"),
    ):
        with pytest.raises(ValueError, match=match):
            spectrum(f, jnp.ones(3), **wrong)
    with pytest.raises(TypeError, match="floating-point"):
        spectrum(f, jnp.ones(3, int))
    with pytest.raises(ValueError, match="`fn` must return states"):
        spectrum(lambda z, a: z[:2], jnp.ones(3))
    with pytest.raises(TypeError, match="outside of"):
        jax.jit(lambda z: spectrum(f, z).spectral_radius)(jnp.ones(3))
