"""Dropout, rotary positions and a tied head of the language models."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import deqjax
from benchmarks.common.training import cast_linear
from deqjax._fold import fold
from deqjax.models import RevDEQLM, TransformerLM, generate
from deqjax.nn import RevDEQBlock, TransformerBlock, count_parameters
from deqjax.nn._attention import attend
from deqjax.nn._dropout import split_key
from deqjax.nn._rotary import rotate
from tests import helpers
from tests.helpers import error, identical
from tests.nn.training import QUICK, quick

VOCAB, DIM, LENGTH, RATE = 17, 8, 6, 0.3
TOKENS = jr.randint(jr.key(1), (3, LENGTH), 0, VOCAB)
KEY = jr.key(4)


def rev(**kwargs):
    given = {"key": QUICK, **kwargs}
    return RevDEQLM(VOCAB, DIM, 2, max_length=LENGTH, hidden=8, **given)


def explicit(**kwargs):
    given = {"key": QUICK, **kwargs}
    return TransformerLM(VOCAB, DIM, 2, 1, max_length=LENGTH, hidden=8, **given)


both = pytest.mark.parametrize("make", [rev, explicit])


@both
def test_parameters_are_counted_once(make):
    size = lambda **kwargs: count_parameters(
        eqx.filter_eval_shape(lambda: make(**kwargs))
    )
    whole = size()
    assert size(positions="rotary") == whole - LENGTH * DIM
    assert size(tied=True) == whole - VOCAB * DIM
    assert size(positions="rotary", tied=True) == whole - (LENGTH + VOCAB) * DIM
    assert size(dropout=RATE) == whole


@both
def test_no_option_leaves_a_trace_where_it_is_off(make):
    on, off = make(dropout=RATE), make(dropout=0.0)
    assert identical(*(jtu.tree_leaves(eqx.filter(m, eqx.is_array)) for m in (on, off)))
    names = {jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(off)}
    assert not {n for n in names if "drop" in n}


# --- dropout --------------------------------------------------------------------------


def constant(block, *values):
    """A block whose attention and MLP add one number each, whatever comes in."""
    where = lambda b: (b.attention.output, b.mlp.layers[-1])

    def fill(old, value):
        new = eqx.nn.Linear(old.in_features, old.out_features, key=QUICK)
        arrays = (jnp.zeros_like(new.weight), jnp.full_like(new.bias, value))
        return eqx.tree_at(lambda p: (p.weight, p.bias), new, arrays)

    return eqx.tree_at(where, block, tuple(map(fill, where(block), values)))


@pytest.mark.parametrize("kind", [RevDEQBlock, TransformerBlock])
def test_what_attention_and_mlp_add_is_dropped_apart(kind):
    block = constant(kind(64, 2, 2, dropout=RATE, key=QUICK), 1.0, 10.0)
    zeros = jnp.zeros((20, 3, 64))
    given = (zeros, zeros) if kind is RevDEQBlock else (zeros,)
    added = np.asarray(block.advance(*given, None, key=KEY)[0]) * (1 - RATE)
    one, ten = np.round(added) % 10 == 1, added > 5
    np.testing.assert_allclose(added, one + 10.0 * ten, atol=1e-4)
    if kind is RevDEQBlock:  # One mask for all tokens of a sequence.
        assert (added == added[:, :1]).all()
        one, ten = one[:, 0], ten[:, 0]
    for kept, rate in ((one, 1 - RATE), (ten, 1 - RATE), (one & ten, (1 - RATE) ** 2)):
        assert abs(kept.mean() - rate) < 4 * (rate * (1 - rate) / kept.size) ** 0.5
    assert (one[0] != one[1]).any()  # Each sequence has masks of its own.


@both
def test_embeddings_are_dropped_and_kept_in_the_mean(make):
    step = {"solver": deqjax.Picard(None, None, batch_ndim=1), "max_steps": 1}
    more = {"residual": "input", **step} if make is rev else {}
    model = make(dropout=RATE, **more)
    where = lambda m: m.deq.cell if make is rev else m.layers[0]
    model = eqx.tree_at(where, model, constant(where(model), 0.0, 0.0))
    run = jax.vmap(lambda key: model.solve(TOKENS, key=key).value)
    found = np.asarray(run(jr.split(KEY, 300)))
    want = np.asarray(model.tokens.weight[TOKENS] + model.positions.weight)
    kept = found != 0
    np.testing.assert_allclose(
        found[kept], np.broadcast_to(want, found.shape)[kept] / (1 - RATE), rtol=1e-5
    )
    assert abs(kept.mean() - (1 - RATE)) < 0.02
    spread = np.abs(want) * (RATE / (1 - RATE) / 300) ** 0.5
    assert np.all(np.abs(found.mean(0) - want) < 5 * spread)


def test_one_mask_serves_a_solve():
    model = rev(
        dropout=RATE,
        residual="input",
        solver=deqjax.Picard(1e-6, 1e-6, batch_ndim=1),
        max_steps=100,
    )
    first, second = split_key(KEY, 2)
    x = model.drop(model.tokens.weight[TOKENS] + model.positions.weight, key=first)
    z = quick(lambda m: m.solve(TOKENS, key=KEY).value)(model)
    cell = model.deq.cell
    assert error(cell(z, x, key=second), z) <= 1e-5
    assert error(cell(z, x, key=first), z) >= 1e-2
    # It is drawn before the loop.
    call = lambda z, args: args[0](z, args[1], key=args[2])
    rest, kept, _ = fold(call, z, (cell, x, second))
    names = {e.primitive.name for e in jax.make_jaxpr(rest)(z, kept).eqns}
    assert not {n for n in names if "random" in n or "threefry" in n}


def test_a_reversible_gradient_with_dropout_is_that_of_the_steps(x64):
    model = rev(dropout=RATE, positions="rotary", dtype=jnp.float64)
    keys = split_key(KEY, 2)

    def unrolled(model):
        x = model.drop(model.tokens.weight[TOKENS], key=keys[0])
        f = lambda z, x: model.deq.cell(z, x, key=keys[1])
        z = helpers.reversible(f, jnp.zeros_like(x), x, 4, 0.5)
        return helpers.weigh(model.logits(z))

    solved = lambda model: helpers.weigh(model(TOKENS, key=KEY))
    got, want = (quick(eqx.filter_grad(fn))(model) for fn in (solved, unrolled))
    moving = jtu.tree_leaves_with_path(eqx.filter(want, eqx.is_inexact_array))
    for (path, b), a in zip(moving, jtu.tree_leaves(got), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            a, b, rtol=1e-9, atol=1e-9 * scale, err_msg=jtu.keystr(path)
        )
    other = quick(eqx.filter_grad(lambda m: helpers.weigh(m(TOKENS, key=jr.key(5)))))
    assert error(other(model), want) >= 1e-2


@both
def test_dropout_takes_a_key_in_training_and_none_otherwise(make):
    model, plain = make(dropout=RATE), make()
    with pytest.raises(RuntimeError, match="needs a `key` in training"):
        model(TOKENS)
    want = quick(lambda m: m(TOKENS))(plain)
    assert identical(quick(lambda m: m(TOKENS))(eqx.nn.inference_mode(model)), want)
    # Generation drops nothing.
    text = generate(model, TOKENS[:, :3], 2, temperature=0)
    assert identical(text, generate(plain, TOKENS[:, :3], 2, temperature=0))


# --- rotary positions -----------------------------------------------------------------


def test_rotations_are_those_of_equinox():
    x = jr.normal(KEY, (2, 5, 3, 8))
    rope = eqx.nn.RotaryPositionalEmbedding(8)
    want = jax.vmap(jax.vmap(rope, 1, 1))(x)
    np.testing.assert_allclose(rotate(x, 0), want, rtol=1e-5, atol=1e-6)
    later = rotate(x[:, 2:], jnp.array(2))
    np.testing.assert_allclose(later, want[:, 2:], rtol=1e-5, atol=1e-6)


def test_attention_depends_on_relative_positions_alone():
    q, k, v = jr.normal(KEY, (3, 2, 5, 3, 8))
    at = lambda i, j: attend(rotate(q, i), rotate(k, j), v, None)
    want = at(0, 0)
    assert error(at(400, 400), want) <= 1e-4  # 400 · 2⁻²⁴, the rounding of an angle
    assert error(at(401, 400), want) >= 1e-2


@both
def test_a_repeated_token_shows_no_absolute_position(make):
    same = jnp.full((1, LENGTH), 3)
    spread = lambda x: float(jnp.abs(x - x[:, :1]).max())
    logits = quick(lambda m, t: m(t))
    rotary, learned = make(positions="rotary"), make()
    assert spread(logits(rotary, same)) <= 1e-5
    assert spread(logits(learned, same)) >= 1e-2
    # The order of earlier tokens counts, even in a single layer.
    a, b = (logits(rotary, jnp.array([t]))[:, -1] for t in ([1, 2, 3], [2, 1, 3]))
    assert error(a, b) >= 1e-4


# --- a tied head ----------------------------------------------------------------------


@both
def test_the_gradient_of_a_tied_table_is_the_sum_of_both_uses(make):
    tied, plain = make(tied=True), make()
    where = lambda m: (m.tokens.weight, m.head.weight)
    table = tied.tokens.weight
    plain = eqx.tree_at(where, plain, (DIM**0.5 * table, table))
    targets = jnp.roll(TOKENS, 1, 1)
    loss = lambda m: jnp.mean(m.nll(m.solve(TOKENS).value, targets))
    run = quick(eqx.filter_value_and_grad(loss))
    (value, got), (want_value, parts) = run(tied), run(plain)
    assert error(value, want_value) <= 1e-6
    embedding, head = where(parts)
    np.testing.assert_allclose(
        got.tokens.weight, DIM**0.5 * embedding + head, rtol=1e-4, atol=1e-6
    )
    for part in (DIM**0.5 * embedding, head):  # Neither is the whole.
        assert error(part, got.tokens.weight) >= 1e-2


@both
def test_a_tied_head_is_multiplied_in_the_dtype_of_the_layers(make):
    model = cast_linear(make(tied=True), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(model.logits)(jnp.ones((1, 2, DIM)))
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype(jnp.bfloat16)}
    assert jaxpr.out_avals[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dropout": 1.0}, "`dropout`.*1.0"),
        ({"positions": "sines"}, '`positions` must be "learned" or "rotary".*sines'),
    ],
)
@both
def test_what_does_not_fit_is_refused_by_name(make, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


def test_heads_of_odd_width_cannot_be_rotated():
    with pytest.raises(ValueError, match="`dim` / `num_heads`.*6 / 2 = 3"):
        RevDEQLM(VOCAB, 6, 2, max_length=4, positions="rotary", key=QUICK)
