"""How many parameters a model has."""

import math
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


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
