"""What the language models share: layers on tokens, checks, and parameter counts."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

Tokens = Int[Array, "batch length"]
Features = Float[Array, "batch length dim"]


def count_parameters(tree: PyTree) -> int:
    """The number of parameters: entries of floating-point arrays.

    Takes shapes as well as arrays, so that a model of any size can be counted without
    being made.

    Args:
        tree: a module, or what `equinox.filter_eval_shape` makes of its constructor.

    Returns:
        The number of entries. An array that is held in two places counts twice.

    Example:
        >>> import deqjax, equinox as eqx, jax.random as jr
        >>> make = deqjax.nn.RevDEQLM.wikitext103
        >>> deqjax.nn.count_parameters(eqx.filter_eval_shape(make, key=jr.key(0)))
        95907840
    """

    def size(leaf: Any) -> int:
        dtype = getattr(leaf, "dtype", None)
        inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
        return math.prod(leaf.shape) if inexact else 0

    return sum(size(leaf) for leaf in jtu.tree_leaves(tree))


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


def embed(table: Float[Array, "rows dim"], rows: Int[Array, "..."]) -> Array:
    """Rows of a table; NaN for a row beyond its end."""
    return table.at[rows].get(mode="fill", fill_value=jnp.nan)


def check_sizes(**sizes: Any) -> None:
    """Raise unless every size is a positive integer."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer ≥ 1; got {value!r}.")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise unless the heads share the width evenly."""
    if dim % num_heads:
        raise ValueError(
            f"`dim` must be a multiple of `num_heads`; got dim={dim}, "
            f"num_heads={num_heads}."
        )


def check_rate(name: str, rate: Any) -> None:
    """Raise unless a dropout rate lies in [0, 1)."""
    if isinstance(rate, bool) or not (isinstance(rate, int | float) and 0 <= rate < 1):
        raise ValueError(f"`{name}` must satisfy 0 ≤ {name} < 1; got {rate!r}.")


def check_tokens(name: str, tokens: Any, max_length: int | None = None) -> None:
    """Raise unless `tokens` is a batch of token sequences that a model can take."""
    shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"`{name}` must have shape (batch, length); got shape {shape}. Add an axis "
            "of length 1 for a single sequence."
        )
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers; got {dtype}.")
    if max_length is not None and shape[1] > max_length:
        raise ValueError(
            f"`{name}` may be `max_length` = {max_length} long, for which the model "
            f"has positions; got length {shape[1]}."
        )
