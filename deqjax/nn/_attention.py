"""Causal self-attention that can go on from the keys and values of a past."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._tree import wide
from ._rotary import check_rotary, rotate
from ._tokens import Features, project

Heads = Float[Array, "batch length heads head_dim"]
Scores = Float[Array, "batch heads queries keys"]


class Past(NamedTuple):
    """Keys and values of earlier tokens, of which the first `length` are there."""

    keys: Heads
    values: Heads
    length: Int[Array, ""]


class Attention(eqx.Module):
    """Multi-head attention with its four projections, causal.

    With `rotary`, queries and keys are rotated by their positions, which go on from
    those of the past.
    """

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)
    rotary: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        use_bias: bool,
        rotary: bool = False,
        dtype: jnp.dtype | type,
        key: PRNGKeyArray,
    ):
        if rotary:
            check_rotary(dim, num_heads)
        keys = jr.split(key, 4)
        self.query, self.key, self.value, self.output = (
            eqx.nn.Linear(dim, dim, use_bias, dtype, key=k) for k in keys
        )
        self.num_heads, self.rotary = num_heads, rotary

    def __call__(
        self, query: Features, key: Features, value: Features, past: Past | None
    ) -> tuple[Features, tuple[Heads, Heads]]:
        """What the queries gather, and the keys and values of these tokens."""
        split = lambda x: x.reshape(*x.shape[:2], self.num_heads, -1)
        q = split(project(self.query, query))
        k, v = split(project(self.key, key)), split(project(self.value, value))
        if self.rotary:
            start = 0 if past is None else past.length
            q, k = rotate(q, start), rotate(k, start)
        k, v = confine(k, v)
        gathered = attend(q, k, v, past).reshape(query.shape)
        return project(self.output, gathered), (k, v)


def attend(q: Heads, k: Heads, v: Heads, past: Past | None) -> Heads:
    """Softmax attention to the tokens up to each one's own, and to the past.

    The past is scored beside the new tokens, not joined to them, so that an evaluation
    copies no cache. Scores and their softmax are in at least float32.
    """
    n = q.shape[1]
    q = q * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones((n, n), bool))
    scores = jnp.where(causal, _scores(q, k), -jnp.inf)
    if past is None:
        return _gather(jax.nn.softmax(scores), v)
    there = jnp.arange(past.keys.shape[1], dtype=past.length.dtype) < past.length
    earlier = jnp.where(there, _scores(q, past.keys), -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([earlier, scores], axis=-1))
    return _gather(weights[..., :-n], past.values) + _gather(weights[..., -n:], v)


def confine(k: Heads, v: Heads) -> tuple[Heads, Heads]:
    """Keys and values of which those that are not finite reach who attends to them.

    A value counts with weight 0, too, and 0 · NaN is NaN: a bad token would spoil those
    before it. So the value is 0 instead, and the key NaN.
    """
    lost = ~jnp.all(jnp.isfinite(v), axis=-1, keepdims=True)
    return jnp.where(lost, jnp.nan, k), jnp.where(lost, 0, v)


def _scores(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
) -> Scores:
    dtype = wide(q.dtype)
    return jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=dtype)


def _gather(weights: Scores, v: Float[Array, "batch keys heads head_dim"]) -> Heads:
    return jnp.einsum("bhij,bjhd->bihd", weights.astype(v.dtype), v)
