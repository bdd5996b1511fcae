"""Maps whose parts bring their own backward rule: kernels, callbacks."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import deqjax
from tests import helpers
from tests.helpers import dense, error, problem

# --- tanh with backward rules of several kinds ----------------------------------------


def _kernel(body, *inputs):
    shape = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(*inputs)


def _forward_body(x, out):
    out[...] = jnp.tanh(x[...])


def _backward_body(y, ct, out):
    out[...] = ct[...] * (1 - y[...] ** 2)


def _host(y, ct):
    shape = jax.ShapeDtypeStruct(ct.shape, ct.dtype)
    return jax.pure_callback(
        lambda y, ct: np.asarray(ct * (1 - y**2), ct.dtype),
        shape,
        y,
        ct,
        vmap_method="sequential",
    )


# name -> (forward, backward)
RULES = {
    "plain": (jnp.tanh, lambda y, ct: ct * (1 - y**2)),
    "loop": (
        jnp.tanh,
        lambda y, ct: (
            lax.fori_loop(0, 2, lambda _, c: c * lax.rsqrt(1 - y**2), ct)
            * (1 - y**2) ** 2
        ),
    ),
    "kernel": (ft.partial(_kernel, _forward_body), ft.partial(_kernel, _backward_body)),
    "callback": (jnp.tanh, _host),
}
# Those that JAX cannot transpose.
OPAQUE = ["kernel", "callback"]


def own_tanh(name):
    forward, backward = RULES[name]
    fn = jax.custom_vjp(forward)
    fn.defvjp(lambda x: (forward(x), forward(x)), lambda y, ct: (backward(y, ct),))
    return fn


def custom(name):
    """The problem "tanh", by way of such a function, which sees x alone as well."""
    p, fn = problem("tanh"), own_tanh(name)

    def cell(z, args):
        w, x = args
        return fn(z @ w + x)

    return p, p._replace(fn=cell)


REVERSE = {
    "implicit": deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-13)),
    "neumann": deqjax.NeumannAdjoint(3, 0.8),
    "phantom": deqjax.PhantomAdjoint(3, 0.8),
    "jfb": deqjax.JFBAdjoint(),
    "unrolled": deqjax.UnrolledAdjoint(),
    "truncated": deqjax.UnrolledAdjoint(last=3),
}


def loss(p, adjoint, solver=None):
    # As exact as it gets, for a solve that several adjoints have in common.
    solver = deqjax.Picard(1e-13, 1e-13) if solver is None else solver
    return helpers.loss(p, adjoint=adjoint, solver=solver, max_steps=60)


@pytest.mark.parametrize("name", RULES)
def test_the_implicit_gradient_needs_pull_backs_alone(name, x64):
    p, q = custom(name)
    got = jax.jit(jax.grad(loss(q, REVERSE["implicit"])))(p.args)
    jax.effects_barrier()
    assert error(got, dense(p).gradient) <= 1e-9


@pytest.mark.parametrize("adjoint", [a for a in REVERSE if a != "implicit"])
def test_so_do_the_others(adjoint, x64):
    p, q = custom("kernel")
    run = lambda p: jax.jit(jax.grad(loss(p, REVERSE[adjoint])))(p.args)
    assert error(run(q), run(p)) <= 1e-12


def test_so_does_the_reversible_one(x64):
    p, q = custom("kernel")
    solver = deqjax.Reversible(None, None)
    run = lambda p: jax.jit(
        jax.grad(helpers.loss(p, solver=solver, adjoint=None, max_steps=3))
    )(p.args)
    assert error(run(q), run(p)) <= 1e-12


@pytest.mark.parametrize("adjoint", ["implicit", "neumann"])
@pytest.mark.parametrize("name", [n for n in RULES if n not in OPAQUE])
def test_forward_mode_transposes_what_it_can(name, adjoint, x64):
    p, q = custom(name)
    t = jax.tree.map(jnp.cos, p.args)
    push = lambda p: jax.jit(
        lambda a: jax.jvp(loss(p, REVERSE[adjoint]), (a,), (t,))[1]
    )(p.args)
    np.testing.assert_allclose(push(q), push(p), rtol=1e-9)


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("transform", ["jvp", "jit of jvp", "jacfwd", "hessian"])
def test_forward_mode_says_why_it_cannot(name, transform):
    p, q = custom(name)
    run = loss(q, deqjax.ImplicitAdjoint(), deqjax.Picard())
    push = lambda a: jax.jvp(run, (a,), (a,))[1]
    transformed = {
        "jvp": push,
        "jit of jvp": jax.jit(push),
        "jacfwd": jax.jacfwd(run),
        "hessian": jax.hessian(run),
    }[transform]
    words = "products J v .*`fn`.*backward rule of a `jax.custom_vjp`"
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(transformed(p.args))


def test_the_gradient_of_the_gradient_says_why_it_cannot():
    p, q = custom("callback")
    run = loss(q, deqjax.ImplicitAdjoint(), deqjax.Picard())
    twice = jax.grad(lambda a: jnp.sum(jax.grad(run)(a)[1]))
    with pytest.raises(TypeError, match="second derivatives.*`jax.custom_vjp`"):
        twice(p.args)


def test_a_mapped_gradient_works_too(x64):
    p, q = custom("kernel")
    xs = jnp.stack([p.args[1], 2 * p.args[1]])
    run = lambda p: jax.jit(
        jax.vmap(lambda x: jax.grad(loss(p, REVERSE["implicit"]))((p.args[0], x)))
    )(xs)
    assert error(run(q), run(p)) <= 1e-9
