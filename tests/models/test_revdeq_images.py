"""Reversible deep equilibrium models for images."""

import functools as ft

import equinox as eqx
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
