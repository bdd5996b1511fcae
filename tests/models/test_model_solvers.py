"""Models' default solvers: those that get furthest with the fewest evaluations."""

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import DEQTransformerLM, ImplicitResNet, MDEQClassifier
from tests.nn.images import data
from tests.nn.training import QUICK, quick

KINDS = [deqjax.Picard, deqjax.Anderson, deqjax.Broyden]


def relative(model, where, solve, steps):
    """‖f(z) − z‖ / ‖f(z)‖ of every example after each evaluation, for every solver."""
    default = where(model).solver
    assert default.batch_ndim == 1
    out = {}
    for kind in KINDS:
        solver = kind(1e-12, 0.0, batch_ndim=1)
        swapped = eqx.tree_at(lambda m: where(m).solver, model, solver)
        options = {"max_steps": steps, "options": {"record": True}}
        stats = eqx.filter_jit(lambda m, s=options: solve(m, **s).stats)(swapped)
        size = stats["residual"] / stats["relative_residual"]
        history = np.asarray(stats["residual_history"] / size)
        # The best so far.
        out[kind] = np.fmin.accumulate(history, axis=0)
    return type(default), out


@pytest.mark.slow
def test_the_implicit_resnet_needs_the_fewest_evaluations_with_its_default():
    make = eqx.nn.make_with_state(ImplicitResNet.published)
    model, state = quick(lambda key: make("cifar10", key=key))(QUICK)
    images = jr.normal(jr.key(1), (2, 3, 32, 32))
    solve = lambda m, **s: m.solve(images, state, key=jr.key(2), **s)[0]
    default, residuals = relative(model, lambda m: m.deq, solve, 26)
    needed = {k: 1 + np.argmax(r <= 1e-4, axis=0) for k, r in residuals.items()}
    assert all((r[-1] <= 1e-4).all() for r in residuals.values())
    assert needed[default].max() <= min(n.max() for n in needed.values())
    assert needed[default].max() <= 0.7 * needed[deqjax.Picard].min()


@pytest.mark.slow
def test_the_multiscale_model_comes_nearest_with_its_default():
    make = eqx.nn.make_with_state(MDEQClassifier)
    model, state = quick(
        lambda key: make((8, 8), (2, 4), 16, 2, groups=4, expansion=2, key=key)
    )(QUICK)
    images, _ = data()
    solve = lambda m, **s: m.solve(images, state, **s)[0]
    default, residuals = relative(model, lambda m: m.backbone.deq, solve, 18)
    last = {kind: np.median(r[-1]) for kind, r in residuals.items()}
    assert last[default] == min(last.values())
    assert last[default] <= 0.5 * last[deqjax.Picard]


@pytest.mark.slow
def test_the_transformer_comes_nearest_with_its_default():
    model = DEQTransformerLM(300, 64, 4, 256, cutoffs=(100,), key=QUICK)
    tokens = jr.randint(jr.key(1), (8, 16), 0, 300)
    solve = lambda m, **s: m.solve(tokens, **s)
    default, residuals = relative(model, lambda m: m.deq, solve, 30)
    last = {kind: np.median(r[-1]) for kind, r in residuals.items()}
    assert last[default] == min(last.values())
