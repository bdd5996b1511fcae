"""Adaptive embedding and softmax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deqjax.nn import AdaptiveEmbedding, AdaptiveSoftmax
from tests.helpers import error

EMBEDDING = AdaptiveEmbedding(30, 16, cutoffs=(6, 14), scale=0.5, key=jr.key(0))
SOFTMAX = AdaptiveSoftmax(EMBEDDING, block=4, scale=0.5, key=jr.key(1))
SOFTMAX = eqx.tree_at(
    lambda s: (s.cluster_bias, s.biases),
    SOFTMAX,
    (
        jnp.array([0.3, -0.2]),
        tuple(jnp.sin(jnp.arange(1.0, 1.0 + len(b))) for b in SOFTMAX.biases),
    ),
)


def test_an_embedding_is_its_row_projected_and_scaled():
    tokens = jnp.array([[0, 5, 6], [13, 14, 29]])
    got = EMBEDDING(tokens)
    places = [(0, 0), (0, 5), (1, 0), (1, 7), (2, 0), (2, 15)]
    want = [4.0 * EMBEDDING.projections[i] @ EMBEDDING.tables[i][j] for i, j in places]
    assert error(got.reshape(6, 16), jnp.stack(want)) <= 1e-5
    assert [t.shape for t in EMBEDDING.tables] == [(6, 16), (8, 4), (16, 1)]


def test_narrow_integers_are_words_of_a_large_vocabulary_too():
    table = AdaptiveEmbedding(300, 8, cutoffs=(200,), key=jr.key(0))
    softmax = AdaptiveSoftmax(table, key=jr.key(1))
    words = jnp.array([[3, 100, 127]])
    hidden = table(words)
    narrow = words.astype(jnp.int8)
    np.testing.assert_array_equal(table(narrow), hidden)
    got = softmax.nll(hidden, narrow, table)
    np.testing.assert_array_equal(got, softmax.nll(hidden, words, table))


def test_words_outside_of_the_vocabulary_are_nan():
    got = EMBEDDING(jnp.array([0, 30, -1]))
    np.testing.assert_array_equal(jnp.isnan(got).all(-1), [False, True, True])
    nll = SOFTMAX.nll(jnp.ones((1, 3, 16)), jnp.array([[0, 30, -1]]), EMBEDDING)
    np.testing.assert_array_equal(jnp.isnan(nll), [[False, True, True]])


def dense(softmax, embedding, hidden, targets):
    """log p in NumPy, word by word, as a tree of two softmaxes."""
    h = np.asarray(hidden, np.float64)

    def log_softmax(a):
        return a - np.log(np.exp(a).sum(-1, keepdims=True))

    table = np.concatenate([embedding.tables[0], softmax.clusters])
    bias = np.concatenate([softmax.biases[0], softmax.cluster_bias])
    head = log_softmax(h @ np.asarray(softmax.projection) @ table.T + bias)
    out = np.zeros(targets.shape)
    for place in np.ndindex(*targets.shape):
        w = int(targets[place])
        if w < 6:
            out[place] = head[place][w]
            continue
        i = 1 if w < 14 else 2
        small = h[place] @ np.asarray(embedding.projections[i])
        tail = log_softmax(np.asarray(embedding.tables[i]) @ small + softmax.biases[i])
        out[place] = head[place][6 + i - 1] + tail[w - embedding.bounds[i]]
    return out


@pytest.fixture(scope="module")
def data():
    return jr.normal(jr.key(2), (3, 7, 16)), jr.randint(jr.key(3), (3, 7), 0, 30)


def test_losses_in_blocks_are_the_log_probabilities_of_the_targets(data):
    hidden, targets = data
    want = dense(SOFTMAX, EMBEDDING, hidden, targets)
    nll = eqx.filter_jit(lambda s, *a: s.nll(*a))
    np.testing.assert_allclose(-nll(SOFTMAX, *data, EMBEDDING), want, rtol=2e-5)
    probs = SOFTMAX.log_probs(hidden, EMBEDDING)
    picked = jnp.take_along_axis(probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(picked, want, rtol=2e-5)
    np.testing.assert_allclose(jnp.exp(probs).sum(-1), 1, rtol=1e-5)
    # A block in which only one cluster occurs.
    alone = jnp.full((1, 4), 20)
    want = dense(SOFTMAX, EMBEDDING, hidden[:1, :4], alone)
    got = nll(SOFTMAX, hidden[:1, :4], alone, EMBEDDING)
    np.testing.assert_allclose(-got, want, rtol=2e-5)


def test_gradients_in_blocks_are_those_of_the_whole(data):
    hidden, targets = data

    def whole(model):
        probs = model[0].log_probs(model[2], model[1])
        return -jnp.sum(jnp.take_along_axis(probs, targets[..., None], -1))

    blocks = lambda model: jnp.sum(model[0].nll(model[2], targets, model[1]))
    model = (SOFTMAX, EMBEDDING, hidden)
    got = eqx.filter_jit(eqx.filter_grad(blocks))(model)
    want = eqx.filter_jit(eqx.filter_grad(whole))(model)
    assert error(got, want) <= 1e-5


def test_the_logits_of_a_cluster_are_computed_where_it_occurs():
    """By the program: what has a cluster's width is in a branch."""
    embedding = AdaptiveEmbedding(40, 16, cutoffs=(6, 17), key=jr.key(0))
    softmax = AdaptiveSoftmax(embedding, block=4, key=jr.key(1))
    jaxpr = jax.make_jaxpr(lambda h, t: softmax.nll(h, t, embedding))(
        jnp.ones((1, 8, 16)), jnp.zeros((1, 8), int)
    )

    def shapes(jaxpr, branches):
        for eqn in jaxpr.eqns:
            yield from (v.aval.shape for v in eqn.outvars)
            if eqn.primitive.name == "cond" and not branches:
                continue
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner, branches)

    everywhere = set(shapes(jaxpr.jaxpr, True))
    outside = set(shapes(jaxpr.jaxpr, False))
    logits = {(4, 11), (4, 23)}
    assert logits <= everywhere
    assert not logits & outside
    assert (4, 8) in outside  # 6 words and 2 clusters


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveEmbedding(9, 8, cutoffs=(5, 3), key=jr.key(0)), "grow.*5, 3"),
        (lambda: AdaptiveEmbedding(9, 8, cutoffs=(9,), key=jr.key(0)), "below.*9"),
        (lambda: AdaptiveEmbedding(9, 3, cutoffs=(5,), key=jr.key(0)), "no dimension"),
        (
            lambda: AdaptiveEmbedding(9, 8, cutoffs=(-2, 5), key=jr.key(0)),
            "`cutoffs`.*-2",
        ),
        (lambda: AdaptiveEmbedding(9, 8, scale=-1.0, key=jr.key(0)), "`scale`.*-1.0"),
        (lambda: AdaptiveSoftmax(EMBEDDING, scale=0.0, key=jr.key(0)), "`scale`.*0.0"),
        (lambda: AdaptiveSoftmax(EMBEDDING, block=0, key=jr.key(0)), "`block`.*0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_cluster_weights_of_the_source_are_reversed():
    """There cluster i is scored by the entry that is i-th from the end."""
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(2, 16)), rng.normal(size=2)
    softmax = SOFTMAX.with_source_clusters(weight, bias)
    hidden = rng.normal(size=(1, 1, 16))
    small = hidden[0, 0] @ np.asarray(SOFTMAX.projection, np.float64)
    first = np.asarray(EMBEDDING.tables[0], np.float64) @ small
    first = first + np.asarray(SOFTMAX.biases[0])
    scores = np.concatenate([first, weight @ small + bias])
    scores = scores - np.log(np.exp(scores).sum())
    logs = softmax.log_probs(jnp.asarray(hidden, jnp.float32), EMBEDDING)[0, 0]
    for i, (low, high) in enumerate([(6, 14), (14, 30)], start=1):
        together = np.log(np.exp(np.asarray(logs[low:high], np.float64)).sum())
        np.testing.assert_allclose(together, scores[-i], rtol=1e-4)
    with pytest.raises(ValueError, match=r"`bias`.*\(2,\).*got \(3,\)"):
        SOFTMAX.with_source_clusters(weight, np.zeros(3))
