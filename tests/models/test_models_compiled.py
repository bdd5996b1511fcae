"""What all models share: compiled or not, they compute the same."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

import deqjax
from deqjax.models import (
    ImplicitResNet,
    MDEQClassifier,
    MDEQSegmenter,
    MonotoneClassifier,
    RevDEQClassifier,
)
from deqjax.nn import HyperDEQ, HyperNetwork, MonotoneConv, MonotoneDEQ
from tests.helpers import error
from tests.nn.images import data
from tests.nn.test_hyper import Cell
from tests.nn.training import QUICK, quick

pytestmark = pytest.mark.slow

# A static solve: where a tested one ends may differ by a step.
STATIC = {"solver": deqjax.Picard(None, None, batch_ndim=1), "max_steps": 3}


def stateful(make, *args, **settings):
    @quick
    def init(key):
        return eqx.nn.make_with_state(make)(*args, **settings, key=key)

    model, state = init(QUICK)
    return model, lambda model, x: model(x, state, key=jr.key(1))[0]


def segmenter():
    return stateful(MDEQSegmenter, (4, 4), 2, halvings=0, groups=2, **STATIC)


def classifier():
    return stateful(MDEQClassifier, (4, 4), (1, 1), 4, 2, groups=2, **STATIC)


def revdeq():
    return stateful(RevDEQClassifier, (4, 4), (1, 1), 2, max_steps=2)


def implicit_resnet():
    return stateful(ImplicitResNet, 4, 1, 1, 2, side=8, **STATIC)


def monotone():
    operator = MonotoneConv(3, (2, 3), key=QUICK)
    model = MonotoneClassifier(MonotoneDEQ(operator, **STATIC), (3, 8, 8), 2, key=QUICK)
    return model, lambda model, x: model(x)


def hyper():
    model = HyperDEQ(
        HyperNetwork(Cell(), 3, key=QUICK),
        solver=deqjax.Picard(None, None),
        max_steps=3,
    )
    return model, lambda model, x: model(x[0, 0, 0, :3], x[0, :, 0, 0])


@pytest.mark.parametrize(
    "make", [classifier, segmenter, revdeq, implicit_resnet, monotone, hyper]
)
def test_outputs_and_gradients_agree_between_eager_and_jit(make):
    model, call = make()
    images, _ = data(n=2)

    def value(model, x):
        out = call(model, x)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(weights * out)

    both = eqx.filter_value_and_grad(value)
    got, gradient = eqx.filter_jit(both)(model, images)
    want, plain = both(model, images)
    assert error(got, want) <= 1e-4
    assert error(gradient, plain) <= 1e-3
