"""Backward passes with failures planted: reported, never thrown, and kept apart."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.linear import GMRES

HEALTHY, IDLE, BLOWN, SINGULAR, UNDEFINED = range(5)
SAMPLES, SIZE, CASES = 4, 3, 100


def cell(z, args):
    """tanh(g z W + x), and for β ≠ 0 something that leaves every range."""
    w, x, gain, blow = args
    return jnp.tanh(gain * (z @ w) + x) + blow * (z**2 + 1)


def cases(seed=0):
    """Batches in which each sample has one of the five fates."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, (CASES, SAMPLES), p=[0.5, 0.15, 0.15, 0.15, 0.05])
    w = rng.normal(size=(CASES, SIZE, SIZE))
    w = w + w.transpose(0, 2, 1)
    # The largest eigenvalue is 1: J = W is singular where the gain is 1, and z* = 0.
    values, vectors = np.linalg.eigh(w)
    values = values / np.abs(values).max(-1, keepdims=True)
    values[:, -1], values[:, :-1] = 1.0, np.minimum(values[:, :-1], 0.9)
    w = np.einsum("cij,cj,ckj->cik", vectors, values, vectors)
    x = rng.normal(size=(CASES, SAMPLES, SIZE))
    x = np.where((kind == SINGULAR)[..., None], 0.0, x)
    x = np.where((kind == UNDEFINED)[..., None], np.nan, x)
    gain = np.where(kind == SINGULAR, 1.0, rng.uniform(0.1, 0.8, kind.shape))
    blow = np.where(kind == BLOWN, 10.0, 0.0)
    c = rng.normal(size=(CASES, SAMPLES, SIZE))
    c = np.where((kind == IDLE)[..., None], 0.0, c)
    return kind, w, x, gain[..., None], blow[..., None], c


@ft.partial(jax.jit, static_argnames=("budget", "on_failure"))
def gradients(w, x, gain, blow, c, *, budget=None, on_failure="keep"):
    """Of Σ c z*, for all cases, with the record of every sample."""

    def loss(w, x, probe, gain, blow, c):
        linear = GMRES(1e-9, batch_ndim=1, max_steps=budget)
        adjoint = deqjax.ImplicitAdjoint(linear, probe=probe, on_failure=on_failure)
        sol = deqjax.fixed_point(
            cell,
            jnp.zeros((SAMPLES, SIZE)),
            (w, x, gain, blow),
            solver=deqjax.Picard(None, None, batch_ndim=1),
            adjoint=adjoint,
            max_steps=200,
        )
        return jnp.sum(c * sol.value), sol.value

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    probe = deqjax.BackwardStats((CASES, SAMPLES))
    return jax.vmap(grad)(w, x, probe, gain, blow, c)


def system(w, gain, z):
    """(I − J)ᵀ for every sample, and the slope of tanh at z*."""
    slope = 1 - z**2
    jacobian = gain[..., None] * np.einsum("cij,csj->csji", w, slope)
    return (np.eye(SIZE) - jacobian).transpose(0, 1, 3, 2), slope


def test_planted_failures_are_reported_and_spoil_nothing(x64):
    kind, w, x, gain, blow, c = cases()
    (g_w, g_x, stats), z = gradients(w, x, gain, blow, c)
    g_w, g_x, z = (np.asarray(a) for a in (g_w, g_x, z))
    good = (kind == HEALTHY) | (kind == IDLE)
    assert np.bincount(kind.ravel()).min() >= 10
    np.testing.assert_array_equal(np.asarray(stats.converged), good)

    # Those that have a gradient have the dense one, whatever the fate of their mates.
    a, slope = system(w, gain, z)
    a, rhs = np.where(good[..., None, None], a, np.eye(SIZE)), c[..., None]
    want = np.linalg.solve(a, rhs)[..., 0] * slope
    np.testing.assert_allclose(g_x[good], want[good], atol=1e-7)
    assert not np.any(g_x[kind == IDLE])
    # Of a solve that has left the range nothing is known; a singular system has its
    # best approximation.
    assert not np.any(g_x[kind == BLOWN])
    assert np.isfinite(g_x[kind == SINGULAR]).all()
    residual = np.asarray(stats.residual)
    assert np.isnan(residual[(kind == BLOWN) | (kind == UNDEFINED)]).all()
    assert (residual[kind == SINGULAR] > 1e-9).all()

    # The weights that all samples share: the sum over those that are well. (Of a
    # singular one z* is 0, and with it what it adds.)
    finite = ~(kind == UNDEFINED).any(-1)
    parts = np.einsum("csi,csj->csij", z, gain * want)
    total = np.where(good[..., None, None], parts, 0).sum(1)
    np.testing.assert_allclose(g_w[finite], total[finite], atol=1e-7)


