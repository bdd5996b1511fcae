"""Generated weights, and equilibria of generated cells."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.nn import HyperDEQ, HyperNetwork
from tests import helpers
from tests.helpers import OK, error, inner, slope, weigh
from tests.nn.training import QUICK, train

KEY = QUICK


class Cell(eqx.Module):
    """tanh(w z + u x + b), w of norm 1/2: contractive whatever is generated."""

    w: jax.Array
    u: jax.Array
    b: jax.Array

    def __init__(self, n=3):
        self.w = helpers.weights(jr.key(1), n)
        self.u = jr.normal(jr.key(2), (n, n))
        self.b = jnp.zeros(n)

    def __call__(self, z, x, *, key=None):
        w = 0.5 * self.w / jnp.linalg.norm(self.w)
        return jnp.tanh(z @ w + x @ self.u + self.b)


def make(**settings):
    return HyperNetwork(Cell(), 2, rank=3, width=4, key=KEY, **settings)


context = np.array([0.3, -1.0], np.float32)


def test_weights_are_those_of_the_template_and_a_change_linear_in_the_features():
    hyper = make(scale=0.1)
    got = hyper(jnp.asarray(context))
    h = np.asarray(hyper.features(jnp.asarray(context)))
    assert h.shape == (3,)
    for name, v in zip(("w", "u", "b"), hyper.V, strict=True):
        base = np.asarray(getattr(hyper.template, name))
        want = base + (np.asarray(v) @ h).reshape(base.shape)
        np.testing.assert_allclose(getattr(got, name), want, rtol=1e-5, atol=1e-7)
    # Generated modules start near the template: |h| ≤ 1, the change a tenth of it.
    change = np.linalg.norm(np.asarray(got.w) - np.asarray(hyper.template.w))
    assert 0 < change <= 0.3 * np.linalg.norm(np.asarray(hyper.template.w))
    assert error(got.b + 1, hyper.template.b + 1) == 0
    assert not np.array_equal(got.w, hyper(jnp.zeros(2)).w)


def test_a_tied_array_stays_tied_whatever_becomes_of_the_template():
    layer = eqx.nn.Linear(3, 3, use_bias=False, key=KEY)
    hyper = HyperNetwork((layer, layer, layer.weight + 1), 2, key=KEY)
    assert [v.shape for v in hyper.V] == [(9, 8), (9, 8)]
    first, second, other = eqx.filter_jit(hyper)(jnp.asarray(context))
    np.testing.assert_array_equal(first.weight, second.weight)
    assert error(other - 1, first.weight) > 1e-3
    # One gradient, of both uses, at the one place that is read.
    total = lambda hyper: sum(
        jnp.sum(a.weight) for a in hyper(jnp.asarray(context))[:2]
    )
    slope = eqx.filter_jit(eqx.filter_grad(total))(hyper)
    np.testing.assert_array_equal(slope.template[0].weight, 2)
    np.testing.assert_array_equal(slope.template[1].weight, 0)


def test_the_perceptron_has_the_dtype_of_the_template(x64):
    layer = eqx.nn.Linear(3, 3, dtype=jnp.float32, key=KEY)
    hyper = HyperNetwork(layer, 2, key=KEY)
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        assert hyper(jnp.asarray(context, dtype)).weight.dtype == jnp.float32
    with pytest.raises(TypeError, match="`context` must be real.*int64"):
        hyper(jnp.ones(2, int))


def test_the_gradient_at_a_converged_equilibrium_reaches_the_generator(x64):
    hyper = HyperNetwork(Cell(), 2, rank=3, width=4, key=KEY)
    adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12))
    x, c = jnp.array([0.1, -0.4, 0.7]), jnp.asarray(context, jnp.float64)
    solver = deqjax.Picard(1e-12, 1e-12)
    layer = HyperDEQ(hyper, solver=solver, adjoint=adjoint, max_steps=200)
    assert layer.solve(x, c).result == OK

    def unrolled(c):
        cell, z = hyper(c), jnp.zeros(3)
        for _ in range(60):
            z = cell(z, x)
        return weigh(z)

    got = jax.jit(jax.grad(lambda c: weigh(layer(x, c))))(c)
    assert error(got, jax.jit(jax.grad(unrolled))(c)) <= 1e-9


def test_any_module_and_dtype_and_a_choice_of_leaves():
    template = eqx.nn.MLP(2, 3, 4, 1, dtype=jnp.bfloat16, key=KEY)
    hyper = HyperNetwork(
        template, 2, key=KEY, where=lambda a: eqx.is_array(a) and a.ndim == 2
    )
    got = hyper(jnp.asarray(context))
    assert got.layers[0].weight.dtype == jnp.bfloat16
    assert not np.array_equal(got.layers[0].weight, template.layers[0].weight)
    assert np.array_equal(got.layers[0].bias, template.layers[0].bias)
    assert got(jnp.ones(2, jnp.bfloat16)).shape == (3,)
    assert [v.shape for v in hyper.V] == [(8, 8), (12, 8)]


def test_the_equilibrium_is_that_of_the_generated_cell_and_its_gradient_too(x64):
    adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12))
    solver = deqjax.Picard(1e-13, 1e-13)
    settings = {"solver": solver, "adjoint": adjoint, "max_steps": 300}
    x, c = jnp.linspace(-1.0, 1.0, 3), jnp.asarray(context, jnp.float64)
    hyper = HyperNetwork(Cell(), 2, rank=3, width=4, key=KEY)

    def value(hyper):
        return weigh(HyperDEQ(hyper, **settings)(x, c))

    sol = HyperDEQ(hyper, **settings).solve(x, c)
    assert sol.result == OK
    assert error(hyper(c)(sol.value, x), sol.value) <= 1e-12
    gradient = eqx.filter_jit(eqx.filter_grad(value))(hyper)
    direction, want = slope(value, hyper)
    np.testing.assert_allclose(inner(gradient, direction), want, rtol=1e-6)


def test_one_cell_per_task_learns_what_one_cell_cannot():
    # The same inputs, opposite targets: only the context tells them apart.
    contexts = jnp.eye(2)
    x = jnp.stack([jnp.linspace(-1.0, 1.0, 3)] * 2)
    targets = jnp.array([[0.5, 0.0, -0.5], [-0.5, 0.0, 0.5]])
    model = HyperDEQ(make(), solver=deqjax.Picard(1e-5, 1e-6))

    @eqx.filter_value_and_grad(has_aux=True)
    def step(model, _):
        sol = jax.vmap(model.solve)(x, contexts)
        loss = jnp.mean((sol.value - targets) ** 2)
        return loss, (sol.stats["residual"],)

    _, (residual,), losses = train(model, step, 100)((jnp.zeros(2),))
    # One output for both tasks cannot do better than the mean of the targets' squares.
    assert losses[-1] <= 0.02 < float(jnp.mean(targets**2))
    assert float(jnp.max(residual)) <= 1e-4


@pytest.mark.parametrize(
    ("call", "error_type", "words"),
    [
        (lambda: HyperNetwork(jax.nn.relu, 2, key=KEY), ValueError, "`template`"),
        (lambda: HyperNetwork(Cell(), 0, key=KEY), ValueError, "`context_size`.*0"),
        (
            lambda: HyperNetwork((jnp.arange(3),), 2, where=eqx.is_array, key=KEY),
            TypeError,
            "`where` must choose real floating-point arrays.*i32",
        ),
        (lambda: make()(jnp.ones(3)), ValueError, r"`context`.*\(2,\).*\(3,\)"),
        (lambda: HyperDEQ(3), TypeError, "`hyper` must be callable.*int"),
        (lambda: HyperDEQ(make(), max_steps=0), ValueError, "`max_steps`"),
    ],
)
def test_arguments_are_refused_by_name(call, error_type, words):
    with pytest.raises(error_type, match=words):
        call()
