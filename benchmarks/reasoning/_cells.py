"""The models: an embedding, a cell that is iterated, and a linear read-out."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._sudoku import UNITS

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


class GatedCell(eqx.Module):
    """A gated layer that sees, at each position, its state, others', and its input.

    f(z, x) = norm(x + W (silu(G u) ⊙ V u)), where u holds what `look` sees of z,
    and x.
    """

    gate: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    look: str = eqx.field(static=True)

    def __init__(self, width: int, hidden: int, look: str, *, key: PRNGKeyArray):
        """Look `"left"` (at the left neighbour), or at the `"units"` of a sudoku."""
        key1, key2, key3 = jr.split(key, 3)
        seen = width * (len(LOOKS[look]) + 2)
        self.gate = eqx.nn.Linear(seen, hidden, key=key1)
        self.value = eqx.nn.Linear(seen, hidden, key=key2)
        self.output = eqx.nn.Linear(hidden, width, use_bias=False, key=key3)
        self.norm = eqx.nn.RMSNorm(width)
        self.look = look

    def __call__(self, z: States, x: States) -> States:
        others = (see(z) for see in LOOKS[self.look])
        u = jnp.concatenate([z, *others, x], axis=-1)
        inner = jax.nn.silu(_linear(self.gate, u)) * _linear(self.value, u)
        return everywhere(self.norm)(x + _linear(self.output, inner))


def _linear(layer: eqx.nn.Linear, u: States) -> States:
    """One product for all positions."""
    y = u @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


class OrthogonalShift(eqx.Module):
    """Every node takes its left neighbour's state, turned by an orthogonal matrix.

    f(z, x)ᵢ = zᵢ₋₁ exp(A − Aᵀ) + xᵢ, so that neither states nor gradients grow or
    shrink on their way.
    """

    generator: Float[Array, "width width"]

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.generator = 0.01 * jr.normal(key, (width, width))

    def __call__(self, z: States, x: States) -> States:
        turn = jsp.linalg.expm(self.generator - self.generator.T)
        return from_left(z) @ turn + x


def from_left(z: States) -> States:
    """The state of every position's left neighbour; zero at the first."""
    return jnp.concatenate([jnp.zeros_like(z[:, :1]), z[:, :-1]], axis=1)


def _mean_of(unit: tuple[int, ...]) -> Callable[[States], States]:
    """The mean state of every cell's row, column or box."""
    number = np.array(unit)
    weights = (number[:, None] == number).astype(np.float32) / 4

    return lambda z: jnp.einsum("ij,bjw->biw", weights, z)


LOOKS: dict[str, tuple[Callable[[States], States], ...]] = {
    "left": (from_left,),
    "units": tuple(map(_mean_of, UNITS)),
}
