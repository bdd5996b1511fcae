"""The DEQ-Transformer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import DEQTransformerLM
from deqjax.nn import DEQTransformerBlock, count_parameters
from deqjax.nn._deq_transformer import Context, by_distance, sinusoids
from tests.helpers import error
from tests.nn import language
from tests.nn.language import VOCAB, repeated
from tests.nn.training import quick

TIGHT = deqjax.Picard(1e-6, 1e-6, batch_ndim=1)


def lm(**kwargs):
    settings = {
        "cutoffs": (3,),
        "scale": 0.1,
        "solver": TIGHT,
        "max_steps": 60,
        "key": jr.key(0),
    }
    return DEQTransformerLM(VOCAB, 16, 2, 32, **{**settings, **kwargs})


def loss(model, tokens, targets, key):
    sol = model.solve(tokens, key=key)
    return repeated(model.nll(sol.value, targets, key=key))


@pytest.mark.parametrize("name", ["wikitext103", "wikitext103_regularised"])
def test_published_sizes_are_counted_without_making_them(name):
    model = eqx.filter_eval_shape(DEQTransformerLM.published, name, key=jr.key(0))
    d, hidden = 700, 48000
    rows = 3 * d + d + d + hidden + d  # each with a norm of its own
    block = 5 * d * d + 2 * d * hidden + rows + (d + hidden + d) + 2 * d
    assert count_parameters(model.deq) == block == 69_753_000
    assert count_parameters(model.injection) == 3 * d * d + 3 * d == 1_472_100
    assert count_parameters(model) == 97_691_888
    assert count_parameters(model) + model.num_tied == 97_851_488


def test_scores_by_distance_become_scores_by_key():
    n, m = 3, 5
    distance = np.arange(m - 1, -1, -1)
    got = np.asarray(
        by_distance(jnp.asarray(np.tile(distance, (2, n, 1)), jnp.float32))
    )
    for i, j in np.ndindex(n, m):
        if j <= i + m - n:
            assert (got[:, i, j] == i + m - n - j).all()


def test_sinusoids_of_distances():
    s = np.asarray(sinusoids(3, 4, jnp.float32))
    want = [[np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]]
    np.testing.assert_allclose(s[:1], want, rtol=1e-5)
    np.testing.assert_allclose(s[2], [0, 0, 1, 1])


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_the_block_is_the_published_one(pre_norm):
    d, heads, n, m = 4, 2, 3, 2
    block = DEQTransformerBlock(
        d, heads, 5, pre_norm=pre_norm, scale=0.7, key=jr.key(0)
    )
    # Rows' norms that are not those of the directions, and biases that count.
    block = eqx.tree_at(
        lambda b: [b.qkv.g, b.mlp1.layer.bias, b.mlp2.layer.bias, b.output.layer.bias],
        block,
        replace_fn=lambda a: (
            a + 0.3 * jnp.cos(jnp.arange(1.0, 1 + a.size)).reshape(a.shape)
        ),
    )
    z, memory = jr.normal(jr.key(1), (1, n, d)), jr.normal(jr.key(2), (1, m, d))
    u = jr.normal(jr.key(3), (1, m + n, 3 * d))
    x = Context(u, memory, jnp.array(1), sinusoids(m + n, d, jnp.float32))
    got = quick(block)(z, x)[0]
    wide = lambda a: np.asarray(a, np.float64) if eqx.is_inexact_array(a) else a
    block, z, memory, u = jax.tree.map(wide, (block, z, memory, u))

    def norm(h):
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt(np.mean(h * h, -1, keepdims=True) + 1e-5)

    def weight(layer):
        v = layer.layer.weight
        return layer.g * v / np.linalg.norm(v, axis=1, keepdims=True)

    whole = np.concatenate([memory[0], z[0]])
    source = norm(whole) if pre_norm else whole
    q, k, v = np.split(source @ weight(block.qkv).T + u[0], 3, axis=-1)
    gathered = np.zeros((n, d))
    for i, head in np.ndindex(n, heads):
        part = slice(2 * head, 2 * head + 2)
        seen = range(1, m + i + 1)  # of the memory, the last token is there
        scores = []
        for j in seen:
            gap = m + i - j
            angles = gap * np.array([1, 1e-2])
            s = np.concatenate([np.sin(angles), np.cos(angles)])
            r = (weight(block.distance) @ s)[part]
            query = q[m + i, part]
            score = (query + block.content_bias[head]) @ k[j, part]
            score += (query + block.distance_bias[head]) @ r
            scores.append(score / np.sqrt(2))
        p = np.exp(scores) / np.exp(scores).sum()
        gathered[i, part] = p @ v[list(seen), part]
    h = norm(z[0] + gathered @ weight(block.output).T + block.output.layer.bias)
    hidden = np.maximum(h @ weight(block.mlp1).T + block.mlp1.layer.bias, 0)
    out = h + hidden @ weight(block.mlp2).T + block.mlp2.layer.bias
    want = out if pre_norm else norm(out)
    if pre_norm:
        # The norm of h is the second layer's: its residual runs from there.
        assert error(norm(h), h) <= 1e-4
    assert error(got, want) <= 1e-4


def test_words_one_by_one_with_memory_are_the_whole_text():
    """The memory is a cache of equilibria: with room for all, nothing is lost."""
    solver = deqjax.Picard(2e-6, 1e-6, batch_ndim=1)
    # Weights with which the solves converge.
    model = lm(memory_length=8, solver=solver, scale=0.3, key=jr.key(2))
    tokens = jr.randint(jr.key(1), (2, 8), 0, VOCAB)

    @quick
    def step(model, tokens, memory):
        sol, memory = model.solve(tokens, memory)
        return model.log_probs(sol.value), memory, sol.stats["converged"]

    want, _, converged = step(model, tokens, model.empty_memory(2))
    assert bool(jnp.all(converged))
    memory, parts = model.empty_memory(2), []
    for i in range(8):
        probs, memory, _ = step(model, tokens[:, i : i + 1], memory)
        parts.append(probs)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-4)
    assert int(memory.length) == 8


def test_float64_models_take_integers_of_64_bits(x64):
    tokens = jnp.array([[1, 2, 3]])
    value = jax.eval_shape(lambda: lm(memory_length=2).solve(tokens).value)
    assert (value.shape, value.dtype) == ((1, 3, 16), jnp.float64)


def test_sinusoids_are_computed_in_the_dtype_of_the_model(x64):
    got = sinusoids(600, 8, jnp.float64)
    angle = np.arange(599, -1, -1)[:, None] * 1e-4 ** (np.arange(0, 8, 2) / 8)
    want = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-13)
    assert sinusoids(3, 4, jnp.bfloat16).dtype == jnp.bfloat16


def test_memory_is_the_last_states_and_is_used():
    model = lm(memory_length=3)
    tokens = jr.randint(jr.key(1), (2, 5), 0, VOCAB)
    solve = quick(lambda m, t, memory: m.solve(t, memory))
    sol, memory = solve(model, tokens, model.empty_memory(2))
    assert error(memory.z, sol.value[:, 2:]) == 0
    _, injection = model.context(tokens)
    assert error(memory.injection, injection[:, 2:]) <= 1e-6
    again, _ = solve(model, tokens, memory)
    assert error(again.value, sol.value) >= 1e-2


@pytest.mark.slow
def test_compiled_and_eager_agree():
    model = lm(dropout=0.1, attention_dropout=0.1)
    data = language.copying(jr.key(2), 2)
    value, gradient = eqx.filter_value_and_grad(loss)(model, *data, jr.key(3))
    compiled = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    again, same = compiled(model, *data, jr.key(3))
    assert error(again, value) <= 1e-5
    assert error(same, gradient) <= 1e-3


@pytest.mark.optimised
def test_copying_is_learned_and_solves_converge():
    trained, losses = language.train(lm(max_steps=30), loss, steps=220)
    assert float(losses[0]) > 1.5
    assert float(losses[-1]) < 0.15
    tokens, _ = language.copying(jr.key(5))
    sol = quick(lambda m, t: m.solve(t))(trained, tokens)
    assert sol.stats["relative_residual"].shape == (16,)
    assert float(jnp.median(sol.stats["relative_residual"])) < 1e-2


def test_dropout_needs_a_key_and_is_off_in_inference_mode():
    model = lm(dropout=0.5)
    tokens = jnp.zeros((1, 3), int)
    with pytest.raises(RuntimeError, match="needs a `key` in training"):
        model(tokens)
    block, x = model.deq.cell, model.context(tokens, key=jr.key(0))[0]
    with pytest.raises(RuntimeError, match="needs a `key` in training"):
        block(block.initial_state(x), x)
    assert block.drop.p == model.drop.p == 0.5
    quiet = eqx.nn.inference_mode(model)
    want, got = lm().context(tokens)[0], quiet.context(tokens)[0]
    assert error(got, want) <= 1e-6
    z = jr.normal(jr.key(1), (1, 3, 16))
    assert error(quiet.deq.cell(z, got), lm().deq.cell(z, want)) <= 1e-6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEQTransformerBlock(6, 4, 8, key=jr.key(0)), "multiple of.*6.*4"),
        (lambda: DEQTransformerBlock(5, 5, 8, key=jr.key(0)), "`dim` must be even.*5"),
        (lambda: lm(dropout=1.5), "1.5"),
        (lambda: lm(solver=deqjax.Broyden()), "`solver`.*batch_ndim=1"),
        (lambda: lm(memory_length=-1), "`memory_length`.*-1"),
        (lambda: lm().solve(jnp.zeros(3, int)), r"shape \(batch, length\)"),
        (
            lambda: lm(memory_length=4).solve(
                jnp.zeros((2, 3), int), lm(memory_length=3).empty_memory(2)
            ),
            r"length 4.*\(2, 3\)",
        ),
        (
            lambda: lm().nll(jnp.zeros((2, 4, 16)), jnp.zeros((2, 6), int)),
            r"`targets`.*\(2, 4\).*\(2, 6\)",
        ),
        (
            lambda: lm().nll(jnp.zeros((2, 4, 16)), jnp.zeros((4, 2), int)),
            r"`targets`.*\(2, 4\).*\(4, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
