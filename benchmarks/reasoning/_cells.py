"""The model of the sequence tasks: an embedding, an iterated cell, a read-out."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
from jaxtyping import Array, Float, Int, PRNGKeyArray

States = Float[Array, "batch length width"]


def everywhere(layer: Callable) -> Callable:
    """A layer for vectors, at every position of every example."""
    return jax.vmap(jax.vmap(layer))


class TokenEmbedding(eqx.Module):
    """A vector for every token."""

    table: eqx.nn.Embedding

    def __init__(self, tokens: int, width: int, *, key: PRNGKeyArray):
        self.table = eqx.nn.Embedding(tokens, width, key=key)

    def __call__(self, token: Int[Array, ""]) -> Float[Array, " width"]:
        return self.table(token)


class LoopModel(eqx.Module):
    """An input that is injected at every step, a cell, and a linear read-out."""

    embed: Callable
    cell: Callable
    head: eqx.nn.Linear

    def inject(self, inputs: Array) -> States:
        """What the cell is given at every step."""
        return everywhere(self.embed)(inputs)

    def initial_state(self, x: States) -> States:
        """Where the iteration starts."""
        return jnp.zeros_like(x)

    def logits(self, z: States) -> Float[Array, "batch length classes"]:
        """The answer that a state gives."""
        return everywhere(self.head)(z)


class LocalCell(eqx.Module):
    """A gated layer that sees the states of a position's neighbours, and its input.

    f(z, x) = norm(x + W (silu(G u) ⊙ V u)), u = (z at the offsets, x).
    """

    gate: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    offsets: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, width: int, hidden: int, offsets: tuple[int, ...], *, key: PRNGKeyArray
    ):
        key1, key2, key3 = jr.split(key, 3)
        seen = width * (len(offsets) + 1)
        self.gate = eqx.nn.Linear(seen, hidden, key=key1)
        self.value = eqx.nn.Linear(seen, hidden, key=key2)
        self.output = eqx.nn.Linear(hidden, width, use_bias=False, key=key3)
        self.norm = eqx.nn.RMSNorm(width)
        self.offsets = offsets

    def __call__(self, z: States, x: States) -> States:
        seen = jnp.concatenate([*(shift(z, n) for n in self.offsets), x], axis=-1)
        linear = lambda layer, u: u @ layer.weight.T + (
            0 if layer.bias is None else layer.bias
        )
        inner = jax.nn.silu(linear(self.gate, seen)) * linear(self.value, seen)
        return everywhere(self.norm)(x + linear(self.output, inner))


class OrthogonalShift(eqx.Module):
    """Every node takes its left neighbour's state, turned by an orthogonal matrix.

    f(z, x)ᵢ = zᵢ₋₁ exp(A − Aᵀ) for i > 0, and x₀ at the first node, so that neither
    states nor gradients grow or shrink on their way.
    """

    generator: Float[Array, "width width"]

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.generator = 0.01 * jr.normal(key, (width, width))

    def __call__(self, z: States, x: States) -> States:
        turn = jsp.linalg.expm(self.generator - self.generator.T)
        return shift(z, -1) @ turn + x


def shift(z: States, offset: int) -> States:
    """At every position the state at that offset, zero beyond the ends."""
    if offset == 0:
        return z
    zeros = jnp.zeros_like(z[:, : abs(offset)])
    if offset < 0:
        return jnp.concatenate([zeros, z[:, :offset]], axis=1)
    return jnp.concatenate([z[:, offset:], zeros], axis=1)
