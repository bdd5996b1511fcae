"""Reversible deep equilibrium models for images."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import RevDEQClassifier
from deqjax.nn import ConvCell
from tests import helpers
from tests.helpers import error
from tests.nn.images import cross_entropy, data, fill, np_conv, np_norm, relu
from tests.nn.training import QUICK, quick, train


def test_the_cell_is_its_formula():
    cell = fill(ft.partial(ConvCell, 2, 3))
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(2, 1, 2, 4, 4))
    cast = lambda a: jnp.asarray(a, jnp.float32)
    w1, w2 = (np.asarray(c.weight, np.float64) for c in (cell.conv1, cell.conv2))
    assert w1.shape == (6, 2, 3, 3)
    h = relu(np_norm(np_conv(z[0], w1), cell.norm1))
    want = np_norm(relu(z[0] + np_norm(x[0] + np_conv(h, w2), cell.norm2)), cell.norm3)
    assert error(eqx.filter_jit(cell)(cast(z), cast(x))[0], want) <= 1e-4


def wide(tree):
    """Parameters in float64, by NumPy."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def np_batch_norm(x, norm):
    """Batch norm of a whole batch (batch, channels, height, width)."""
    x = x - x.mean((0, 2, 3), keepdims=True)
    x = x / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    place = lambda p: np.asarray(p, np.float64)[:, None, None]
    return x * place(norm.weight) + place(norm.bias)


def np_cell(cell, z, x):
    """The cell by its formula, on one image."""
    w1, w2 = (np.asarray(c.weight, np.float64) for c in (cell.conv1, cell.conv2))
    h = relu(np_norm(np_conv(z, w1), cell.norm1))
    return np_norm(relu(z + np_norm(x + np_conv(h, w2), cell.norm2)), cell.norm3)


def np_steps(cell, x, steps, beta=0.8):
    """z_N of the coupled iteration from 0, for a whole batch."""
    out = []
    for one in x:
        y = z = np.zeros_like(one)
        for _ in range(steps):
            y = (1 - beta) * y + beta * np_cell(cell, z, one)
            z = (1 - beta) * z + beta * np_cell(cell, y, one)
        out.append(z)
    return np.stack(out)


def np_convs(x, layer, stride=1):
    weight = np.asarray(layer.weight, np.float64)
    out = np.stack([np_conv(one, weight, stride) for one in x])
    bias = 0 if layer.bias is None else np.asarray(layer.bias, np.float64)
    return out + bias


def filled(make):
    """The model with every parameter drawn at random, and its state."""
    init = eqx.nn.make_with_state(make)
    model, _ = eqx.filter_eval_shape(init, key=jr.key(0))
    return fill(lambda key: model), quick(init)(key=jr.key(0))[1]


def test_between_scales_are_the_authors_batch_norms_and_a_shortcut_of_x():
    make = ft.partial(RevDEQClassifier, (2, 3), (1, 2), 2, max_steps=1)
    model, state = filled(make)
    images = np.random.default_rng(1).normal(size=(2, 3, 4, 4))
    x = np_convs(images, model.stem.conv)
    x = relu(np_batch_norm(x, model.stem.norm))
    x = x + np_steps(model.deqs[0].cell, x, 1)
    down = model.downs[0]
    h = relu(np_batch_norm(x, down.norm1))
    inner = relu(np_batch_norm(np_convs(h, down.conv1, 2), down.norm2))
    x = np_convs(x, down.shortcut, 2) + np_convs(inner, down.conv2)
    x = x + np_steps(model.deqs[1].cell, x, 1)
    head = wide(model.head)
    want = x.mean((2, 3)) @ head.weight.T + head.bias
    got, _ = quick(lambda m, s: m(jnp.asarray(images, jnp.float32), s))(model, state)
    assert error(got, want) <= 1e-5


