"""Multiscale deep equilibrium models."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax.models import MDEQClassifier, MDEQSegmenter
from deqjax.models.vision._mdeq_segmenter import resize
from deqjax.nn import MDEQCell
from tests.helpers import error, identical
from tests.nn.images import (
    cross_entropy,
    data,
    fill,
    np_conv,
    np_norm,
    relu,
    repeated,
)
from tests.nn.training import QUICK, quick, train

SOLVER = deqjax.Picard(1e-2, 1e-3, beta=0.5, batch_ndim=1)
KEY = jr.key(3)


# --- the cell -------------------------------------------------------------------------


def np_weight(layer):
    """The weight that a layer with weight norm has."""
    v, g = (np.asarray(a, np.float64) for a in (layer.layer.weight, layer.g))
    return v * g / np.sqrt(np.sum(v**2, (1, 2, 3), keepdims=True))


def np_cell(cell, zs, x, masks):
    """The cell by its formula, for one example."""
    h = []
    for i, (z, b, m) in enumerate(zip(zs, cell.blocks, masks, strict=True)):
        inner = relu(np_norm(np_conv(z, np_weight(b.conv1)), b.norm1))
        inner = m * np_conv(inner, np_weight(b.conv2)) + (0 if i else x)
        h.append(np_norm(relu(z + np_norm(inner, b.norm2)), b.norm3))
    out = []
    for i, post in enumerate(cell.posts):
        total = h[i]
        for j, f in enumerate(cell.fusions[i]):
            y = h[j]
            if j < i:
                assert len(f.convs) == i - j
                for n, (layer, norm) in enumerate(zip(f.convs, f.norms, strict=True)):
                    y = relu(y) if n else y
                    y = np_norm(np_conv(y, np.asarray(layer.weight), 2), norm)
                total = total + y
            elif j > i:
                y = np_norm(np_conv(y, np.asarray(f.conv.weight)), f.norm)
                total = total + np.kron(y, np.ones((1, 2 ** (j - i), 2 ** (j - i))))
        out.append(np_norm(np_conv(relu(total), np_weight(post.conv)), post.norm))
    return out


def test_the_cell_is_its_formula_with_one_mask_per_image_and_channel():
    make = ft.partial(MDEQCell, (2, 4, 6), groups=2, expansion=2, dropout=0.5)
    cell = fill(make)
    x = jr.normal(jr.key(2), (2, 2, 8, 8))
    zs = cell.initial_state(x)
    assert [z.shape for z in zs] == [(2, 2, 8, 8), (2, 4, 4, 4), (2, 6, 2, 2)]
    rng = np.random.default_rng(0)
    zs = tuple(jnp.asarray(rng.normal(size=z.shape), z.dtype) for z in zs)
    step = quick(lambda key: cell(zs, x, key=key))
    got = step(KEY)
    draw = lambda key, c: 2 * np.asarray(jr.bernoulli(key, 0.5, (c, 1, 1)), float)
    seen = set()
    for n, key in enumerate(jr.split(KEY, 2)):
        keys = zip(jr.split(key, 3), cell.channels, strict=True)
        masks = [draw(k, c) for k, c in keys]
        seen |= {float(m) for mask in masks for m in mask.flat}
        one = [np.asarray(z[n], np.float64) for z in zs]
        want = np_cell(cell, one, np.asarray(x[n]), masks)
        for a, b in zip(got, want, strict=True):
            assert error(a[n], b) <= 1e-4
    assert seen == {0.0, 2.0}
    # One mask for one key, whatever the iterate: the solve's map does not change.
    assert identical(step(KEY), got)
    assert error(step(jr.key(9)), got) >= 1e-2


def test_weights_and_masks_are_made_once_per_solve():
    cell = fill(ft.partial(MDEQCell, (2, 4), groups=2, expansion=2, dropout=0.5))
    x = jnp.ones((1, 2, 4, 4))
    z = cell.initial_state(x)
    fn = lambda z, args: args[0](z, args[1], key=args[2])
    names, _ = repeated(fn, z, (cell, x, KEY))
    # Six of the convolutions have a weight norm, which takes a square root.
    assert "sqrt" not in names
    assert not any("random" in name or "threefry" in name for name in names)
    assert names.count("conv_general_dilated") == 8


# --- the classifier -------------------------------------------------------------------


def make_classifier(key, **settings):
    settings = {"solver": SOLVER, "max_steps": 12, "dropout": 0.1, **settings}
    return MDEQClassifier(
        (8, 8), (2, 4), 16, 2, groups=4, expansion=2, key=key, **settings
    )


@pytest.fixture(scope="module")
def classifier():
    return quick(eqx.nn.make_with_state(make_classifier))(QUICK)


def classify(model, state, images, key=KEY):
    sol, state = model.solve(images, state, key=key)
    logits, state = model.logits(sol.value, state)
    return logits, state, sol


run = quick(classify)


def test_the_residual_is_that_of_the_cell(classifier):
    model, state = classifier
    images, _ = data()
    _, _, sol = run(model, state, images)

    @quick
    def evaluate(backbone, z):
        assert backbone.inject is None
        x, _ = backbone.stem(images, state)
        return backbone.deq.cell(z, x, key=KEY)

    again = evaluate(model.backbone, sol.value)
    gap = sum(
        jnp.sum((a - b) ** 2, (1, 2, 3)) for a, b in zip(again, sol.value, strict=True)
    )
    np.testing.assert_allclose(sol.stats["residual"], jnp.sqrt(gap), rtol=1e-3)
    assert sol.stats["residual"].shape == (6,)


def test_inference_takes_each_image_alone_and_leaves_the_state(classifier):
    model, state = classifier
    images, _ = data()
    _, state, _ = run(model, state, images)
    quiet = eqx.nn.inference_mode(model)
    logits, after, _ = run(quiet, state, images, None)
    assert identical(after, state)
    got, _, sol = run(quiet, state, images.at[1:].set(jnp.nan), None)
    assert error(got[0], logits[0]) <= 1e-5
    assert sol.result != optx.RESULTS.successful
    assert not sol.stats["converged"][1:].any()


def test_the_classifier_learns(classifier):
    images, labels = data()

    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, state):
        logits, state, sol = classify(model, state, images)
        return cross_entropy(logits, labels), (state, sol.stats["residual"])

    def step(model, state, _):
        (value, carried), gradient = loss(model, state)
        return (value, carried), gradient

    model, state = classifier
    adjoint = deqjax.JFBAdjoint()
    model = eqx.tree_at(
        lambda m: m.backbone.deq.adjoint, model, adjoint, is_leaf=lambda a: a is None
    )
    _, (_, residual), losses = train(model, step, 15, jit=quick)((state, jnp.zeros(6)))
    assert losses[0] >= 0.5
    assert losses[-1] <= 0.1 * losses[0]
    assert residual.shape == (6,)


# --- the segmenter --------------------------------------------------------------------


def test_resize_keeps_the_corners():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    got = np.asarray(resize(jnp.asarray(x), 5, 7))
    for c in range(2):
        rows = [
            np.interp(np.linspace(0, 2, 5), range(3), x[0, c, :, j]) for j in range(4)
        ]
        want = [
            np.interp(np.linspace(0, 3, 7), range(4), row) for row in np.transpose(rows)
        ]
        np.testing.assert_allclose(got[0, c], want, atol=1e-6)


@pytest.mark.slow
def test_the_segmenter_learns():
    @quick
    def make(key):
        return eqx.nn.make_with_state(MDEQSegmenter)(
            (8, 8),
            2,
            halvings=1,
            groups=4,
            expansion=2,
            key=key,
            solver=SOLVER,
            adjoint=deqjax.JFBAdjoint(),
            max_steps=6,
        )

    images, labels = data()
    pixels = jnp.broadcast_to(labels[:, None, None], (6, 4, 4))

    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, state):
        logits, state = model(images, state)
        return cross_entropy(logits, pixels), (state,)

    model, state = make(QUICK)
    _, _, losses = train(model, loss, 25, jit=quick)((state,))
    assert losses[-1] <= 0.25 * losses[0]


# --- what does not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": (8,)}, "`channels` must hold at least 2"),
        ({"channels": (8, 6)}, "`groups` must divide.*4 groups and 6 channels"),
        ({"head_channels": (2,)}, "`head_channels`.*one entry per scale.*1 for 2"),
        ({"dropout": 1.0}, "`dropout`.*1.0"),
        ({"halvings": 3}, "`halvings`.*3"),
        ({"solver": deqjax.Picard()}, "`solver`.*batch_ndim=1"),
        ({"max_steps": 0}, "`max_steps`"),
    ],
)
def test_arguments_are_refused_by_name(settings, words):
    published = {"channels": (8, 8), "head_channels": (2, 2), "groups": 4}
    make = ft.partial(
        MDEQClassifier, final_channels=8, num_classes=2, **{**published, **settings}
    )
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(make, key=QUICK)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 3, 8, 9), np.float32), "`images`.*multiples of 2.*8 × 9"),
        (np.zeros((3, 8, 8), np.float32), "`images`.*leading axis"),
        (np.zeros((1, 1, 8, 8), np.float32), "`images`.*batch, 3"),
        (np.zeros((1, 3, 8, 8), np.uint8), "`images`.*uint8"),
        (np.zeros((1, 3, 8, 8), np.float16), "`images`.*float32.*float16"),
        ("cat.png", "`images`.*str"),
    ],
)
def test_images_that_do_not_fit_are_refused(classifier, images, words):
    model, state = classifier
    with pytest.raises((TypeError, ValueError), match=words):
        model(images, state, key=KEY)


def test_dropout_needs_a_key(classifier):
    model, state = classifier
    with pytest.raises(RuntimeError, match="needs a `key`"):
        model(data()[0], state)
