"""What is not finite, and tokens that are none, give NaN and no prediction."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax.models import (
    DEQTransformerLM,
    MonotoneClassifier,
    RevDEQLM,
    TransformerLM,
    generate,
)
from deqjax.nn import DEQ, MonotoneDense, MonotoneDEQ, solve_stream
from tests import helpers

KEY = jr.key(0)
W = helpers.weights(jr.key(0), 4)
TOKENS = jr.randint(jr.key(1), (2, 6), 0, 17)
STATIC = {"rtol": None, "atol": None, "batch_ndim": 1}


def cell(z, x, key=None):
    return jnp.tanh(z @ W + x)


@pytest.mark.parametrize(
    "solver",
    [
        deqjax.Picard(batch_ndim=1),
        deqjax.Anderson(batch_ndim=1),
        deqjax.Reversible(batch_ndim=1),
        deqjax.Picard(**STATIC),
        optx.FixedPointIteration(1e-4, 1e-6),
    ],
    ids=["picard", "anderson", "reversible", "static", "optimistix"],
)
def test_the_problem_of_a_bad_input_is_nan_and_the_others_are_as_they_were(solver):
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    deq = DEQ(cell, solver=solver, max_steps=20)
    spoilt = deq.solve(x.at[0, 1].set(jnp.nan))
    assert bool(jnp.all(jnp.isnan(spoilt.value[0])))
    assert spoilt.result != optx.RESULTS.successful
    if hasattr(solver, "batch_ndim"):
        np.testing.assert_array_equal(spoilt.value[1], deq(x)[1])


def test_an_input_may_hold_infinities_that_the_cell_makes_sense_of():
    masked = lambda z, x, key=None: 0.5 * jax.nn.softmax(z + x)
    deq = DEQ(masked, solver=deqjax.Picard())
    value = deq(jnp.array([0.0, 1.0, -jnp.inf]))
    np.testing.assert_allclose(jnp.sum(value), 0.5, rtol=1e-6)


def test_gradients_of_the_other_problems_are_as_they_were():
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    scaled = lambda z, x, key=None: cell(z, x[0]) * x[1]
    deq = DEQ(scaled, solver=deqjax.Picard(batch_ndim=1))

    @jax.jit
    @jax.grad
    def gradient(scale, x):
        z = deq((x, scale), z0=jnp.zeros((2, 4)))
        return jnp.sum(jnp.where(jnp.isnan(z), 0, z))

    one = jnp.ones((2, 4))
    spoilt = gradient(one, x.at[0].set(jnp.nan))
    np.testing.assert_allclose(spoilt[1], gradient(one, x)[1], rtol=1e-6)


def test_a_monotone_classifier_makes_no_prediction_of_a_bad_example():
    layer = MonotoneDEQ(MonotoneDense(3, 4, key=KEY))
    model = MonotoneClassifier(layer, (3,), 2, key=KEY)
    x = jnp.ones((2, 3))
    logits = eqx.filter_jit(model)(x.at[0, 0].set(jnp.nan))
    assert bool(jnp.all(jnp.isnan(logits[0])))
    np.testing.assert_allclose(logits[1], model(x)[1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["NeuralODE", "SteadyStateODE"])
def test_a_differential_equation_is_not_left_at_its_start(kind):
    pytest.importorskip("diffrax", reason="diffrax is an optional extra")
    layer = getattr(deqjax.nn, kind)(cell, max_steps=50)
    assert bool(jnp.all(jnp.isnan(layer(jnp.array([jnp.nan, 0, 0, 0])))))


def test_a_stream_goes_on_after_a_bad_frame():
    deq = DEQ(cell, solver=deqjax.Picard(batch_ndim=1))
    frames = jnp.tile(jnp.linspace(-1, 1, 8).reshape(2, 4), (3, 1, 1))
    values, _ = jax.jit(lambda x: solve_stream(deq, x))(frames.at[1, 0].set(jnp.nan))
    want = jnp.array([[False, False], [True, False], [False, False]])
    np.testing.assert_array_equal(jnp.all(jnp.isnan(values), -1), want)
    np.testing.assert_array_equal(values[2, 0], values[0, 0])


LM = {"max_length": 12, "key": KEY}
MODELS = {
    "reversible": lambda: RevDEQLM(17, 8, 2, **LM),
    "static": lambda: RevDEQLM(17, 8, 2, solver=deqjax.Picard(**STATIC), **LM),
    "tested": lambda: RevDEQLM(
        17, 8, 2, residual="input", solver=deqjax.Picard(batch_ndim=1), **LM
    ),
    "explicit": lambda: TransformerLM(17, 8, 2, 2, **LM),
    "words": lambda: DEQTransformerLM(17, 8, 2, 8, key=KEY),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("reversible", "words")
        else name
        for name in MODELS
    ],
)
def test_tokens_that_are_none_spoil_their_sequence_and_no_other(name):
    model = eqx.filter_jit(MODELS[name])()
    logits = eqx.filter_jit(lambda tokens: model(tokens))
    want = logits(TOKENS)
    for token in (17, -1):
        got = logits(TOKENS.at[0, 5].set(token))
        spoilt = np.asarray(jnp.any(jnp.isnan(got), -1))
        # Where attention alone couples the tokens, those before are what they are.
        causal = name in ("reversible", "static", "explicit")
        np.testing.assert_array_equal(spoilt[0], [not causal] * 5 + [True])
        np.testing.assert_array_equal(got[~spoilt], want[~spoilt])
        assert not spoilt[1].any()


@pytest.mark.parametrize("name", ["reversible", "explicit"])
def test_there_is_nothing_to_generate_from_a_token_that_is_none(name):
    model = eqx.filter_jit(MODELS[name])()
    want = generate(model, TOKENS, 3, temperature=0)
    got = generate(model, TOKENS.at[0, 2].set(17), 3, temperature=0)
    np.testing.assert_array_equal(got[0], -1)
    np.testing.assert_array_equal(got[1], want[1])


def test_temperatures_are_checked_also_where_they_are_arrays():
    model = eqx.filter_jit(MODELS["explicit"])()
    want = generate(model, TOKENS, 3, temperature=0)
    run = lambda t: generate(model, TOKENS, 3, temperature=t, key=KEY)
    np.testing.assert_array_equal(run(jnp.array(0.0)), want)
    np.testing.assert_array_equal(run(jnp.array(0)), want)
    for value in (-1.0, jnp.nan, jnp.inf):
        np.testing.assert_array_equal(run(jnp.array(value)), -1)
    assert bool(jnp.all(run(jnp.array(1.5)) >= 0))
    for value, error in ((-1, ValueError), (np.nan, ValueError), (True, TypeError)):
        with pytest.raises(error, match="`temperature` must be"):
            run(value)


def test_narrow_and_unsigned_prompts_have_room_for_every_token():
    model = eqx.filter_jit(MODELS["explicit"])()
    want = generate(model, TOKENS, 3, temperature=0)
    got = generate(model, TOKENS.astype(jnp.uint8), 3, temperature=0)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32
