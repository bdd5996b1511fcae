"""Text token by token, from models that keep keys and values."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ...nn._attention import Past
from ...nn._checks import check_sizes, check_tokens
from ...nn._tokens import Features, Tokens, signed


class KVCache(eqx.Module):
    """The keys and values of the tokens that a model has seen.

    Attributes:
        keys: shape (depth, batch, max_length, heads, head_dim). `depth` is 1 for an
            equilibrium, where keys and values are those of z*; the number of
            evaluations for a solve of a static length, which has its own at each of
            them; and the number of layers for an explicit model.
        values: as `keys`.
        length: tokens seen.
        residual: the largest ‖f(z) − z‖ / ‖f(z)‖ among the solves of each sequence;
            0 where nothing is solved to a tolerance.
    """

    keys: Float[Array, "depth batch max_length heads head_dim"]
    values: Float[Array, "depth batch max_length heads head_dim"]
    length: Int[Array, ""]
    residual: Float[Array, " batch"]

    @staticmethod
    def empty(
        depth: int,
        batch: int,
        max_length: int,
        num_heads: int,
        head_dim: int,
        dtype: Any,
    ) -> "KVCache":
        """The cache before the first token."""
        check_sizes(batch=batch, max_length=max_length)
        zeros = jnp.zeros((depth, batch, max_length, num_heads, head_dim), dtype)
        return KVCache(
            zeros, zeros, jnp.array(0, jnp.int32), jnp.zeros(batch, jnp.float32)
        )

    def check(self, depth: int, tokens: Array) -> None:
        """Raise unless the cache is one of a model of this depth, for these tokens."""
        have, batch, length = self.keys.shape[:3]
        if have != depth or batch != tokens.shape[0]:
            raise ValueError(
                f"`cache` must have depth {depth}, as the model, and batch "
                f"{tokens.shape[0]}, as `tokens`; it has depth {have} and batch "
                f"{batch}. Make it with the model's `empty_cache`."
            )
        if tokens.shape[1] > length:
            raise ValueError(
                f"`tokens` are {tokens.shape[1]} for a `cache` of {length}; give "
                "`empty_cache` a larger `max_length`."
            )

    def positions(self, tokens: Tokens) -> Int[Array, " length"]:
        """The positions of the tokens that come next."""
        return self.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def past(self, i: int) -> Past:
        """Keys and values at one depth."""
        return Past(self.keys[i], self.values[i], self.length)

    def add(
        self, keys: Array, values: Array, residual: Array | None = None
    ) -> "KVCache":
        """Append the keys and values of new tokens, at every depth."""
        write = lambda cache, new: lax.dynamic_update_slice_in_dim(
            cache, new.astype(cache.dtype), self.length, axis=2
        )
        worst = self.residual
        if residual is not None:
            worst = jnp.maximum(worst, residual.astype(worst.dtype))
        return KVCache(
            write(self.keys, keys),
            write(self.values, values),
            self.length + keys.shape[2],
            worst,
        )

    def guard(self, hidden: Features) -> Features:
        """NaN in place of the states of tokens for which there was no room."""
        fits = self.length <= self.keys.shape[2]
        return jnp.where(fits, hidden, jnp.nan)


def check_room(length: Any, positions: int) -> None:
    """Raise unless a model has positions for all tokens of a cache."""
    check_sizes(max_length=length)
    if length > positions:
        raise ValueError(
            f"`max_length` may be {positions}, for which the model has positions; got "
            f"{length}."
        )


@eqx.filter_jit
def generate(
    model: Any,
    prompt: Array,
    num_tokens: int,
    *,
    temperature: float | int | Array = 1.0,
    key: PRNGKeyArray | None = None,
    options: dict[str, Any] | None = None,
) -> Int[Array, "batch num_tokens"]:
    """Continue sequences token by token.

    The tokens are those that the parallel forward pass would have given: exactly for
    explicit models and for solves of a static length, to the tolerance of the solves
    for converged ones.

    **Cost:** one pass over the prompt, then one solve for one token at a time.
    **Memory:** the cache, see `deqjax.models.KVCache`.

    Args:
        model: a `RevDEQLM` or `TransformerLM`.
        prompt: integers of shape (batch, length), at least one token each.
        num_tokens: how many to add.
        temperature: what logits are divided by; 0 takes the likeliest token.
        key: for sampling; not needed with a Python 0 as the temperature.
        options: of every solve, see the model's `extend`: `{"beta": value}` for another
            weight on the cell.

    Returns:
        The new tokens; −1 where there is nothing to choose from: in sequences with a
        token that is not in the vocabulary, or for an array `temperature` that is
        negative or not finite.

    Raises:
        ValueError: if a shape does not fit, a key is missing, or the sequences would
            outgrow the model's positions.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.RevDEQLM(16, 8, 2, max_length=12, key=jr.key(0))
        >>> prompt = jnp.zeros((2, 4), int)
        >>> deqjax.models.generate(lm, prompt, 3, temperature=0).shape
        (2, 3)
    """
    check_sizes(num_tokens=num_tokens)
    check_tokens("prompt", prompt)
    prompt = signed(prompt)
    total = prompt.shape[1] + num_tokens
    if total > model.max_length:
        raise ValueError(
            f"`prompt` and `num_tokens` need {total} positions; the model has "
            f"`max_length` = {model.max_length}."
        )
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (number or isinstance(temperature, Array)) or jnp.ndim(temperature):
        raise TypeError(f"`temperature` must be a number; got {temperature!r}.")
    if number and not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"`temperature` must be ≥ 0 and finite; got {temperature!r}.")
    greedy = number and temperature == 0
    if key is None:
        if not greedy:
            raise ValueError(
                "`key` is needed for sampling; pass one, or `temperature=0` for the "
                "likeliest tokens."
            )
        key = jr.key(0)  # Not used.

    extend = model.extend
    if options is not None:
        extend = ft.partial(extend, options=options)

    def choose(hidden: Features, key: PRNGKeyArray) -> Int[Array, " batch"]:
        logits = model.logits(hidden[:, -1:])[:, 0]
        chosen, known = jnp.argmax(logits, axis=-1), ~jnp.isnan(logits).any(-1)
        if not greedy:
            heat = jnp.asarray(temperature, logits.dtype)
            sampled = jr.categorical(key, logits / jnp.where(heat > 0, heat, 1))
            chosen = jnp.where(heat > 0, sampled, chosen)
            known &= (heat >= 0) & jnp.isfinite(heat)
        return jnp.where(known, chosen, -1).astype(prompt.dtype)

    def step(carry: PyTree, key: PRNGKeyArray) -> tuple[PyTree, Array]:
        token, cache = carry
        hidden, cache = extend(token[:, None], cache)
        token = choose(hidden, key)
        return (token, cache), token

    keys = jr.split(key, num_tokens)
    hidden, cache = extend(prompt, model.empty_cache(len(prompt), total))
    first = choose(hidden, keys[0])
    _, rest = lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def static_depth(solver: Any, num_steps: int) -> int | None:
    """The evaluations of a solve of static length, or None for a tested one.

    Raises:
        ValueError: for a static solver that mixes iterates across tokens.
    """
    if not getattr(solver, "static", False):
        return None
    if solver.keeps_best:
        raise ValueError(
            "Generation from a solve of static length needs `deqjax.Reversible` or "
            "`deqjax.Picard`, whose iterates of a token do not depend on later ones; "
            f"got {type(solver).__name__}. Give it tolerances, or change `solver`."
        )
    return solver.evals_per_step * num_steps


def static_solve(
    solver: Any,
    evaluate: Callable[[Features, PyTree], tuple[Features, PyTree]],
    z0: Features,
    pasts: PyTree,
    options: dict[str, Any],
) -> tuple[Features, PyTree]:
    """The iteration of a static solver, with a past of its own for each evaluation.

    A token's iterates depend on the iterates of the same number of earlier tokens
    alone, so that going on from their keys and values changes nothing.

    Args:
        solver: `Picard` or `Reversible`.
        evaluate: `evaluate(z, past) -> (f, kept)`.
        z0: the start.
        pasts: a past for each evaluation, along the first axis.
        options: as of `deqjax.fixed_point`; `beta` alone is known.

    Returns:
        The last iterate, and what was kept, along the first axis.
    """
    unknown = sorted(set(options) - (solver.known_options & {"beta"}))
    if unknown:
        raise ValueError(
            "`options` of a static solve with a cache may be `beta`, for "
            f"`deqjax.Reversible`; got {unknown} for {type(solver).__name__}."
        )
    solver = solver.prepared(z0, options)

    def step(pair: PyTree, past: PyTree) -> tuple[PyTree, PyTree]:
        z, memory = pair
        f, kept = evaluate(z, past)
        return solver.update(z, f, memory), kept

    start = z0, solver.init_memory(z0, options)
    (z, _), kept = lax.scan(step, start, pasts)
    return z, kept
