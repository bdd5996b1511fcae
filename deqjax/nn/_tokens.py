"""What the language models share: layers on tokens."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, Integer

Tokens = Int[Array, "batch length"]
Features = Float[Array, "batch length dim"]


def over_tokens(layer: Callable, x: Array) -> Array:
    """A layer for one vector, applied over all leading axes."""
    for _ in range(x.ndim - 1):
        layer = jax.vmap(layer)
    return layer(x)


def project(layer: Any, x: Array) -> Array:
    """A linear layer over all leading axes.

    It computes in the dtype of its weights; the dtype of x comes back.
    """
    dtype = jtu.tree_leaves(eqx.filter(layer, eqx.is_inexact_array))[0].dtype
    return over_tokens(layer, x.astype(dtype)).astype(x.dtype)


def signed(tokens: Integer[Array, "..."]) -> Int[Array, "..."]:
    """Tokens as signed integers of 32 bits or more: room for every one, and for −1."""
    whole = jnp.issubdtype(tokens.dtype, jnp.signedinteger)
    return tokens if whole and tokens.dtype.itemsize >= 4 else tokens.astype(jnp.int32)


def embed(table: Float[Array, "rows dim"], rows: Int[Array, "..."]) -> Array:
    """Rows of a table; NaN for rows that it does not have, negative ones too."""
    return table.at[rows].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )
