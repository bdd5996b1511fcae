"""Penalties on the Jacobian."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deqjax.regularise import jacobian_norm, jacobian_spectral_norm
from tests import helpers
from tests.helpers import error, slope

METHODS = ["jvp", "vjp", "difference"]


def f(z, args):
    w, x = args
    return jnp.tanh(z @ w + x)


def dense(p, z):
    return np.asarray(jax.jacobian(lambda z: p.fn(z, p.args))(z), np.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_probes_is_the_frobenius_norm_over_the_dimension(method):
    p = helpers.problem("tanh", 5)
    z = jnp.linspace(-1, 1, 5)
    j = dense(p, z)
    want = np.sum(j**2) / 5
    estimate = lambda key: jacobian_norm(p.fn, z, p.args, key=key, method=method)
    draws = np.asarray(jax.jit(jax.vmap(estimate))(jr.split(jr.key(0), 4000)))
    # The variance of ‖Jε‖² is 2 ‖JᵀJ‖²; so is that of ‖εᵀJ‖².
    deviation = np.sqrt(2) * np.linalg.norm(j.T @ j) / 5
    assert abs(draws.mean() - want) < 4 * deviation / 4000**0.5
    assert 0.9 < draws.std() / deviation < 1.1


@pytest.mark.parametrize("method", METHODS)
def test_one_estimate_is_that_of_its_probe(method):
    """And probes are averaged, per problem, in the shape of the batch."""
    p = helpers.batched()
    z = 0.3 * jnp.ones((4, 3))
    key = jr.key(4)
    got = jacobian_norm(
        p.fn, z, p.args, key=key, num_probes=2, method=method, batch_ndim=1
    )
    j = np.stack([dense(helpers.row(p, i), z[i]) for i in range(4)])
    want = np.zeros(4)
    for k in jr.split(key, 2):
        probe = np.asarray(jr.normal(jr.split(k, 1)[0], (4, 3)))
        left = "boi,bo->bi" if method == "vjp" else "boi,bi->bo"
        want += np.sum(np.einsum(left, j, probe) ** 2, axis=1) / 2 / 3
    np.testing.assert_allclose(got, want, rtol=2e-3 if method == "difference" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_the_estimate_and_z_is_held_fixed(method, x64):
    p = helpers.problem("tanh", 4)
    z = jnp.linspace(-1, 1, 4)
    run = lambda at: jacobian_norm(
        p.fn, jax.lax.stop_gradient(z), at, key=jr.key(1), method=method
    )
    gradient = jax.jit(jax.grad(run))(p.args)
    direction, want = slope(run, p.args)
    # A difference of differences has lost more digits.
    bound = 1e-5 if method == "difference" else 1e-6
    assert abs(helpers.inner(gradient, direction) - want) <= bound * abs(want)
    free = lambda z: jacobian_norm(p.fn, z, p.args, key=jr.key(1), method=method)
    np.testing.assert_array_equal(jax.grad(free)(z), 0)


def test_differences_need_one_backward_pass_of_the_map():
    """Of a map that has no forward mode, and whose gradient has no gradient."""

    @jax.custom_vjp
    def once(z):
        return jnp.sin(z)

    def bwd(z, ct):
        # A loop of unknown length has no gradient.
        slope = jax.lax.while_loop(lambda s: jnp.all(s > 2), lambda s: s, jnp.cos(z))
        return (ct * slope,)

    once.defvjp(lambda z: (jnp.sin(z), z), bwd)
    fn = lambda z, a: once(a * z)
    z, key = jnp.linspace(0.1, 1, 4), jr.key(0)
    run = lambda a, method: jacobian_norm(fn, z, a, key=key, method=method)
    got = jax.grad(run)(0.7, "difference")
    plain = lambda a: jacobian_norm(lambda z, a: jnp.sin(a * z), z, a, key=key)
    assert error(got, jax.grad(plain)(0.7)) <= 5e-3
    # The others differentiate the rule's backward pass, which JAX refuses.
    refused = (TypeError, ValueError, NotImplementedError)
    for method in ("jvp", "vjp"):
        with pytest.raises(refused, match="[Dd]ifferentiat"):
            jax.grad(run)(0.7, method)


def test_rademacher_probes_are_exact_for_diagonal_jacobians():
    a = jnp.array([0.5, -0.2, 0.9])
    got = jacobian_norm(
        lambda z, a: {"z": a * z["z"]},
        {"z": jnp.ones(3)},
        a,
        key=jr.key(0),
        probe="rademacher",
    )
    np.testing.assert_allclose(got, jnp.mean(a**2), rtol=1e-6)


def test_the_spectral_norm_and_its_gradient_are_those_of_the_singular_vectors(x64):
    p = helpers.batched()
    z = 0.3 * jnp.ones((4, 3))
    run = lambda a: jacobian_spectral_norm(
        p.fn, z, a, key=jr.key(0), num_steps=200, batch_ndim=1
    )
    got = jax.jit(run)(p.args)
    want = [
        np.linalg.svd(dense(helpers.row(p, i), z[i]), compute_uv=False)[0]
        for i in range(4)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    exact = lambda a: jnp.sum(
        jax.vmap(
            lambda z, x, gain: jnp.linalg.norm(
                jax.jacfwd(lambda z: jnp.tanh(gain * (z @ a[0]) + x))(z), 2
            )
        )(z, a[1], a[2])
    )
    total = lambda a: jnp.sum(run(a))
    gradient = jax.jit(jax.grad(total))(p.args)
    assert error(gradient, jax.jit(jax.grad(exact))(p.args)) <= 1e-5
    # And of the estimate itself, though its singular vector counts as a constant.
    direction, want = slope(total, p.args)
    assert abs(helpers.inner(gradient, direction) - want) <= 1e-5 * abs(want)


def test_the_spectral_norm_is_approached_from_below():
    p = helpers.problem("tanh", 5)
    z = jnp.linspace(-1, 1, 5)
    run = jax.jit(
        lambda n: jacobian_spectral_norm(p.fn, z, p.args, key=jr.key(0), num_steps=n),
        static_argnums=0,
    )
    got = [float(run(n)) for n in (1, 4, 40)]
    want = np.linalg.norm(dense(p, z), 2)
    assert got[0] < got[1] <= got[2] <= want * (1 + 1e-5)
    assert got[2] >= want * (1 - 1e-3)


def test_a_zero_jacobian_has_the_norm_zero_and_a_gradient():
    run = lambda a: jacobian_spectral_norm(
        lambda z, a: a * z, jnp.ones(3), a, key=jr.key(0)
    )
    value, gradient = jax.value_and_grad(run)(0.0)
    assert float(value) == 0
    assert float(gradient) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "both"}, '`method` must be one of "jvp".*both'),
        ({"probe": "uniform"}, "`probe`.*uniform"),
        ({"num_probes": 0}, "`num_probes`.*0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        jacobian_norm(lambda z, a: z, jnp.ones(2), key=jr.key(0), **settings)


@pytest.mark.parametrize("norm", [jacobian_norm, jacobian_spectral_norm])
def test_maps_and_states_that_do_not_fit_are_refused(norm):
    pair = (jnp.ones((2, 3)), jnp.ones((3, 3)))
    same, key = lambda z, a: z, jr.key(0)
    with pytest.raises(ValueError, match=r"`fn` must return.*\(2, 3\).*\(3,\)"):
        norm(lambda z, a: z[0], jnp.ones((2, 3)), key=key)
    with pytest.raises(TypeError, match="`z` must be real.*int32"):
        norm(same, jnp.ones(3, int), key=key)
    with pytest.raises(ValueError, match="`batch_ndim=1`"):
        norm(same, pair, key=key, batch_ndim=1)


def test_the_variance_depends_on_the_side_of_the_probe():
    j = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    draws = {
        method: jax.vmap(
            lambda key, method=method: jacobian_norm(
                lambda z, a: j @ z,
                jnp.ones(2),
                key=key,
                method=method,
                probe="rademacher",
            )
        )(jr.split(jr.key(0), 1000))
        for method in ("jvp", "vjp")
    }
    # ‖Jε‖²/2 is 0 or 2, ‖εᵀJ‖²/2 is 1.
    np.testing.assert_allclose(jnp.mean(draws["jvp"]), 1, atol=0.1)
    np.testing.assert_allclose(jnp.var(draws["jvp"]), 1, atol=0.1)
    np.testing.assert_array_equal(draws["vjp"], 1)


def test_a_power_iteration_takes_a_step_at_least():
    with pytest.raises(ValueError, match="`num_steps`.*0"):
        jacobian_spectral_norm(lambda z, a: z, jnp.ones(2), key=jr.key(0), num_steps=0)
