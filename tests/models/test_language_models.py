"""The RevDEQ language model, and the explicit one that it is compared with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import RevDEQLM, TransformerLM
from deqjax.nn import RevDEQBlock, count_parameters
from deqjax.nn._checks import check_tokens
from tests.helpers import error
from tests.nn import language
from tests.nn.language import VOCAB, repeated
from tests.nn.training import nll, quick

MODELS = {
    "RevDEQ": RevDEQLM(VOCAB, 16, 2, max_length=8, key=jr.key(0)),
    "explicit": TransformerLM(VOCAB, 16, 2, 2, max_length=8, key=jr.key(0)),
}
TOKENS = jr.randint(jr.key(1), (3, 8), 0, VOCAB)


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]


def loss(model, tokens, targets, key=None):
    return repeated(nll(model(tokens), targets))


@quick
def apply(model, tokens, **kwargs):
    return model(tokens, **kwargs)


def test_published_sizes_are_counted_without_making_them():
    rev = eqx.filter_eval_shape(RevDEQLM.published, "wikitext103", key=jr.key(0))
    make = TransformerLM.published
    explicit = eqx.filter_eval_shape(make, "wikitext103", key=jr.key(0))
    d, hidden, positions, vocab = 768, 3072, 448, 50304
    linear = lambda i, o: i * o + o
    block = 2 * 2 * d + 3 * linear(d, d) + 4 * d * d
    block += linear(d, hidden) + linear(hidden, hidden) + linear(hidden, d)
    assert count_parameters(rev.deq) == block == 18_296_832
    whole = block + 2 * vocab * d + positions * d
    assert count_parameters(rev) == whole == 95_907_840
    assert abs(count_parameters(explicit) - whole) / whole < 2e-4


def test_the_block_is_the_published_one():
    d, n = 4, 3
    block = RevDEQBlock(d, 2, 5, key=jr.key(0))
    wave = lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size, dtype=a.dtype))
    norms = lambda b: [p for n in (b.norm1, b.norm2) for p in (n.weight, n.bias)]
    block = eqx.tree_at(norms, block, [wave(p) for p in norms(block)])
    z, x = jr.normal(jr.key(1), (2, 2, n, d))
    got = quick(block)(z, x)
    wide = lambda a: np.asarray(a, np.float64) if eqx.is_inexact_array(a) else a
    block, z, x = jax.tree.map(wide, (block, z, x))

    def norm(layer, h):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h * layer.weight + layer.bias

    def linear(layer, h):
        bias = 0 if layer.bias is None else layer.bias
        return h @ layer.weight.T + bias

    a = block.attention
    h = norm(block.norm1, z + x)
    q, k, v = (
        linear(own, linear(extra, h)).reshape(2, n, 2, 2)
        for own, extra in (
            (a.query, block.query),
            (a.key, block.key),
            (a.value, block.value),
        )
    )
    gathered = np.zeros((2, n, 2, 2))
    for b, i, head in np.ndindex(2, n, 2):
        s = k[b, : i + 1, head] @ q[b, i, head] / np.sqrt(2)
        p = np.exp(s) / np.exp(s).sum()
        gathered[b, i, head] = p @ v[b, : i + 1, head]
    h = z + linear(a.output, gathered.reshape(2, n, d))
    m = norm(block.norm2, h)
    for i, layer in enumerate(block.mlp.layers):
        m = linear(layer, m)
        m = np.asarray(jax.nn.gelu(jnp.asarray(m, jnp.float32))) if i < 2 else m
    assert error(got, h + m) <= 1e-5


def test_the_state_is_solved_for_or_the_input_added_to():
    published = RevDEQBlock(8, 2, 8, key=jr.key(0))
    other = RevDEQBlock(8, 2, 8, residual="input", key=jr.key(0))
    z, x = jr.normal(jr.key(1), (2, 1, 5, 8))
    h, _ = published.attention(
        *(
            jax.vmap(jax.vmap(p))(jax.vmap(jax.vmap(published.norm1))(z + x))
            for p in (published.query, published.key, published.value)
        ),
        None,
    )
    rest = lambda h: (
        h + jax.vmap(jax.vmap(other.mlp))(jax.vmap(jax.vmap(other.norm2))(h))
    )
    assert error(published(z, x), rest(z + h)) <= 1e-5
    assert error(other(z, x), rest(x + h)) <= 1e-5


def test_later_tokens_and_other_sequences_change_nothing(model):
    want = apply(model, TOKENS)
    changed = TOKENS.at[:, 5:].set((TOKENS[:, 5:] + 1) % VOCAB).at[0].set(0)
    got = apply(model, changed)
    assert error(got[1:, :5], want[1:, :5]) <= 1e-5
    assert error(got[1:, 5:], want[1:, 5:]) >= 1e-2


@pytest.mark.slow
def test_compiled_and_eager_agree_and_are_the_gradient_of_the_steps(model):
    data = language.copying(jr.key(2), 2)
    value, gradient = eqx.filter_value_and_grad(loss)(model, *data)
    compiled = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    again, same = compiled(model, *data)
    assert error(again, value) <= 1e-5
    assert error(same, gradient) <= 1e-4
    if isinstance(model, RevDEQLM):
        adjoint = deqjax.UnrolledAdjoint()
        other = RevDEQLM(VOCAB, 16, 2, max_length=8, adjoint=adjoint, key=jr.key(0))
        _, want = compiled(other, *data)
        assert error(same, want) <= 1e-4


@pytest.mark.parametrize(
    "name", ["RevDEQ", pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_copying_is_learned(name):
    model = MODELS[name]
    trained, losses = language.train(model, loss, steps=100, jit=quick)
    assert float(losses[0]) > 1.5
    assert float(losses[-1]) < 0.15
    tokens, targets = language.copying(jr.key(5))
    guess = jnp.argmax(trained(tokens), -1)[:, language.HALF - 1 :]
    assert float(jnp.mean(guess == targets[:, language.HALF - 1 :])) > 0.95


def test_the_residual_is_reported():
    model = MODELS["RevDEQ"]
    sol = quick(lambda m, t: m.solve(t))(model, TOKENS)
    assert int(sol.stats["num_evals"]) == 8
    assert error(model.logits(sol.value), apply(model, TOKENS)) <= 1e-6
    x = model.tokens.weight[TOKENS] + model.positions.weight
    f = lambda z: model.deq.cell(z, x)

    @jax.jit
    def last():  # y₄, which the last evaluation is at
        y = z = jnp.zeros_like(x)
        for _ in range(4):
            y = (y + f(z)) / 2
            z = (z + f(y)) / 2
        return y, f(y)

    y, fy = last()
    size = lambda a: np.linalg.norm(np.reshape(a, (3, -1)), axis=1)
    want = size(fy - y) / size(fy)
    np.testing.assert_allclose(sol.stats["relative_residual"], want, rtol=1e-3)


@pytest.mark.slow
def test_parameters_may_have_another_dtype():
    lm = RevDEQLM(VOCAB, 8, 2, max_length=8, dtype=jnp.bfloat16, key=jr.key(0))
    got = apply(lm, TOKENS)
    assert got.dtype == jnp.bfloat16
    widen = lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a
    assert error(got, apply(jax.tree.map(widen, lm), TOKENS)) <= 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RevDEQLM(0, 8, 2, max_length=8, key=jr.key(0)), "`vocab_size`.*0"),
        (lambda: RevDEQLM(7, 8, 3, max_length=8, key=jr.key(0)), "multiple of.*3"),
        (
            lambda: RevDEQLM(
                7, 8, 2, max_length=8, solver=deqjax.Picard(), key=jr.key(0)
            ),
            "`solver`.*batch_ndim=1.*got batch_ndim=0",
        ),
        (lambda: RevDEQBlock(8, 2, 8, residual="x", key=jr.key(0)), "`residual`.*'x'"),
        (lambda: TransformerLM(7, 8, 2, 0, max_length=8, key=jr.key(0)), "num_layers"),
        (lambda: MODELS["RevDEQ"](TOKENS[0]), r"shape \(batch, length\).*\(8,\)"),
        (lambda: MODELS["RevDEQ"](jnp.zeros((1, 4))), "must be integers.*float32"),
        (lambda: check_tokens("prompt", [[1, 2]]), "`prompt` must be an array.*list"),
        (lambda: MODELS["explicit"](jnp.zeros((1, 9), int)), "`max_length` = 8.*9"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()