def test_a_single_scale_is_the_authors():
    make = ft.partial(
        RevDEQClassifier.published,
        "cifar10_single",
        channels=(4,),
        num_classes=2,
        pool=2,
    )
    model, state = filled(make)
    images = np.random.default_rng(1).normal(size=(2, 3, 8, 8))
    # A convolution with bias and a group norm, without a ReLU.
    x = np_convs(images, model.stem.conv)
    assert model.stem.conv.bias is not None
    x = np.stack([np_norm(one, model.stem.norm) for one in x])
    z = np_steps(model.deqs[0].cell, x, 2)
    # The head reads z* alone, averaged over 4 × 4 pixels here.
    squares = z.reshape(2, 4, 2, 4, 2, 4).mean((3, 5)).reshape(2, 16)
    head = wide(model.head)
    got, _ = quick(lambda m, s: m(jnp.asarray(images, jnp.float32), s))(model, state)
    assert error(got, squares @ head.weight.T + head.bias) <= 1e-5


def test_group_norms_between_scales_keep_images_apart():
    make = ft.partial(
        RevDEQClassifier, (2, 2), (1, 1), 2, stem="group", between="group", max_steps=1
    )
    model, state = eqx.nn.make_with_state(make)(key=QUICK)
    images, _ = data(n=2)
    run = quick(lambda x: model(x, state)[0])
    assert error(run(images.at[1].multiply(3.0))[0], run(images)[0]) <= 1e-6
    down, x = model.downs[0], images[:, :2]
    h = jnp.maximum(jax.vmap(down.norm1)(x), 0)
    inner = jnp.maximum(jax.vmap(down.norm2)(jax.vmap(down.conv1)(h)), 0)
    want = jax.vmap(down.shortcut)(h) + jax.vmap(down.conv2)(inner)
    assert error(down(x, state)[0], want) <= 1e-5


@quick
def make(key, max_steps=1):
    return eqx.nn.make_with_state(RevDEQClassifier)(
        (4, 6), (1, 2), 2, max_steps=max_steps, key=key
    )


@eqx.filter_value_and_grad(has_aux=True)
def gradient(model, state, _):
    images, labels = data()
    sol, state = model.solve(images, state)
    assert all(isinstance(deq.solver, deqjax.Reversible) for deq in model.deqs)
    value = cross_entropy(model.logits(sol.value), labels)
    stats = [(s.stats["num_evals"], s.stats["relative_residual"]) for s in sol.aux]
    return value, (state, stats)


@pytest.mark.slow
def test_the_classifier_learns_and_reports_residuals():
    model, state = make(QUICK)
    blank = [(jnp.array(0), jnp.zeros(6))] * 2
    _, (_, stats), losses = train(model, gradient, 20, jit=quick)((state, blank))
    assert losses[-1] <= 0.1 * losses[0]
    for num_evals, residual in stats:
        assert int(num_evals) == 2
        assert residual.shape == (6,)
        assert 0 < float(jnp.max(residual)) < 1


@pytest.mark.slow
def test_the_gradient_is_that_of_the_steps_taken():
    model, state = make(QUICK, max_steps=2)
    images, labels = data()

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def plain(model):
        x, _ = model.stem(images, state)
        for i, deq in enumerate(model.deqs):
            x = model.downs[0](x, state)[0] if i else x
            z0 = jnp.zeros_like(x)
            x = x + helpers.reversible(deq.cell, z0, x, 2, 0.8)
        return cross_entropy(model.logits(x), labels)

    want, want_gradient = plain(model)
    (got, _), got_gradient = eqx.filter_jit(gradient)(model, state, None)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert error(got_gradient, want_gradient) <= 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": (1,)}, "`widths`.*one entry per scale.*1 for 2"),
        ({"channels": ()}, "`channels` must hold at least 1"),
        ({"beta": 1.0}, "`beta`"),
        ({"between": "layer"}, '`between` must be "batch" or "group".*layer'),
        ({"solver": deqjax.Picard()}, "`solver`.*batch_ndim=1"),
    ],
)
def test_arguments_are_refused_by_name(settings, words):
    settings = {"channels": (4, 4), "widths": (1, 1), "num_classes": 2, **settings}
    with pytest.raises(ValueError, match=words):
        RevDEQClassifier(**settings, key=jr.key(0))


def test_images_that_do_not_fit_are_refused():
    model, state = make(QUICK)
    with pytest.raises(ValueError, match="`images`.*multiples of 2 for 2 scales"):
        model(np.zeros((1, 3, 8, 9), np.float32), state)
