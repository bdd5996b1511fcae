"""Every model has the one interface, and the same lines run with every model."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import deqjax
from deqjax import models, nn
from tests.helpers import error, identical
from tests.nn.training import QUICK, quick

TOKENS, IMAGES = jnp.ones((2, 4), int), jr.normal(jr.key(1), (2, 3, 8, 8))
STATIC = {"solver": deqjax.Picard(None, None, batch_ndim=1), "max_steps": 2}


def monotone(key):
    operator = nn.MonotoneConv(3, (2,), key=key)
    layer = nn.MonotoneDEQ(operator, **STATIC)
    return models.MonotoneClassifier(layer, (3, 8, 8), 2, key=key)


# A small model of every class, and a batch for it.
SMALL = {
    "RevDEQLM": (lambda key: models.RevDEQLM(7, 4, 2, max_length=4, key=key), TOKENS),
    "TransformerLM": (
        lambda key: models.TransformerLM(7, 4, 2, 2, max_length=4, key=key),
        TOKENS,
    ),
    "DEQTransformerLM": (
        lambda key: models.DEQTransformerLM(
            7, 4, 2, 4, memory_length=3, dropout=0.1, **STATIC, key=key
        ),
        TOKENS,
    ),
    "MDEQClassifier": (
        lambda key: models.MDEQClassifier(
            (2, 2), (1, 1), 2, 2, groups=1, expansion=1, dropout=0.1, **STATIC, key=key
        ),
        IMAGES,
    ),
    "MDEQSegmenter": (
        lambda key: models.MDEQSegmenter(
            (2, 2), 2, halvings=0, groups=1, expansion=1, **STATIC, key=key
        ),
        IMAGES,
    ),
    "RevDEQClassifier": (
        lambda key: models.RevDEQClassifier((2, 2), (1, 1), 2, max_steps=1, key=key),
        IMAGES,
    ),
    "ImplicitResNet": (
        lambda key: models.ImplicitResNet(2, 1, 1, 2, side=8, **STATIC, key=key),
        IMAGES,
    ),
    "MonotoneClassifier": (monotone, IMAGES),
}


def final():
    for name, kind in vars(models).items():
        is_model = inspect.isclass(kind) and issubclass(kind, models.AbstractModel)
        if is_model and not inspect.isabstract(kind):
            yield name


def test_every_model_is_tried():
    assert sorted(final()) == sorted(SMALL)


SOLVE = ["z0", "key", "max_steps", "throw", "options"]
SIGNATURES = {
    "__call__": ["self", "inputs", "state", *SOLVE],
    "solve": ["self", "inputs", "state", *SOLVE],
    "logits": ["self", "z", "state", "key"],
    "published": ["name", "key", "changes"],
    "configuration": ["name"],
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", SIGNATURES)
def test_names_and_order_of_arguments_are_the_same(name, method):
    parameters = inspect.signature(getattr(getattr(models, name), method)).parameters
    assert list(parameters) == SIGNATURES[method]
    positional = ("self", "inputs", "z", "state", "name")
    for argument, parameter in parameters.items():
        assert (parameter.kind is parameter.POSITIONAL_OR_KEYWORD) == (
            argument in positional
        )
        if argument not in ("self", "inputs", "z", "name", "changes"):
            default = parameter.empty if method == "published" else None
            default = False if argument == "throw" else default
            assert parameter.default is default


@pytest.mark.parametrize(
    "name",
    [
        name if name == "RevDEQLM" else pytest.param(name, marks=pytest.mark.slow)
        for name in SMALL
    ],
)
def test_the_same_lines_run_with_every_model(name, tmp_path):
    make, inputs = SMALL[name]
    key = jr.key(2)
    model, state = quick(eqx.nn.make_with_state(make))(QUICK)

    @quick
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, state, key):
        sol, state = model.solve(inputs, state, key=key)
        logits, state = model.logits(sol.value, state, key=key)
        return jnp.mean(jax.nn.logsumexp(logits, 1)), (logits, sol.stats, state)

    (_, (logits, stats, new)), gradient = loss(model, state, key)
    assert int(stats["num_evals"]) > 0
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert any((g != 0).any() for g in jax.tree.leaves(gradient))

    # A call is the logits of its solve; the new state goes on from there.
    again, _ = quick(lambda m, s, k: m(inputs, s, key=k))(model, state, key)
    assert error(again, logits) <= 1e-5
    after = jax.eval_shape(lambda: model(inputs, new, key=key))[1]
    assert jax.tree.structure(after) == jax.tree.structure(new)

    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, (model, new))
    blank = eqx.filter_eval_shape(eqx.nn.make_with_state(make), QUICK)[0]
    loaded = eqx.tree_deserialise_leaves(path, (blank, new))
    assert identical(*(eqx.filter(m, eqx.is_array) for m in (loaded[0], model)))


@pytest.mark.parametrize("name", ["RevDEQLM", "TransformerLM", "DEQTransformerLM"])
def test_without_a_state_the_result_comes_alone(name):
    make, inputs = SMALL[name]
    model = eqx.nn.inference_mode(make(QUICK))
    logits = jax.eval_shape(lambda: model(inputs))
    sol = jax.eval_shape(lambda: model.solve(inputs).value)
    assert logits.shape == (2, 4, 7)
    assert sol.shape == (2, 4, 4)


@pytest.mark.parametrize("name", ["RevDEQLM", "DEQTransformerLM"])
def test_the_loss_is_that_of_the_logits(name):
    make, _ = SMALL[name]
    model = eqx.nn.inference_mode(make(QUICK))
    z = jr.normal(jr.key(3), (2, 4, 4))
    targets = jnp.array([[0, 6, 2, 3], [1, -1, 7, 0]])
    got = model.nll(z, targets)
    want = jax.nn.log_softmax(model.logits(z))
    want = -jnp.take_along_axis(want, targets[..., None] % 7, -1)[..., 0]
    known = (targets >= 0) & (targets < 7)
    assert error(jnp.where(known, got, 0), jnp.where(known, want, 0)) <= 1e-5
    assert bool(jnp.all(jnp.isnan(got) == ~known))


def test_batch_norms_need_their_state():
    make, inputs = SMALL["RevDEQClassifier"]
    model = eqx.filter_eval_shape(make, QUICK)
    with pytest.raises(ValueError, match="`state` must be.*make_with_state"):
        model(inputs)


def test_an_explicit_model_has_nothing_to_solve():
    model = SMALL["TransformerLM"][0](QUICK)
    with pytest.raises(ValueError, match="`max_steps` must be None.*3"):
        model.solve(TOKENS, max_steps=3)


def test_a_name_that_is_not_published_is_refused():
    with pytest.raises(ValueError, match=r"`name`.*\['wikitext103'\].*'gpt'"):
        models.RevDEQLM.published("gpt", key=QUICK)


def test_changes_take_the_place_of_published_arguments():
    make = eqx.nn.make_with_state(models.RevDEQClassifier.published)
    model, _ = eqx.filter_eval_shape(make, "cifar10", num_classes=3, key=QUICK)
    assert model.head.weight.shape == (3, 128)
    former, _ = eqx.filter_eval_shape(
        eqx.nn.make_with_state(models.RevDEQClassifier.cifar10),
        num_classes=3,
        key=QUICK,
    )
    assert jax.tree.structure(former) == jax.tree.structure(model)


def test_moved_names_work_where_they_were():
    for name in SMALL:
        assert getattr(nn, name) is getattr(models, name)
    assert nn.generate is models.generate
    assert nn.Cache is models.KVCache
    assert nn.Memory is models.SegmentMemory
    with pytest.raises(AttributeError, match="no attribute 'RevDEQVLM'"):
        _ = nn.RevDEQVLM