def test_a_budget_of_one_product_is_reported(x64):
    kind, w, x, gain, blow, c = cases(1)
    (g_w, g_x, stats), z = gradients(w, x, gain, blow, c, budget=1)
    g_w, g_x, z = (np.asarray(a) for a in (g_w, g_x, z))
    well = kind == HEALTHY
    assert (np.asarray(stats.converged)[well] == 0).all()
    assert (np.asarray(stats.num_products) <= 1).all()
    assert np.isfinite(g_w[~(kind == UNDEFINED).any(-1)]).all()
    # λ by hand: of all multiples of c the one of least residual.
    a, slope = system(w, gain, z)
    image = np.einsum("csij,csj->csi", a, c)
    step = (image * c).sum(-1) / np.where(well, (image * image).sum(-1), 1)
    want = step[..., None] * c * slope
    np.testing.assert_allclose(g_x[well], want[well], rtol=1e-9)
    left = np.linalg.norm(c - step[..., None] * image, axis=-1)
    np.testing.assert_allclose(np.asarray(stats.residual)[well], left[well], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", ["jfb", "nan"])
def test_what_is_returned_instead_is_kept_apart_too(on_failure, x64):
    kind, w, x, gain, blow, c = cases(2)
    (g_w, g_x, _), z = gradients(w, x, gain, blow, c, on_failure=on_failure)
    g_w, g_x, z = (np.asarray(a) for a in (g_w, g_x, z))
    lost = kind == SINGULAR
    if on_failure == "jfb":
        np.testing.assert_allclose(g_x[lost], c[lost], rtol=1e-12)
        assert np.isfinite(g_w[~(kind == UNDEFINED).any(-1)]).all()
    else:
        # NaN is what was asked for, in all that the failed sample has a part in.
        assert np.isnan(g_x[lost]).all()
        assert np.isnan(g_w[(lost | (kind == BLOWN)).any(-1)]).all()
    good = kind == HEALTHY
    a, slope = system(w, gain, np.where(good[..., None], z, 0))
    want = np.linalg.solve(
        np.where(good[..., None, None], a, np.eye(SIZE)), c[..., None]
    )
    np.testing.assert_allclose(g_x[good], (want[..., 0] * slope)[good], atol=1e-7)


@pytest.mark.parametrize(
    "adjoint",
    [deqjax.JFBAdjoint(), deqjax.NeumannAdjoint(2), deqjax.PhantomAdjoint(2, 0.9)],
    ids=lambda a: type(a).__name__,
)
def test_biased_gradients_are_not_spoiled_either(adjoint, x64):
    w, x, gain, _, c = (a[0] for a in cases(3)[1:])
    blow = np.array([[0.0], [10.0], [0.0], [0.0]])
    x = np.where(np.isfinite(x), x, 0.3)

    def loss(w, blow, c):
        sol = deqjax.fixed_point(
            cell,
            jnp.zeros((SAMPLES, SIZE)),
            (w, x, np.minimum(gain, 0.8), blow),
            solver=deqjax.Picard(None, None, batch_ndim=1),
            adjoint=adjoint,
            max_steps=100,
        )
        return jnp.sum(c * sol.value)

    gradient = jax.jit(jax.grad(loss))
    got = gradient(w, blow, c)
    # As if that sample did not count: neither blown up nor in the loss.
    c[1] = 0
    want = gradient(w, 0 * blow, c)
    assert np.linalg.norm(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_gradient_of_aux_is_not_spoiled_either(x64):
    blow = jnp.array([[0.0], [10.0], [0.0], [0.0]])
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)

    def loss(w, blow, keep):
        sol = deqjax.fixed_point(
            lambda z, args: (cell(z, args), jnp.cos(z) @ w),
            jnp.zeros((SAMPLES, SIZE)),
            (w, x, 0.5, blow),
            solver=deqjax.Picard(None, None, batch_ndim=1),
            max_steps=100,
            has_aux=True,
        )
        return jnp.sum(jnp.where(keep, sol.aux, 0) ** 2)

    w = 0.3 * jnp.eye(3) + 0.1
    gradient = jax.jit(jax.grad(loss))
    keep = jnp.array([True, False, True, True])[:, None]
    want = gradient(w, 0 * blow, keep)
    np.testing.assert_allclose(gradient(w, blow, True | keep), want, rtol=1e-7)


# Rarer failures. In each batch the middle problem fails, and the others are to have
# the gradient that they have without it.

STEPS = deqjax.Picard(None, None, batch_ndim=1)
IMPLICIT_RULE = [
    deqjax.ImplicitAdjoint(),
    deqjax.JFBAdjoint(),
    deqjax.NeumannAdjoint(3),
]
X = np.array([[0.5, 0.2], [0.0, 0.0], [-0.3, 0.1]])


def kinked(z, args):
    """Its Jacobian is not finite at z = 0, where f is."""
    w, x, _ = args
    h = z * w + x
    return jnp.tanh(h) + 0.1 * jnp.linalg.norm(h, axis=-1, keepdims=True)


def overflowing(z, args):
    """Leaves the range at the step after the last, where `blow` is not 0."""
    w, x, blow = args
    return jnp.tanh(w * z + x) + blow * jnp.exp(w * z + 3)


def shared(fn, x, blow, adjoint, steps, scale=1.0):
    """The gradient for a weight of all problems, and the one of each."""

    def loss(w, x):
        sol = deqjax.fixed_point(
            fn, 0 * x, (w, x, blow), solver=STEPS, adjoint=adjoint, max_steps=steps
        )
        return scale * jnp.sum(jnp.cos(jnp.arange(2.0)) * sol.value)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(0.4, x)


@pytest.mark.parametrize("adjoint", IMPLICIT_RULE, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    ("fn", "steps", "blow"), [(kinked, 60, 0.0), (overflowing, 2, 1.0)]
)
def test_no_derivative_where_the_answer_is_finite(fn, steps, blow, adjoint, x64):
    blow = blow * jnp.array([[0.0], [1.0], [0.0]])
    g_w, g_x = shared(fn, X, blow, adjoint, steps)
    want_w, want_x = shared(fn, X[::2], blow[::2], adjoint, steps)
    assert abs(want_w) > 1e-2
    np.testing.assert_allclose(g_w, want_w, rtol=1e-12)
    np.testing.assert_allclose(g_x[::2], want_x, rtol=1e-12)
    assert not np.any(g_x[1])


@pytest.mark.parametrize(
    "adjoint",
    [deqjax.NeumannAdjoint(60), deqjax.PhantomAdjoint(60, 1.0)],
    ids=lambda a: type(a).__name__,
)
def test_a_series_that_leaves_the_range(adjoint):
    gain = jnp.array([[0.5], [30.0], [0.2]])

    def loss(w, gain):
        sol = deqjax.fixed_point(
            lambda z, w: gain * z + w,
            jnp.zeros((len(gain), 2)),
            w,
            solver=deqjax.Picard(batch_ndim=1),
            adjoint=adjoint,
        )
        return jnp.sum(sol.value)

    # ∂z/∂w = 1 / (1 − gain) for both entries of the two that converge.
    np.testing.assert_allclose(jax.grad(loss)(1.0, gain), 2 * (2 + 1.25), rtol=1e-5)


def test_an_adjoint_beyond_the_range_of_its_dtype():
    """In float16: λ = 1000 / (1 − 0.99) is not representable."""
    gain = jnp.array([[0.5], [0.99]], jnp.float16)

    def loss(w, probe):
        sol = deqjax.fixed_point(
            lambda z, w: gain * z + w,
            jnp.zeros((2, 2), jnp.float16),
            w,
            solver=deqjax.Picard(batch_ndim=1),
            adjoint=deqjax.ImplicitAdjoint(probe=probe),
            max_steps=400,
        )
        return jnp.sum(1000 * sol.value)

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    g, stats = run(jnp.float16(0.01), deqjax.BackwardStats((2,)))
    assert float(g) == 4000
    np.testing.assert_array_equal(stats.converged, [1, 0])


def test_aux_that_does_not_depend_on_the_failure_keeps_its_gradient(x64):
    blow = jnp.array([[0.0], [1.0]])

    def loss(w):
        fn = lambda z, w: (0.5 * jnp.tanh(z) + 0.1 + 10 * blow * (z**2 + 1), w**2)
        zeros = jnp.zeros((2, 3))
        sol = deqjax.fixed_point(fn, zeros, w, solver=STEPS, has_aux=True, max_steps=50)
        return jnp.sum(sol.aux)

    for w in (jnp.array(3.0), jnp.arange(4.0).reshape(2, 2)):
        np.testing.assert_array_equal(jax.grad(loss)(w), 2 * w)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25, 9e37])
