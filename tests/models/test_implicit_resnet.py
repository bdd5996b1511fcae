"""The implicit residual network of Jacobian-free backpropagation."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import ImplicitResNet
from deqjax.nn import ImplicitResNetCell
from tests.helpers import error
from tests.nn.images import cross_entropy, data, fill, np_conv, np_norm
from tests.nn.training import QUICK, quick, train


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def test_the_cell_is_its_formula():
    cell = fill(ft.partial(ImplicitResNetCell, 4, 2, gamma=0.5, groups=2))
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(2, 1, 4, 4, 4))
    h = x[0] + 0.5 * z[0]

    def convolve(layer, h):
        w, b = (np.asarray(a, np.float64) for a in (layer.weight, layer.bias))
        return np_conv(h, w) + b

    for block in cell.blocks:
        inner = leaky(convolve(block.conv1, h))
        h = np_norm(leaky(h + convolve(block.conv2, inner)), cell.norm)
    cast = lambda a: jnp.asarray(a, jnp.float32)
    assert error(eqx.filter_jit(cell)(cast(z), cast(x))[0], h) <= 1e-4


@quick
def make(key):
    solver = deqjax.Picard(1e-3, 1e-4, batch_ndim=1)
    return eqx.nn.make_with_state(ImplicitResNet)(
        4, 1, 1, 2, side=8, solver=solver, max_steps=30, key=key
    )


def test_the_network_learns_and_reports_residuals():
    images, labels = data()
    model, state = make(QUICK)
    assert isinstance(model.deq.adjoint, deqjax.JFBAdjoint)

    @eqx.filter_value_and_grad(has_aux=True)
    def step(model, state, _):
        sol, state = model.solve(images, state, key=jr.key(1))
        logits, state = model.logits(sol.value, state, key=jr.key(2))
        return cross_entropy(logits, labels), (state, sol.stats["relative_residual"])

    run = train(model, step, 30, jit=quick)
    _, (_, residual), losses = run((state, jnp.zeros(6)))
    assert losses[-1] <= 0.1 * losses[0]
    assert float(jnp.max(residual)) <= 2e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": 1.0}, "`gamma`.*1.0"),
        ({"side": 10}, "`side`.*multiple of 4.*10"),
        ({"data_dropout": 1.5}, "`data_dropout`.*1.5"),
        ({"groups": 3}, "`groups` must divide.*3 groups and 4 channels"),
        ({"solver": deqjax.Picard()}, "`solver`.*batch_ndim=1"),
    ],
)
def test_arguments_are_refused_by_name(settings, words):
    make = ft.partial(ImplicitResNet, 4, 1, 1, 2, **settings)
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(make, key=QUICK)


def test_images_that_do_not_fit_are_refused():
    model, state = make(QUICK)
    with pytest.raises(ValueError, match="`images`.*8 × 8.*got 8 × 12"):
        model(np.zeros((1, 3, 8, 12), np.float32), state, key=jr.key(0))
    with pytest.raises(RuntimeError, match="needs a `key`"):
        model(np.zeros((1, 3, 8, 8), np.float32), state)


def test_published_solves_take_at_most_50_steps():
    make = eqx.nn.make_with_state(ImplicitResNet.published)
    model, _ = eqx.filter_eval_shape(make, "cifar10", key=QUICK)
    assert model.deq.max_steps == 50


def test_plain_iteration_stops_where_no_image_changes_by_a_tenth():
    make = ft.partial(ImplicitResNet, 4, 1, 1, 2, side=8, max_steps=50)
    solver = deqjax.Picard(0.0, 0.1, batch_ndim=1)
    init = eqx.nn.make_with_state(ft.partial(make, solver=solver))
    model, state = quick(lambda key: init(key=key))(QUICK)
    images, _ = data(n=2)
    quiet = eqx.nn.inference_mode(model)
    sol, _ = quick(lambda m, s: m.solve(images, s))(quiet, state)
    x, _ = quiet._embed(images, state, None)
    z, change = jnp.zeros_like(x), np.array(np.inf)
    steps = 0
    while change.max() > 0.1:
        new = quiet.deq.cell(z, x)
        change = np.linalg.norm(np.asarray(new - z).reshape(2, -1), axis=1)
        z, steps = new, steps + 1
    assert int(sol.stats["num_evals"]) == steps < 50
    assert bool(jnp.all(sol.stats["converged"]))
