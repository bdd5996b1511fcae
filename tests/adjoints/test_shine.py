"""SHINE: the estimate of Broyden's method, against one that is kept as a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests.helpers import batched, error, problem, weigh


def estimate(f, z, steps):
    """B⁻¹ after `steps` evaluations of f, by the update formula on a dense inverse."""
    image = f(z)
    g, inverse = z - image, np.eye(len(z))
    for _ in range(steps - 1):
        step = -inverse @ g
        z = z + step
        image = f(z)
        change, g = (z - image) - g, z - image
        moved = inverse @ change
        inverse += np.outer(step - moved, step @ inverse) / (step @ moved)
    return inverse, z


def gradient(p, adjoint, solver, **kwargs):
    def loss(args):
        sol = deqjax.fixed_point(
            p.fn, p.z0, args, solver=solver, adjoint=adjoint, **kwargs
        )
        return weigh(sol.value), sol

    return jax.jit(jax.grad(loss, has_aux=True))(p.args)


def pulled_back(p, z, inverse):
    """Bᵀ v through f, v = B⁻ᵀ of the gradient of the loss."""
    cotangent = np.asarray(jax.grad(weigh)(jnp.asarray(z)))
    _, pull = jax.vjp(lambda args: p.fn(jnp.asarray(z), args), p.args)
    return pull(jnp.asarray(inverse.T @ cotangent))[0]


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_the_gradient_is_that_of_the_formula(steps, x64):
    p = problem("tanh", 9)
    w, x = (np.asarray(a) for a in p.args)
    f = lambda z: np.tanh(z @ w + x)
    solver = deqjax.Broyden(0.0, 0.0, history=10)
    adjoint = deqjax.ShineAdjoint(fallback=None)
    got, sol = gradient(p, adjoint, solver, max_steps=steps)
    inverse, z = estimate(f, np.asarray(p.z0), steps)
    np.testing.assert_allclose(sol.value, z, atol=1e-12)
    assert error(got, pulled_back(p, z, inverse)) <= 1e-9


def test_forward_mode_is_the_transpose(x64):
    p = problem("tree", 4)
    solver, adjoint = deqjax.Broyden(1e-8, 0.0), deqjax.ShineAdjoint(fallback=None)

    def value(x):
        args = {**p.args, "x": x}
        return deqjax.fixed_point(
            p.fn, p.z0, args, solver=solver, adjoint=adjoint
        ).value["a"]

    forward = jax.jacfwd(value)(p.args["x"])
    np.testing.assert_allclose(forward, jax.jacrev(value)(p.args["x"]), atol=1e-10)


def test_problems_of_a_batch_keep_their_own_estimates(x64):
    """Those that end early too, though the loop goes on for the others."""
    p = batched()
    w, x, gain = p.args

    def slope(x, gain, z, batch_ndim=0):
        def loss(x):
            solver = deqjax.Broyden(1e-7, 0.0, batch_ndim=batch_ndim)
            sol = deqjax.fixed_point(
                p.fn, z, (w, x, gain), solver=solver, adjoint=deqjax.ShineAdjoint()
            )
            return jnp.sum(sol.value**2), sol.stats["num_steps"]

        return jax.grad(loss, has_aux=True)(x)

    whole, steps = slope(x, gain, p.z0, 1)
    assert len(set(np.asarray(steps).tolist())) > 1
    alone = [slope(x[i], gain[i], p.z0[i])[0] for i in range(4)]
    np.testing.assert_allclose(np.stack(alone), whole, rtol=1e-7)
    np.testing.assert_allclose(jax.vmap(slope)(x, gain, p.z0)[0], whole, rtol=1e-9)


@pytest.mark.optimised
def test_the_fallback_is_the_cotangent_itself(x64):
    p = problem("tanh", 6)
    solver = deqjax.Broyden(1e-8, 0.0)
    never, _ = gradient(p, deqjax.ShineAdjoint(fallback=None), solver)
    jfb, _ = gradient(p, deqjax.JFBAdjoint(), solver)
    always, _ = gradient(p, deqjax.ShineAdjoint(fallback=1e-3), solver)
    assert error(always, jfb) == 0
    assert error(never, jfb) > 0.05


def test_the_probe_tells_how_far_the_estimate_is_off(x64):
    p = problem("tanh", 6)

    def loss(args, probe):
        adjoint = deqjax.ShineAdjoint(fallback=None, probe=probe)
        solver = deqjax.Broyden(1e-9, 0.0)
        sol = deqjax.fixed_point(p.fn, p.z0, args, solver=solver, adjoint=adjoint)
        return weigh(sol.value)

    _, stats = jax.grad(loss, (0, 1))(p.args, deqjax.BackwardStats())
    assert int(stats.num_products) == 0
    assert 1e-6 < float(stats.relative_residual) < 1.0


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match=r"deqjax\.Broyden.*Anderson"):
        jax.grad(
            lambda a: (
                deqjax.fixed_point(
                    lambda z, a: 0.5 * z + a,
                    jnp.zeros(()),
                    a,
                    solver=deqjax.Anderson(),
                    adjoint=deqjax.ShineAdjoint(),
                ).value
            )
        )(1.0)
    with pytest.raises(ValueError, match="`fallback`"):
        deqjax.ShineAdjoint(fallback=0.0)