def test_the_scale_of_the_loss_does_not_matter(scale):
    scale = np.float32(scale)
    x = np.float32(X)
    zero = jnp.zeros((3, 1))
    want = shared(overflowing, x, zero, deqjax.ImplicitAdjoint(), 60)[1]
    got = shared(overflowing, x, zero, deqjax.ImplicitAdjoint(), 60, scale)[1]
    np.testing.assert_allclose(np.asarray(got) / scale, want, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_records_do_not_depend_on_the_scale_of_the_loss(scale):
    rng = np.random.default_rng(0)
    w = jnp.asarray(0.9 * np.linalg.qr(rng.normal(size=(6, 6)))[0], jnp.float32)
    b = jnp.arange(6, dtype=jnp.float32)

    def loss(b, probe, kind, scale):
        sol = deqjax.fixed_point(
            lambda z, b: w @ z + b,
            jnp.zeros(6),
            b,
            solver=deqjax.Broyden(1e-5, history=30),
            adjoint=kind(probe=probe),
        )
        return scale * jnp.vdot(jnp.cos(b), sol.value)

    for kind in (deqjax.ShineAdjoint, deqjax.JFBAdjoint):
        run = lambda scale, kind=kind: jax.grad(loss, argnums=(0, 1))(
            b, deqjax.BackwardStats(), kind, np.float32(scale)
        )
        (want, one), (got, other) = run(1), run(scale)
        np.testing.assert_allclose(np.asarray(got) / np.float32(scale), want, rtol=1e-5)
        np.testing.assert_allclose(
            other.relative_residual, one.relative_residual, rtol=1e-5
        )
        assert one.relative_residual > 0.5
