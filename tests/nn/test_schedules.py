"""What changes from training step to training step, and layers with a state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.nn import (
    DEQ,
    HyperDEQ,
    MonotoneDense,
    MonotoneDEQ,
    Pretraining,
    RevDEQ,
    draw_options,
    unrolled,
)
from tests import helpers
from tests.helpers import error

W = helpers.weights(jr.key(0), 3)
X = jnp.array([0.3, -0.2, 0.9])
cell = lambda z, x, key=None: jnp.tanh(z @ W + x)
PICARD = DEQ(cell, solver=deqjax.Picard())


def test_depth_and_beta_are_drawn_without_compiling_again():
    betas, depths = (0.3, 0.5, 0.7), (2, 3)
    deq = RevDEQ(cell, num_steps=3)
    traced = 0

    @jax.jit
    def run(key):
        nonlocal traced
        traced += 1
        options = draw_options(deq, key, steps=depths, betas=betas)
        return deq(X, options=options), options

    drawn = set()
    for i in range(12):
        z, options = run(jr.key(i))
        beta, steps = float(options["beta"]), int(options["step_budget"])
        which = int(np.argmin(np.abs(np.array(betas) - beta)))
        np.testing.assert_allclose(beta, betas[which], rtol=1e-6)
        fn = lambda z, a: cell(z, a)
        want = helpers.reversible(fn, jnp.zeros(3), X, steps, betas[which])
        assert error(z, want) <= 1e-5
        drawn.add((which, steps))
    assert traced == 1
    assert {w for w, _ in drawn} == {0, 1, 2}
    assert {s for _, s in drawn} == {2, 3}


def test_gradients_are_those_of_the_drawn_depth():
    deq = RevDEQ(cell, num_steps=3)
    options = {"beta": jnp.array(0.75), "step_budget": jnp.array(2)}
    got = jax.jit(jax.grad(lambda x: helpers.weigh(deq(x, options=options))))(X)
    plain = lambda x: helpers.weigh(
        helpers.reversible(lambda z, a: cell(z, a), jnp.zeros(3), x, 2, 0.75)
    )
    assert error(got, jax.jit(jax.grad(plain))(X)) <= 1e-5


class Model(eqx.Module):
    first: DEQ
    second: RevDEQ

    def __call__(self, x):
        return self.second(self.first(x))


class Linear(eqx.Module):
    w: jax.Array

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(z @ self.w + x)


def test_every_equilibrium_of_a_model_is_unrolled_with_its_gradient():
    model = Model(DEQ(Linear(W), solver=deqjax.Picard()), RevDEQ(Linear(W.T)))
    loss = lambda model: helpers.weigh(unrolled(model, 2)(X))

    def plain(model):
        x = X
        for cell in (model.first.cell, model.second.cell):
            x = cell(cell(jnp.zeros(3), x), x)
        return helpers.weigh(x)

    assert error(loss(model), plain(model)) <= 1e-6
    got = eqx.filter_jit(eqx.filter_grad(loss))(model)
    assert error(got, eqx.filter_jit(eqx.filter_grad(plain))(model)) <= 1e-5
    # Taken inside of the loss, the gradient has the structure of the model.
    same = jax.tree.structure(eqx.filter(model, eqx.is_inexact_array))
    assert jax.tree.structure(got) == same


def test_pretraining_unrolls_first_and_solves_then():
    model = DEQ(Linear(W), solver=deqjax.Picard(1e-6, 1e-6))
    phase = Pretraining(num_updates=3, depth=1)
    np.testing.assert_allclose(phase(model, 2)(X), jnp.tanh(X), rtol=1e-6)
    z = phase(model, 3)(X)
    assert error(Linear(W)(z, X), z) <= 1e-5
    with pytest.raises(TypeError, match="`update` must be a Python integer"):
        phase(model, jnp.array(0))


def norm(**kwargs):
    return eqx.nn.BatchNorm(3, "batch", mode="batch", **kwargs)


class Holder(eqx.Module):
    layers: list

    def __call__(self, z, x, *, key=None):
        return 0.5 * z + x


def test_what_was_drawn_for_a_solve_serves_pretraining_too():
    deq = RevDEQ(cell, num_steps=10)
    options = draw_options(deq, jr.key(0), steps=(4, 10), betas=(0.3, 0.5))
    run = eqx.filter_jit(lambda deq, x, options: deq(x, options=options))
    first = run(Pretraining(num_updates=1)(deq, 0), X, options)
    np.testing.assert_array_equal(first, unrolled(deq, 2)(X))


@pytest.mark.parametrize("kind", ["monotone", "hyper"])
def test_every_kind_of_equilibrium_layer_is_unrolled(kind):
    if kind == "monotone":
        operator = MonotoneDense(3, 4, key=jr.key(0))
        layer, inputs = MonotoneDEQ(operator), (X[None],)
        split, bias = layer.splitting, operator.inject(X[None])
        u = jnp.zeros((1, 4))
        for _ in range(2):
            u = split.step(operator, bias, u)
        want = split.read(operator, u)
    else:
        layer, inputs = HyperDEQ(lambda w: eqx.Partial(scaled, w)), (X, jnp.array(0.3))
        want = scaled(0.3, scaled(0.3, jnp.zeros(3), X), X)
    got = Pretraining(num_updates=1, depth=2)(layer, 0)
    np.testing.assert_allclose(got(*inputs), want, rtol=1e-5)
    assert Pretraining(num_updates=1)(layer, 1) is layer


def scaled(w, z, x, key=None):
    return jnp.tanh(w * z + x)


def test_layers_with_a_state_are_refused_inside_a_cell():
    with pytest.raises(ValueError, match=r"layers\[1\].*BatchNorm.*GroupNorm"):
        DEQ(Holder([eqx.nn.Linear(3, 3, key=jr.key(0)), norm()]))
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    with pytest.raises(ValueError, match="SpectralNorm.*Contractive"):
        RevDEQ(Holder([eqx.nn.SpectralNorm(linear, "weight", key=jr.key(1))]))
    with pytest.raises(ValueError, match="StateIndex"):
        DEQ(Holder([eqx.nn.StateIndex(jnp.zeros(()))]))


def test_sequences_are_as_stateful_as_their_layers():
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    plain = eqx.nn.Sequential([linear, eqx.nn.Sequential([linear])])
    cell = lambda layers: eqx.Partial(lambda f, z, x: 0.5 * jnp.tanh(f(z)) + x, layers)
    deq = DEQ(cell(plain), solver=deqjax.Picard(1e-6, 1e-6))
    z = deq(X)
    np.testing.assert_allclose(z, deq.cell(z, X), rtol=1e-5)
    mixed = eqx.nn.Sequential([linear, eqx.nn.Sequential([norm()])])
    with pytest.raises(ValueError, match=r"layers\[1\].layers\[0\]` is a BatchNorm"):
        DEQ(Holder([mixed]))
    DEQ(Holder([eqx.nn.inference_mode(mixed)]))


def test_batch_norm_is_allowed_in_inference_mode_and_checked_at_the_call():
    deq = DEQ(Holder([norm(inference=True)]), solver=deqjax.Picard(1e-6, 1e-6))
    np.testing.assert_allclose(deq(X), 2 * X, rtol=1e-5)
    training = eqx.nn.inference_mode(deq, value=False)
    with pytest.raises(ValueError, match="inference_mode"):
        training(X)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: draw_options(RevDEQ(cell), jr.key(0)), "nothing to draw"),
        (lambda: draw_options(RevDEQ(cell), jr.key(0), steps=(5,)), "max_steps` = 4"),
        (lambda: draw_options(RevDEQ(cell), jr.key(0), betas=(0.5, 1.0)), "`betas`.*1"),
        (lambda: draw_options(PICARD, jr.key(0), betas=(0.5,)), "Reversible.*Picard"),
        (lambda: draw_options(RevDEQ(cell), jr.key(0), steps=(0,)), "`steps`.*0"),
        (lambda: unrolled(cell, 2), "no equilibrium layer"),
        (lambda: unrolled(RevDEQ(cell), 0), "`num_steps`.*0"),
        (lambda: Pretraining(num_updates=0), "`num_updates`.*0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
