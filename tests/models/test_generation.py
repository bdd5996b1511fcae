"""Token by token is the parallel forward pass."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.models import RevDEQLM, TransformerLM, generate
from deqjax.nn import LearnedStart
from tests.helpers import error

TOKENS = jr.randint(jr.key(1), (3, 9), 0, 17)
STATIC = {"rtol": None, "atol": None, "batch_ndim": 1}
TIGHT = {"rtol": 1e-6, "atol": 1e-6, "batch_ndim": 1}


def rev(solver, max_steps=4, **kwargs):
    return RevDEQLM(
        17,
        8,
        2,
        max_length=10,
        solver=solver,
        max_steps=max_steps,
        key=jr.key(0),
        **kwargs,
    )


OPTIONS = {"positions": "rotary", "tied": True, "dropout": 0.3}


def explicit(**kwargs):
    return TransformerLM(17, 8, 2, 3, max_length=10, key=jr.key(0), **kwargs)


MODELS = {
    "explicit": explicit,
    "explicit, rotary": lambda: explicit(**OPTIONS),
    "4 reversible steps, rotary": lambda: rev(deqjax.Reversible(**STATIC), **OPTIONS),
    "converged, rotary": lambda: rev(
        deqjax.Picard(**TIGHT), 100, residual="input", **OPTIONS
    ),
    "4 reversible steps": lambda: rev(deqjax.Reversible(**STATIC)),
    "4 Picard steps": lambda: rev(deqjax.Picard(**STATIC, beta=0.7)),
    "converged": lambda: rev(deqjax.Picard(**TIGHT), 100, residual="input"),
    "converged, Anderson": lambda: rev(deqjax.Anderson(**TIGHT), 100, residual="input"),
    "converged, Broyden": lambda: rev(deqjax.Broyden(**TIGHT), 100, residual="input"),
    "converged, reversible": lambda: rev(
        deqjax.Reversible(**TIGHT), 100, residual="input"
    ),
}
SLOW, OTHER = (
    pytest.mark.slow,
    (
        "4 Picard steps",
        "converged, rotary",
        "converged, reversible",
        "converged, Anderson",
        "converged, Broyden",
    ),
)
DEPTH = {"explicit": 3, "4 reversible steps": 8, "4 Picard steps": 4}
DEPTH |= {f"{name}, rotary": DEPTH[name] for name in ("explicit", "4 reversible steps")}


@eqx.filter_jit
def extend(model, tokens, cache):
    hidden, cache = model.extend(tokens, cache)
    return model.logits(hidden), cache


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=SLOW) if m in OTHER else m for m in MODELS]
)
def test_token_by_token_is_the_parallel_forward(name):
    model = MODELS[name]()
    parallel = eqx.nn.inference_mode(model)
    want = eqx.filter_jit(lambda m, t: m(t))(parallel, TOKENS)
    cache = model.empty_cache(3, 9)
    assert len(cache.keys) == DEPTH.get(name, 1)
    logits, cache = extend(model, TOKENS[:, :4], cache)
    parts = [logits]
    for i in range(4, 9):
        logits, cache = extend(model, TOKENS[:, i : i + 1], cache)
        parts.append(logits)
    within = 1e-4 if "converged" in name else 5e-6  # a tolerance, or rounding
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=0, atol=within)
    assert int(cache.length) == 9
    if "converged" in name:
        worst = np.asarray(cache.residual)
        assert np.all((worst > 0) & (worst < 3e-6))


def test_a_start_of_the_layer_is_that_of_the_parallel_forward():
    model = MODELS["4 reversible steps"]()
    start = eqx.tree_at(
        lambda s: s.value, LearnedStart((8,), batch_ndim=2), jnp.linspace(-2, 2, 8)
    )
    model = eqx.tree_at(
        lambda m: m.deq.start, model, start, is_leaf=lambda x: x is None
    )
    want = eqx.filter_jit(lambda m, t: m(t))(model, TOKENS)
    first, cache = extend(model, TOKENS[:, :8], model.empty_cache(3, 9))
    last, _ = extend(model, TOKENS[:, 8:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, atol=1e-4)


def test_generated_tokens_are_the_likeliest_of_the_parallel_forward():
    model = MODELS["4 reversible steps"]()
    got = generate(model, TOKENS[:, :3], 5, temperature=0)
    text = TOKENS[:, :3]
    parallel = eqx.filter_jit(lambda m, t: m(t))
    for i in range(3, 8):
        logits = parallel(model, jnp.pad(text, [(0, 0), (0, 8 - i)]))[:, i - 1]
        following = jnp.argmax(logits, -1)[:, None].astype(text.dtype)
        text = jnp.concatenate([text, following], 1)
    np.testing.assert_array_equal(got, text[:, 3:])


@pytest.mark.slow
def test_sampling_follows_the_distribution():
    model = MODELS["explicit"]()
    prompt = jnp.tile(TOKENS[:1, :3], (2000, 1))
    got = generate(model, prompt, 1, temperature=2.0, key=jr.key(3))[:, 0]
    logits = model(prompt[:1])[0, -1] / 2
    want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    share = np.bincount(np.asarray(got), minlength=17) / 2000
    np.testing.assert_allclose(share, want, atol=5 * 0.5 / 2000**0.5)
    again = generate(model, prompt, 1, temperature=2.0, key=jr.key(3))[:, 0]
    np.testing.assert_array_equal(got, again)


def test_beta_of_run_time():
    chosen = rev(deqjax.Reversible(**STATIC))
    want = rev(deqjax.Reversible(**STATIC, beta=0.75))(TOKENS)
    run = eqx.filter_jit(lambda m, t, i: m.extend(t, m.empty_cache(3), options=i)[0])
    hidden = run(chosen, TOKENS, {"beta": jnp.array(0.75)})
    assert error(chosen.logits(hidden), want) <= 1e-4
    greedy = {"temperature": 0, "options": {"beta": 0.75}}
    text = generate(chosen, TOKENS, 1, **greedy)[:, 0]
    np.testing.assert_array_equal(text, jnp.argmax(want[:, -1], -1))
    with pytest.raises(ValueError, match=r'`options\["beta"\]`.*1.5'):
        chosen.extend(TOKENS, chosen.empty_cache(3), options={"beta": 1.5})


def test_integers_of_64_bits(x64):
    tokens = TOKENS[:, :3].astype(jnp.int64)
    for name in ("explicit", "4 reversible steps", "converged"):
        make = MODELS[name]
        text = jax.eval_shape(lambda m=make: generate(m(), tokens, 2, temperature=0))
        assert (text.shape, text.dtype) == ((3, 2), jnp.int64)


def test_tokens_without_room_are_nan():
    model = MODELS["explicit"]()
    _, cache = extend(model, TOKENS[:, :4], model.empty_cache(3, 5))
    logits, cache = extend(model, TOKENS[:, 4:5], cache)
    assert bool(jnp.all(jnp.isfinite(logits)))
    logits, _ = extend(model, TOKENS[:, 5:6], cache)
    assert bool(jnp.all(jnp.isnan(logits)))


def test_what_does_not_fit_is_refused_by_name():
    model = MODELS["explicit"]()
    with pytest.raises(ValueError, match="need 12 positions.*10"):
        generate(model, TOKENS, 3, temperature=0)
    with pytest.raises(ValueError, match="`max_length` may be 10.*11"):
        model.empty_cache(3, 11)
    with pytest.raises(ValueError, match="`max_length` may be 10.*11"):
        MODELS["4 Picard steps"]().empty_cache(3, 11)
    with pytest.raises(ValueError, match="`key` is needed"):
        generate(model, TOKENS, 1)
    with pytest.raises(ValueError, match="batch 3.*batch 2"):
        model.extend(TOKENS, model.empty_cache(2))
    with pytest.raises(ValueError, match="9 for a `cache` of 4"):
        model.extend(TOKENS, model.empty_cache(3, 4))
    rec = MODELS["4 reversible steps"]()
    with pytest.raises(ValueError, match="depth 8.*depth 3"):
        rec.extend(TOKENS, model.empty_cache(3))
